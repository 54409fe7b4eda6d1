"""Prompts -> Rollout: sampled responses and the masks that say which of their tokens count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from trl_sync.backbone.roles import POLICY
from trl_sync.ppo.batch import PromptBatch, Rollout
from trl_sync.ppo.config import PPOConfig
from trl_sync.ppo.generation_options import DRAWING_ONLY, GenerationOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn: from softmax(logits / temperature), until a stop token or the limit.

    With `greedy` the most likely token is taken instead. `options` are further fields of
    `GenerationConfig` that the user asked for.
    """

    response_length: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    greedy: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, model: Any) -> Sampling:
        """What `config` says about responses; `model` is the causal LM that gives them.

        Raises:
            ConfigError: `generation_config` or `generation_kwargs` cannot work with PPO.
        """
        options = GenerationOptions.of(config)
        return cls(
            response_length=config.response_length,
            temperature=config.temperature,
            stop_token_ids=stop_token_ids(config, tokenizer, model, options),
            options=options.settings,
        )

    def generation_config(self) -> GenerationConfig:
        """The same for `generate`; what would bend the distribution is off if not asked for."""
        if self.greedy:
            own: dict[str, Any] = {"do_sample": False}
            options = {n: v for n, v in self.options.items() if n not in DRAWING_ONLY}
        else:
            own = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
            options = dict(self.options)
        own |= {"use_cache": True, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0} | options
        # Rows that have ended are filled with an id every model has; the mask hides it.
        return GenerationConfig(
            max_new_tokens=self.response_length,
            eos_token_id=list(self.stop_token_ids) or None,
            pad_token_id=0,
            **own,
        )


def stop_token_ids(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    options: GenerationOptions | None = None,
) -> tuple[int, ...]:
    """The tokens that end a response: none, the one configured, or all end-of-sequence tokens.

    With `stop_token="eos"` these are the tokenizer's, the model's and those of `options`; the end
    tokens of `generation_kwargs` end a response in any case.
    """
    of_kwargs = options.eos_of_kwargs if options is not None else ()
    if config.stop_token_id is not None:
        return (int(config.stop_token_id),)
    if config.stop_token != "eos":
        return of_kwargs
    of_model = model.generation_config.eos_token_id
    several = of_model if isinstance(of_model, (list, tuple)) else [of_model]
    of_config = options.eos_of_config if options is not None else ()
    ids = [tokenizer.eos_token_id, *several, *of_config, *of_kwargs]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


@contextlib.contextmanager
def seeded(device: torch.device, *entropy: int) -> Iterator[None]:
    """Within the block torch draws from generators seeded by `entropy`; afterwards as before.

    What is drawn inside then depends on `entropy` alone, so a resumed run draws the same.
    """
    devices = [device] if device.type != "cpu" else []
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    kind = device.type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def roll_out(
    model: Any,
    prompts: PromptBatch,
    sampling: Sampling,
    *,
    batch_size: int,
    device: torch.device,
    role: str = POLICY,
) -> Rollout:
    """One response of `role` to each prompt, `batch_size` at a time, in the order of the prompts.

    Prompts of similar length are generated together. Draws from torch's global generators.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts.token_ids[row]))
    responses: list[Tensor] = [torch.empty(0)] * len(prompts)
    config = sampling.generation_config()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = pad_left([prompts.token_ids[row] for row in rows], device)
        generated = model.generate(ids, mask, generation_config=config, role=role)[
            :, ids.shape[1] :
        ]
        for row, response in zip(rows, generated, strict=True):
            responses[row] = response
    prompt_ids, prompt_mask = pad_left(prompts.token_ids, device)
    response_ids = pad_sequence(responses, batch_first=True)
    lengths = torch.tensor([len(response) for response in responses], device=device)
    stopped, response_mask = mask_after_stop(response_ids, lengths, sampling.stop_token_ids)
    return Rollout(
        prompts=prompts,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids.masked_fill(~response_mask, 0),
        response_mask=response_mask,
        stopped=stopped,
    )


def pad_left(
    sequences: list[list[int]], device: torch.device
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Token ids padded on the left with 0, and the mask of the real ones."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences], device=device)
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths.unsqueeze(1)


def mask_after_stop(
    response_ids: Int[Tensor, "B R"], lengths: Int[Tensor, " B"], stop_ids: tuple[int, ...]
) -> tuple[Bool[Tensor, " B"], Bool[Tensor, "B R"]]:
    """Which responses contain a stop token, and the mask of tokens up to and including the first.

    `lengths` bounds what was generated: behind it there is padding, whatever its id.
    """
    columns = torch.arange(response_ids.shape[1], device=response_ids.device)
    generated = columns < lengths.unsqueeze(1)
    stops = torch.isin(response_ids, response_ids.new_tensor(stop_ids)) & generated
    seen_before = stops.long().cumsum(1) - stops.long()
    return stops.any(1), generated & (seen_before == 0)
