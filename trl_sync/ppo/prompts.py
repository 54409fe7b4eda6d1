"""Text, conversational or tokenized datasets -> batches of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import xxhash
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from trl_sync.errors import ConfigError
from trl_sync.ppo.batch import PromptBatch
from trl_sync.ppo.messages import render

# Rows of the dataset -> a batch with `input_ids` and `attention_mask`, as in transformers.
DataCollator = Callable[[list[dict[str, list[int]]]], Mapping[str, Any]]

_TOKENS = "trl_sync_prompt_token_ids"
# What templates raise of rows that do not fit; RecursionError of JSON in `tools`.
_TEMPLATE_ERRORS = (
    *(ValueError, TypeError, KeyError, AttributeError),
    *(RecursionError, TemplateError),
)
# A collator pads these to the longest of them; what it returns does not depend on the number.
_COLLATED_TOGETHER = 64


class PromptDataset:
    """The prompts of a dataset, tokenized once, with its other columns beside them.

    The dataset holds one of: a `prompt` column of text, a `prompt` column of messages, or an
    `input_ids` column, which decides if there are both; reward functions then still get `prompt`.
    `max_prompt_tokens` is what the model's context leaves besides the response.

    - Messages: the columns `tools` (JSON schemas) and `chat_template_kwargs`, where a row has them,
      go to the chat template; `chat_template_kwargs` given here holds for every row that does not
      say otherwise. A prompt that ends with an assistant's message is continued.
    - Tokens: where `attention_mask` is 0, `input_ids` is padding and left out.
    - `data_collator` gets `input_ids` and `attention_mask` alone; what it returns under these
      names, without padding, becomes the prompts' tokens.

    Raises:
        ConfigError: no such column, no rows, messages without a chat template or that it does not
            accept, `chat_template_kwargs` without messages, a collator that returns something else,
            or a prompt that is empty, too long, padded or of another kind.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int | None,
        response_length: int,
        num_proc: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        data_collator: DataCollator | None = None,
    ) -> None:
        _check_kind(dataset)
        dataset = dataset.with_format(None)  # plain lists, whatever format the user set
        self._tokenized = "input_ids" in dataset.column_names
        self.conversational = "prompt" in dataset.column_names and _holds_messages(dataset)
        uses_template = self.conversational and not self._tokenized
        _check_template(tokenizer, uses_template, chat_template_kwargs)
        self._tokenizer = tokenizer
        self._template_kwargs = dict(chat_template_kwargs or {})
        self._data_collator = data_collator
        self._largest_id = max(tokenizer.get_vocab().values(), default=0)
        options: dict[str, Any] = {
            "with_indices": True,
            "num_proc": num_proc,
            "load_from_cache_file": False,
        }
        self._dataset = dataset.map(self._tokenize, desc="Tokenizing prompts", **options)
        if data_collator is not None:
            self._dataset = self._dataset.map(
                self._collate,
                input_columns=[_TOKENS],
                batched=True,
                batch_size=_COLLATED_TOGETHER,
                desc="Collating prompts",
                **options,
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
        prompts = rows.pop("prompt", None)
        if self._tokenized:
            rows.pop("input_ids")
            rows.pop("attention_mask", None)
        if prompts is None:
            prompts = self._tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return PromptBatch(prompts=prompts, token_ids=token_ids, columns=rows)

    def _tokenize(self, row: Mapping[str, Any], index: int) -> dict[str, list[int]]:
        prompt = row["input_ids" if self._tokenized else "prompt"]
        if self._tokenized:
            _check_prompt(index, prompt, list, "a list of token ids")
            prompt = _without_padding(index, prompt, row.get("attention_mask"))
            _check_token_ids(index, prompt, self._tokenizer, self._largest_id)
            return {_TOKENS: prompt}
        if not self.conversational:
            _check_prompt(index, prompt, str, "text")
            return {_TOKENS: list(self._tokenizer(prompt)["input_ids"])}
        _check_prompt(index, prompt or None, list, "a list of messages")
        text = _render(index, row, self._tokenizer, self._template_kwargs)
        # The template writes the special tokens itself.
        return {_TOKENS: list(self._tokenizer(text, add_special_tokens=False)["input_ids"])}

    def _collate(self, prompts: list[list[int]], indices: list[int]) -> dict[str, list[list[int]]]:
        """What the user's collator makes of those prompts."""
        assert self._data_collator is not None
        features = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in prompts]
        output = self._data_collator(features)
        columns = []
        for name in ("input_ids", "attention_mask"):
            rows = _plain(output.get(name)) if isinstance(output, Mapping) else None
            if not isinstance(rows, list) or len(rows) != len(prompts):
                raise ConfigError(
                    f"data_collator returned {_describe(output)} for {len(prompts)} prompts, "
                    "expected `input_ids` and `attention_mask` with one row for each: use "
                    "transformers.DataCollatorWithPadding(tokenizer), or leave it out."
                )
            columns.append([_plain(row) for row in rows])
        collated = [_without_padding(*row) for row in zip(indices, *columns, strict=True)]
        for index, ids in zip(indices, collated, strict=True):
            _check_token_ids(index, ids, self._tokenizer, self._largest_id)
        return {_TOKENS: collated}


