"""Text, conversational or tokenized datasets -> batches of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xxhash
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import is_conversational
from trl.data_utils import apply_chat_template

from trl_sync.errors import ConfigError
from trl_sync.ppo.batch import PromptBatch

_TOKENS = "prompt_token_ids"


class PromptDataset:
    """The prompts of a dataset, tokenized once, with its other columns beside them.

    The dataset holds one of: a `prompt` column of text, a `prompt` column of messages, or an
    `input_ids` column. `max_prompt_tokens` is what the model's context leaves besides the response.

    Raises:
        ConfigError: no such column, no rows, messages without a chat template, or a prompt that is
            empty, too long, padded or of another kind.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int | None,
        response_length: int,
        num_proc: int | None = None,
    ) -> None:
        _check_kind(dataset)
        dataset = dataset.with_format(None)  # plain lists, whatever format the user set
        self._prompt_column = "prompt" if "prompt" in dataset.column_names else "input_ids"
        self.conversational = self._prompt_column == "prompt" and is_conversational(dataset[0])
        if self.conversational and tokenizer.chat_template is None:
            raise ConfigError(
                "The prompts are messages, but the tokenizer has no chat template: set "
                "tokenizer.chat_template, or pass prompts as text."
            )
        self._tokenizer = tokenizer
        self._largest_id = max(tokenizer.get_vocab().values(), default=0)
        self._dataset = dataset.map(
            self._tokenize,
            with_indices=True,
            num_proc=num_proc,
            desc="Tokenizing prompts",
            load_from_cache_file=False,
        )
        lengths = [len(tokens) for tokens in self._dataset[_TOKENS]]
        _check_lengths(lengths, max_prompt_tokens, response_length)

    def __len__(self) -> int:
        return len(self._dataset)

    def fingerprint(self) -> str:
        """xxh3-64 over the tokens of all prompts in their order, as 16 hex digits."""
        digest = xxhash.xxh3_64()
        for tokens in self._dataset[_TOKENS]:
            digest.update(f"{tokens}".encode())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int]) -> PromptBatch:
        """Those rows, in that order."""
        rows = self._dataset[list(indices)]
        token_ids = rows.pop(_TOKENS)
        prompts = rows.pop(self._prompt_column)
        if self._prompt_column == "input_ids":
            prompts = self._tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return PromptBatch(prompts=prompts, token_ids=token_ids, columns=rows)

    def _tokenize(self, row: Mapping[str, Any], index: int) -> dict[str, list[int]]:
        prompt = row[self._prompt_column]
        if self._prompt_column == "input_ids":
            _check_prompt(index, prompt, list, "a list of token ids")
            _check_token_ids(index, prompt, self._tokenizer, self._largest_id)
            return {_TOKENS: prompt}
        if not self.conversational:
            _check_prompt(index, prompt, str, "text")
            return {_TOKENS: list(self._tokenizer(prompt)["input_ids"])}
        _check_prompt(index, prompt or None, list, "a list of messages")
        text = apply_chat_template({"prompt": prompt}, self._tokenizer)["prompt"]
        # The template writes the special tokens itself.
        return {_TOKENS: list(self._tokenizer(text, add_special_tokens=False)["input_ids"])}


def _check_kind(dataset: Any) -> None:
    if isinstance(dataset, IterableDataset):
        raise ConfigError(
            "Streaming datasets are not supported: PPO needs to know how many prompts there are. "
            "Load the dataset without streaming."
        )
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"Expected a datasets.Dataset, got {type(dataset).__name__}: choose one split, or "
            "build one with datasets.Dataset.from_list."
        )
    if len(dataset) == 0:
        raise ConfigError("The dataset is empty: PPO needs at least one rollout batch of prompts.")
    if not {"prompt", "input_ids"} & set(dataset.column_names):
        raise ConfigError(
            f"The dataset has the columns {dataset.column_names}, but PPO needs a column `prompt` "
            "(text or messages) or `input_ids` (tokens). Rename one: dataset.rename_column(old, "
            "'prompt')."
        )


def _check_prompt(index: int, prompt: Any, kind: type, expected: str) -> None:
    if not isinstance(prompt, kind):
        raise ConfigError(
            f"Prompt {index} is {str(prompt)[:60]!r} of type {type(prompt).__name__}, expected "
            f"{expected}: make every row alike, or remove those without a prompt."
        )


def _check_token_ids(
    index: int, ids: list[Any], tokenizer: PreTrainedTokenizerBase, largest_id: int
) -> None:
    wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i <= largest_id]
    if wrong:
        raise ConfigError(
            f"Prompt {index} has the token id {wrong[0]!r} in `input_ids`, expected whole numbers "
            f"from 0 to {largest_id}: tokenize the prompts with the tokenizer given here."
        )
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    pad = tokenizer.pad_token_id
    if ids and pad is not None and pad not in others and pad in (ids[0], ids[-1]):
        raise ConfigError(
            f"Prompt {index} is padded with {tokenizer.pad_token!r} (id {pad}): every token of "
            "`input_ids` counts as part of the prompt. Tokenize with padding=False."
        )


def _check_lengths(lengths: list[int], max_prompt_tokens: int | None, response_length: int) -> None:
    if min(lengths) == 0:
        raise ConfigError(
            f"Prompt {lengths.index(0)} has no tokens: the model needs at least one to continue. "
            "Remove empty prompts."
        )
    if max_prompt_tokens is not None and max(lengths) > max_prompt_tokens:
        raise ConfigError(
            f"Prompt {lengths.index(max(lengths))} has {max(lengths)} tokens. With response_length="
            f"{response_length} the model's context leaves {max_prompt_tokens}: filter long "
            "prompts or lower response_length."
        )


def check_tokenizer(tokenizer: Any, num_embeddings: int, model_name: str = "model") -> None:
    """Nothing, if the model has an embedding for every token but the padding token.

    The padding token is never fed to a model, so one that was added without resizing is fine.

    Raises:
        ConfigError: there is no tokenizer, no padding and no end-of-sequence token, or ids beyond
            the embeddings.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"processing_class must be a tokenizer, got {type(tokenizer).__name__}. PPO trains "
            "text models."
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            "The tokenizer has neither a padding nor an end-of-sequence token: set one, for "
            "example tokenizer.pad_token = tokenizer.eos_token."
        )
    ids = {i: token for token, i in tokenizer.get_vocab().items() if i != tokenizer.pad_token_id}
    largest = max(ids, default=0)
    if largest >= num_embeddings:
        raise ConfigError(
            f"The tokenizer's token {ids[largest]!r} has id {largest}, but the {model_name} has "
            f"only {num_embeddings} embeddings. Use the tokenizer that belongs to the "
            f"{model_name}, or call resize_token_embeddings."
        )
