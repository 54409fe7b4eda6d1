"""The small functions that scripts of the step API import from `trl.core`."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TopKLogitsWarper, TopPLogitsWarper, set_seed

from trl_sync.ppo.compat import masked_mean, masked_var, masked_whiten

__all__ = [
    "WANDB_PADDING",
    "LengthSampler",
    "PPODecorators",
    "clip_by_value",
    "convert_to_scalar",
    "entropy_from_logits",
    "flatten_dict",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "respond_to_batch",
    "set_seed",
    "stack_dicts",
    "stats_to_np",
    "top_k_top_p_filtering",
    "whiten",
]

# Fills up statistics of different lengths.
WANDB_PADDING = -1


class LengthSampler:
    """Draws a length from `min_value` to `max_value - 1`, each as likely, when it is called.

    With numpy's global generator.
    """

    def __init__(self, min_value: int, max_value: int) -> None:
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        return int(np.random.choice(self.values))


class PPODecorators:
    """Decorators that free the device's cached memory after a function, if switched on.

    Each is a context manager as well. Nothing happens while both switches are False.
    """

    optimize_device_cache: ClassVar[bool] = False
    # The name of earlier versions of TRL.
    optimize_cuda_cache: ClassVar[bool] = False

    @classmethod
    @contextmanager
    def empty_device_cache(cls) -> Iterator[None]:
        """Frees the cache afterwards, if one of the switches is on."""
        yield
        if cls.optimize_device_cache or cls.optimize_cuda_cache:
            free_device_cache()

    empty_cuda_cache = empty_device_cache


def free_device_cache() -> None:
    """Gives memory that torch has cached back to the device; nothing without one."""
    if torch.accelerator.is_available():
        gc.collect()
        torch.accelerator.memory.empty_cache()


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """`masked_whiten` without a mask."""
    return masked_whiten(values, torch.ones_like(values), shift_mean)


def clip_by_value(x: Tensor, tensor_min: Tensor, tensor_max: Tensor) -> Tensor:
    """`x` between two tensors."""
    return torch.clamp(x, tensor_min, tensor_max)


def logprobs_from_logits(logits: Tensor, labels: Tensor | None, gather: bool = True) -> Tensor:
    """Log-probabilities of `labels` (B, T) under logits (B, T, V); of every token if not gather."""
    logprobs = logits.log_softmax(-1)
    if not gather or labels is None:
        return logprobs
    return logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """The entropy of each position's distribution, in nats."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """Nested dictionaries as one, with joined names.

    Raises:
        ValueError: a name contains the separator.
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if sep in name:
            raise ValueError(f"The name {name!r} contains the separator {sep!r}.")
        if isinstance(value, Mapping):
            inner = flatten_dict(value, sep)
            flat |= {f"{name}{sep}{below}": entry for below, entry in inner.items()}
        else:
            flat[name] = value
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each statistic of several mini-batches as rows; shorter rows end with `WANDB_PADDING`."""
    return {
        name: pad_sequence(
            [stats[name].flatten() for stats in stats_dicts],
            batch_first=True,
            padding_value=WANDB_PADDING,
        )
        for name in stats_dicts[0]
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as numpy arrays, numbers as floats."""
    converted: dict[str, Any] = {}
    for name, value in stats_dict.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            # numpy has no bfloat16.
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        converted[name] = float(value) if isinstance(value, (int, float, np.number)) else value
    return converted


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays and tensors of one element as numbers, the rest as it is."""
    return {
        name: value.item()
        if isinstance(value, (Tensor, np.ndarray)) and tuple(value.shape) in ((), (1,))
        else value
        for name, value in stats.items()
    }


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -float("inf"),
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Logits (B, V) with all but the top k tokens, or those of probability mass p, filtered out."""
    options = {"filter_value": filter_value, "min_tokens_to_keep": min_tokens_to_keep}
    if top_k > 0:
        logits = TopKLogitsWarper(top_k=top_k, **options)(None, logits)
    if 0 <= top_p < 1.0:
        logits = TopPLogitsWarper(top_p=top_p, **options)(None, logits)
    return logits


@torch.no_grad()
def respond_to_batch(
    model: nn.Module, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """`txt_len` sampled tokens for each row of `queries` (B, P), which must not be padded.

    (B, txt_len); nothing ends a response early. `model` returns logits (B, T, V) first, as one with
    a value head does. `top_k=0` and `top_p=1.0` leave out no token.
    """
    tokens = queries
    for _ in range(txt_len):
        logits = top_k_top_p_filtering(model(tokens)[0][:, -1], top_k=top_k, top_p=top_p)
        sampled = torch.multinomial(logits.softmax(-1), num_samples=1)
        tokens = torch.cat([tokens, sampled], dim=1)
    return tokens[:, -txt_len:]
