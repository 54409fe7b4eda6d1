"""Rollout -> the tokens that a reward model reads: the policy's, or its own tokenizer's."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from trl_sync.errors import ConfigError
from trl_sync.ppo.batch import Rollout
from trl_sync.ppo.messages import render
from trl_sync.ppo.rewards.functions import completion_messages, completion_texts

logger = logging.get_logger(__name__)

# Tokens that a tokenizer may have beyond the reward model's before they are another vocabulary.
_ADDED_TOKENS = 16
# What tokenizers without a limit say is theirs.
_NO_LIMIT = 1_000_000

Sequences = tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]


def find_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder or at a hub name; None if there is none."""
    if Path(name).is_dir():
        if not (Path(name) / "tokenizer_config.json").is_file():
            return None
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def vocabulary_difference(
    own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """An example of a token whose id differs; None if token ids mean the same.

    A few tokens may be missing in `own`, such as a padding token added later.
    """
    theirs, ids = own.get_vocab(), tokenizer.get_vocab()
    moved = [token for token, i in ids.items() if theirs.get(token, i) != i]
    missing = [token for token in ids if token not in theirs]
    if not moved and len(missing) <= _ADDED_TOKENS:
        return None
    example = min(moved or missing, key=lambda token: ids[token])
    return (
        f"{example!r} is token {ids[example]} of the policy's tokenizer and {theirs.get(example)} "
        "of the reward model's"
    )


def parts_by_length(
    input_ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], size: int
) -> Iterator[tuple[Int[Tensor, " N"], Int[Tensor, "N t"], Bool[Tensor, "N t"]]]:
    """Rows of similar length, at most `size` at a time: which ones, their tokens and their mask.

    The tokens begin in column 0, and there are no more columns than the longest row has tokens.
    """
    lengths = mask.sum(1).cpu()
    tokens_first = mask.long().argsort(dim=1, descending=True, stable=True)
    input_ids, mask = input_ids.gather(1, tokens_first), mask.gather(1, tokens_first)
    for rows in lengths.argsort(stable=True).split(size):
        width = max(1, int(lengths[rows[-1]]))
        rows = rows.to(mask.device)
        yield rows, input_ids[rows, :width], mask[rows, :width]


class PolicyTokens:
    """The tokens of the rollout as they are; of the front, as much as `context` allows."""

    def __init__(self, *, context: int | None) -> None:
        self._context = context
        self._warned = False

    def __call__(self, rollout: Rollout) -> Sequences:
        ids, mask = rollout.input_ids, rollout.attention_mask
        if self._context is not None and int(mask.sum(1).max()) > self._context:
            self._warned = _warn_once(self._warned, self._context)
            mask = mask & (mask.flip(1).cumsum(1).flip(1) <= self._context)
        return ids, mask


class OwnTokens:
    """Prompt and response as text, tokenized with the reward model's own tokenizer.

    Text is prompt + response, with the tokenizer's usual special tokens, and its end token where
    the response ended with a special one, as in reward training. Messages pass its chat template.
    What is longer than `context` loses its front.

    Raises:
        ConfigError: the prompts are messages, and the tokenizer has no chat template.
    """

    def __init__(
        self,
        own: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int | None,
        conversational: bool,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if conversational and own.chat_template is None:
            raise ConfigError(
                "The prompts are messages and the reward model has a tokenizer of its own, but "
                "that has no chat template: set its chat_template and pass it as "
                "reward_processing_classes, or pass a function that formats the text."
            )
        self._own = copy.deepcopy(own)
        self._own.truncation_side = "left"
        self._tokenizer = tokenizer
        limit = self._own.model_max_length
        limits = [context, limit if limit < _NO_LIMIT else None]
        self._context = min((n for n in limits if n is not None), default=None)
        self._conversational = conversational
        self._options = chat_template_kwargs or {}
        self._end = _missing_end_token(self._own)
        self._warned = False

    def __call__(self, rollout: Rollout) -> Sequences:
        texts = self._texts(rollout)
        # The chat template writes the special tokens itself.
        options = {"add_special_tokens": not self._conversational, "verbose": False}
        ids = self._own(texts, **options)["input_ids"]
        if self._context is not None and max(map(len, ids)) > self._context:
            self._warned = _warn_once(self._warned, self._context)
            ids = self._own(texts, truncation=True, max_length=self._context, **options)[
                "input_ids"
            ]
        # A sequence without a token has nothing to score.
        return pad_right([row or [0] for row in ids], rollout.prompt_ids)

    def _texts(self, rollout: Rollout) -> list[str]:
        completions = completion_texts(rollout, self._tokenizer)
        prompts = rollout.prompts.prompts
        if not self._conversational:
            ends = [self._end if ended else "" for ended in self._ended(rollout)]
            return ["".join(parts) for parts in zip(prompts, completions, ends, strict=True)]
        nothing = [None] * len(prompts)
        columns = rollout.prompts.columns
        rows = zip(
            prompts,
            completion_messages(completions),
            columns.get("tools", nothing),
            columns.get("chat_template_kwargs", nothing),
            strict=True,
        )
        return [
            render(
                {"messages": _conversation(prompt, completion)},
                self._own,
                tools=tools,
                own_arguments=own_arguments,
                arguments=self._options,
            )["text"]
            for prompt, completion, tools, own_arguments in rows
        ]

    def _ended(self, rollout: Rollout) -> list[bool]:
        special = set(self._tokenizer.all_special_ids)
        last = (rollout.response_mask.sum(1) - 1).clamp(min=0)
        tokens = rollout.response_ids.gather(1, last.unsqueeze(1)).squeeze(1).tolist()
        stopped = rollout.stopped.tolist()
        return [s and token in special for s, token in zip(stopped, tokens, strict=True)]


def pad_right(rows: list[list[int]], like: Tensor) -> Sequences:
    """Token ids padded on the right with 0, and the mask of the real ones."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=like.device)
    lengths = torch.tensor([len(row) for row in rows], device=like.device)
    return ids, torch.arange(width, device=like.device) < lengths.unsqueeze(1)


def _conversation(prompt: list[Any], completion: list[Any]) -> list[Any]:
    """Prompt and response as messages; a response may continue the prompt's last message."""
    if prompt[-1]["role"] != "assistant":
        return [*prompt, *completion]
    begun, continued = prompt[-1], completion[0]
    return [*prompt[:-1], begun | {"content": begun["content"] + continued["content"]}]


def _missing_end_token(own: PreTrainedTokenizerBase) -> str:
    """The end token as text, unless the tokenizer has none or writes it by itself."""
    if own.eos_token is None or own("a")["input_ids"][-1:] == [own.eos_token_id]:
        return ""
    return str(own.eos_token)


def _warn_once(warned: bool, context: int) -> bool:
    if not warned:
        logger.warning(
            f"Some prompts with their responses are longer than the reward model's context of "
            f"{context} tokens: it reads their last {context} tokens. This is said once."
        )
    return True