def _holds_messages(dataset: Dataset) -> bool:
    """Whether the first prompt that is not empty is a list of messages."""
    first = next((prompt for prompt in dataset["prompt"] if prompt), None)
    return isinstance(first, list) and is_conversational({"prompt": first})


def _check_template(
    tokenizer: PreTrainedTokenizerBase, conversational: bool, template_kwargs: Any
) -> None:
    if conversational and tokenizer.chat_template is None:
        raise ConfigError(
            "The prompts are messages, but the tokenizer has no chat template: set "
            "tokenizer.chat_template, or pass prompts as text."
        )
    if template_kwargs and not conversational:
        raise ConfigError(
            f"chat_template_kwargs={template_kwargs} has no effect: the prompts are no messages, "
            "so no chat template is applied. Leave it unset, or pass prompts as messages."
        )


def _render(
    index: int,
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
) -> str:
    """The messages, tools and template arguments of one row as text."""
    try:
        rendered = render(
            {"prompt": row["prompt"]},
            tokenizer,
            tools=row.get("tools"),
            own_arguments=row.get("chat_template_kwargs"),
            arguments=template_kwargs,
        )
    except _TEMPLATE_ERRORS as error:
        raise ConfigError(
            f"Prompt {index}, {str(row['prompt'])[:60]!r}, cannot be put into the chat template: "
            f"{type(error).__name__}: {error}. Expected messages with `role` and `content`, the "
            "last one of a user, a tool or an assistant; `tools` a list of JSON schemas and "
            "`chat_template_kwargs` a dictionary."
        ) from error
    text: str = rendered["prompt"]
    return text


def _without_padding(index: int, ids: list[Any], mask: Any) -> list[Any]:
    """The token ids where `mask` is 1; all of them without a mask."""
    if mask is None:
        return ids
    if not isinstance(mask, Iterable):
        mask = [mask]
    as_text = "".join("1" if m == 1 else "0" if m == 0 else "?" for m in mask)
    if len(as_text) != len(ids) or "?" in as_text or "0" in as_text.strip("0"):
        raise ConfigError(
            f"Prompt {index} has {len(ids)} token ids and the attention mask {list(mask)[:20]}, "
            "expected as many entries: 1 for the tokens of the prompt, all side by side, and 0 for "
            "padding at the ends."
        )
    return [token for token, kept in zip(ids, as_text, strict=True) if kept == "1"]


def _plain(value: Any) -> Any:
    """A tensor or an array as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _describe(output: Any) -> str:
    return str(sorted(output)) if isinstance(output, Mapping) else f"a {type(output).__name__}"


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
