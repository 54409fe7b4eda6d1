"""Hidden states -> log-probabilities and entropies of given tokens, in chunks.

The logits of a whole batch (tokens x vocabulary) are the largest tensor of PPO at 8B and below.
Here they exist for one chunk of tokens at a time. The log-probability of a token depends on its own
hidden state alone, so below a frozen head its gradient is a number that the backward pass brings,
times a vector that the forward pass can compute while it has the logits. Below a head that trains
the logits are recomputed in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trl_sync.errors import ConfigError

# Bytes of a chunk's fp32 logits, unless a caller says otherwise. On an accelerator a chunk must be
# so long that its products outweigh reading the head's weights; on a CPU less is as fast.
CHUNK_BYTES = 64 * 2**20
CPU_CHUNK_BYTES = 16 * 2**20


def _plain(logits: Tensor, config: Any) -> Tensor:
    return logits


def _soft_capped(logits: Tensor, config: Any) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _divided(logits: Tensor, config: Any) -> Tensor:
    return logits / config.logits_scaling


def _multiplied(logits: Tensor, config: Any) -> Tensor:
    return logits * config.logit_scale


# What each architecture's causal-LM forward does to its logits after the LM head. Every entry has a
# parity test against the model's own logits.
_POST_PROCESSING: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "cohere": _multiplied,
    "gemma": _plain,
    "gemma2": _soft_capped,
    "gpt2": _plain,
    "gpt_neox": _plain,
    "granite": _divided,
    "llama": _plain,
    "mistral": _plain,
    "phi3": _plain,
    "qwen2": _plain,
    "qwen3": _plain,
}


def default_chunk_bytes(device: torch.device) -> int:
    """How many bytes of fp32 logits make a chunk on that kind of device."""
    return CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES


def knows_head(model: Any) -> bool:
    """Whether `CausalHead` knows what this architecture does to its logits."""
    return model.config.model_type in _POST_PROCESSING


class CausalHead:
    """The LM head of a causal model as a function of hidden states, with its post-processing.

    Raises:
        ConfigError: the architecture's post-processing of logits is not known.
    """

    def __init__(self, model: Any) -> None:
        kind = model.config.model_type
        if kind not in _POST_PROCESSING:
            raise ConfigError(
                f"The LM head of model type {kind!r} is not known: its logits may be capped or "
                f"scaled. Known types: {', '.join(sorted(_POST_PROCESSING))}."
            )
        self._post_process = _POST_PROCESSING[kind]
        self._config = model.config
        self._model = model

    @property
    def linear(self) -> nn.Module:
        """The output embedding, looked up anew because wrappers replace modules."""
        module: nn.Module = self._model.get_output_embeddings()
        return module

    @property
    def trains(self) -> bool:
        """Whether a parameter of the output embedding requires a gradient."""
        return any(parameter.requires_grad for parameter in self.linear.parameters())

    @property
    def vocabulary_size(self) -> int:
        return int(self._config.vocab_size)

    def __call__(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        return self._post_process(self.linear(hidden), self._config)


def token_statistics(
    logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"], temperature: float
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probability of each token and entropy of its distribution, in nats, both fp32.

    The entropy is a statistic: no gradient flows through it.
    """
    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    normalizer = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - normalizer
    _, entropies = _distribution_and_entropies(scaled, normalizer)
    return logprobs, entropies


@torch.no_grad()
def _distribution_and_entropies(
    scaled: Float[Tensor, "N V"], normalizer: Float[Tensor, " N"]
) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"]]:
    """softmax(scaled) and its entropies in nats; makes one tensor of that size, and an eighth."""
    distribution = scaled - normalizer.unsqueeze(-1)
    entropies = []
    with torch.autocast(scaled.device.type, enabled=False):
        for logs in distribution.split(len(distribution) // 8 + 1):
            part = logs.exp()
            entropies.append(-(part.unsqueeze(1) @ logs.unsqueeze(2)).flatten())
            logs.copy_(part)
    return distribution, torch.cat(entropies)


def chunked_token_statistics(
    hidden: Float[Tensor, "N H"],
    tokens: Int[Tensor, " N"],
    head: Callable[[Tensor], Tensor],
    *,
    vocabulary_size: int,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    head_trains: bool = True,
    context_fn: Callable[[], tuple[Any, Any]] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """`token_statistics` of `head(hidden)`, in chunks of at most `chunk_bytes` of fp32 logits.

    A head that trains gets its gradients, for which the logits are recomputed in the backward pass
    if there is more than one chunk; `context_fn` is passed on to `torch.utils.checkpoint`.
    """
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(hidden.device)
    chunk_tokens = max(1, chunk_bytes // (4 * vocabulary_size))
    if torch.is_grad_enabled() and not head_trains:
        logprobs, entropies = _BelowFrozenHead.apply(
            hidden, tokens, head, temperature, chunk_tokens
        )
        return logprobs, entropies

    def statistics(part: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return token_statistics(head(part), targets, temperature)

    if hidden.shape[0] <= chunk_tokens:
        return statistics(hidden, tokens)
    step: Callable[..., tuple[Tensor, Tensor]] = statistics
    if torch.is_grad_enabled():
        contexts: dict[str, Any] = {} if context_fn is None else {"context_fn": context_fn}
        step = functools.partial(checkpoint, statistics, use_reentrant=False, **contexts)
    parts = [step(*part) for part in _chunks(hidden, tokens, chunk_tokens)]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


class _BelowFrozenHead(torch.autograd.Function):
    """`token_statistics` whose gradient reaches the hidden states alone, without logits kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        tokens: Tensor,
        head: Callable[[Tensor], Tensor],
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            _statistics_and_slope(part, targets, head, temperature)
            for part, targets in _chunks(hidden, tokens, chunk_tokens)
        ]
        logprobs, entropies, slopes = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropies: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return (of_logprobs.unsqueeze(1) * slopes).to(slopes.dtype), None, None, None, None


def _statistics_and_slope(
    hidden: Tensor, tokens: Tensor, head: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_statistics`, and the derivative [N, H] of each log-probability by its hidden state."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        logits = head(hidden)
    scaled = logits.detach().float()
    if temperature != 1.0:
        scaled = scaled / temperature
    normalizer = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - normalizer
    distribution, entropies = _distribution_and_entropies(scaled, normalizer)
    del scaled
    # The derivative by the logits: 1 at the token, minus the distribution.
    slope = distribution.neg_()
    slope.scatter_add_(-1, tokens.unsqueeze(-1), torch.ones_like(logprobs).unsqueeze(-1))
    if temperature != 1.0:
        slope /= temperature
    (of_hidden,) = torch.autograd.grad(logits, hidden, slope.to(logits.dtype))
    return logprobs, entropies, of_hidden


def _chunks(hidden: Tensor, tokens: Tensor, chunk_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True)
