from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import tiny
from trl_sync.errors import ConfigError
from trl_sync.ppo.prompts import PromptDataset, check_tokenizer

# tiny.tokenizer(): [PAD] 0, [EOS] 1, [UNK] 2, then a = 3, b = 4, ... z = 28, space 29, '.' 30,
# ',' 31, ':' 32, '<' 33, '>' 34
A, B, C, SPACE = 3, 4, 5, 29


def with_eos_in_front() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a special token before every text, as many do with theirs."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[EOS] $A", special_tokens=[("[EOS]", 1)]
    )
    return tokenizer


def prompts(
    columns: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    max_prompt_tokens: int | None = 100,
) -> PromptDataset:
    return PromptDataset(
        Dataset.from_dict(columns),
        tokenizer or tiny.tokenizer(),
        max_prompt_tokens=max_prompt_tokens,
        response_length=8,
    )


def test_text_prompts_are_tokenized() -> None:
    dataset = prompts({"prompt": ["ab", "c", "a b"]})
    batch = dataset.batch([2, 0, 1])
    assert len(dataset) == 3
    assert not dataset.conversational
    assert len(batch) == 3
    assert batch.prompts == ["a b", "ab", "c"]
    assert batch.token_ids == [[A, SPACE, B], [A, B], [C]]
    assert batch.columns == {}


def test_text_prompts_get_the_special_tokens_of_the_tokenizer() -> None:
    assert prompts({"prompt": ["ab"]}, with_eos_in_front()).batch([0]).token_ids == [[1, A, B]]


def test_messages_go_through_the_chat_template() -> None:
    messages = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "bc"}]]
    dataset = prompts({"prompt": messages})
    batch = dataset.batch([0, 1])
    assert dataset.conversational
    assert batch.prompts == messages
    texts = ["<user: a><assistant: ", "<user: bc><assistant: "]
    characters = {c: i + 3 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz .,:<>")}
    assert batch.token_ids == [[characters[c] for c in text] for text in texts]


def test_the_chat_template_alone_writes_the_special_tokens() -> None:
    tokenizer = with_eos_in_front()
    tokenizer.chat_template = "[EOS]" + tiny.CHAT_TEMPLATE
    batch = prompts({"prompt": [[{"role": "user", "content": "a"}]]}, tokenizer).batch([0])
    assert batch.token_ids[0].count(1) == 1
    assert batch.token_ids[0][0] == 1


def test_tokenized_prompts_are_taken_as_they_are() -> None:
    batch = prompts({"input_ids": [[A, B], [C]]}, with_eos_in_front()).batch([0, 1])
    assert batch.token_ids == [[A, B], [C]]
    assert batch.prompts == ["a b", "c"]  # decoded, for reward functions
    assert batch.columns == {}


@pytest.mark.parametrize("prompt", [{"prompt": ["a", "b"]}, {"input_ids": [[A], [B]]}])
def test_other_columns_are_passed_through(prompt: dict[str, list[Any]]) -> None:
    dataset = prompts(prompt | {"answer": ["x", "y"], "weight": [1.5, 2.5]})
    assert dataset.batch([1, 0]).columns == {"answer": ["y", "x"], "weight": [2.5, 1.5]}


def test_text_is_preferred_and_its_tokens_become_a_column() -> None:
    batch = prompts({"prompt": ["a"], "input_ids": [[B]]}).batch([0])
    assert batch.token_ids == [[A]]
    assert batch.columns == {"input_ids": [[B]]}


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_the_format_of_the_dataset_does_not_matter(kind: str) -> None:
    # Same lengths, so that the format could make one array of them.
    dataset = Dataset.from_dict({"input_ids": [[A, B], [B, C]], "answer": [1, 2]}).with_format(kind)
    found = PromptDataset(dataset, tiny.tokenizer(), max_prompt_tokens=None, response_length=8)
    batch = found.batch([0, 1])
    assert batch.token_ids == [[A, B], [B, C]]
    assert batch.columns == {"answer": [1, 2]}
    assert type(batch.token_ids[0]) is list
    assert type(batch.columns["answer"]) is list


def test_several_processes_tokenize_alike() -> None:
    dataset = PromptDataset(
        tiny.prompts(8), tiny.tokenizer(), max_prompt_tokens=100, response_length=8, num_proc=2
    )
    alone = prompts({"prompt": tiny.prompts(8)["prompt"][:]})
    assert dataset.batch(range(8)) == alone.batch(range(8))


def test_a_prompt_may_fill_the_context_exactly() -> None:
    prompts({"prompt": ["abc"]}, max_prompt_tokens=3)
    prompts({"prompt": ["abc"]}, max_prompt_tokens=None)


MESSAGE = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": []}, ["empty", "at least one rollout batch"]),
        ({"text": ["a"], "label": [0]}, ["['text', 'label']", "`prompt`", "rename_column"]),
        ({"prompt": ["a", "", "b"]}, ["Prompt 1 has no tokens", "Remove empty prompts"]),
        ({"input_ids": [[A], [B], []]}, ["Prompt 2 has no tokens"]),
        (
            {"prompt": ["a", "abcde"]},
            ["Prompt 1 has 5 tokens", "response_length=8", "leaves 4", "filter long prompts"],
        ),
        ({"prompt": ["a", None]}, ["Prompt 1", "NoneType", "expected text"]),
        ({"prompt": [1, 2]}, ["Prompt 0", "'1'", "int", "expected text"]),
        ({"prompt": [["a"], ["b"]]}, ["Prompt 0", "list", "expected text"]),
        ({"prompt": [[MESSAGE], []]}, ["Prompt 1", "expected a list of messages"]),
        ({"prompt": [[MESSAGE], None]}, ["Prompt 1", "NoneType", "a list of messages"]),
        ({"input_ids": ["ab"]}, ["Prompt 0", "str", "a list of token ids"]),
        ({"input_ids": [[A], None]}, ["Prompt 1", "NoneType", "a list of token ids"]),
        ({"input_ids": [[A], [B, -100]]}, ["Prompt 1", "-100", "from 0 to 34"]),
        ({"input_ids": [[A], [35]]}, ["Prompt 1", "35", "from 0 to 34"]),
        ({"input_ids": [[3.5]]}, ["Prompt 0", "3.5", "whole numbers"]),
        ({"input_ids": [[A, B], [0, A]]}, ["Prompt 1 is padded", "'[PAD]'", "padding=False"]),
        ({"input_ids": [[A, 0, 0]]}, ["Prompt 0 is padded"]),
    ],
)
def test_prompts_that_cannot_work_are_refused(
    columns: dict[str, list[Any]], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        prompts(columns, max_prompt_tokens=4)
    for words in said:
        assert words in str(raised.value)


def test_a_padding_token_that_has_another_meaning_may_stand_at_the_ends() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert prompts({"input_ids": [[1, A, 1]]}, tokenizer).batch([0]).token_ids == [[1, A, 1]]


def test_messages_without_a_chat_template_are_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template: set tokenizer\.chat_template"):
        prompts({"prompt": [[MESSAGE]]}, tokenizer)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (IterableDataset.from_generator(lambda: iter([{"prompt": "a"}])), "without streaming"),
        (DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})), "DatasetDict: choose one split"),
        ({"train": Dataset.from_dict({"prompt": ["a"]})}, "got dict: choose one split"),
        (["a", "b"], r"got list: .* datasets\.Dataset\.from_list"),
    ],
)
def test_what_is_no_dataset_is_refused(dataset: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PromptDataset(dataset, tiny.tokenizer(), max_prompt_tokens=None, response_length=8)


# --- Tokenizer and embeddings


def test_a_tokenizer_that_fits_the_embeddings_is_accepted() -> None:
    check_tokenizer(tiny.tokenizer(), 35)  # its ids are 0 to 34
    check_tokenizer(tiny.tokenizer(), 64)


def test_a_padding_token_beyond_the_embeddings_is_accepted() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    assert tokenizer.pad_token_id == 35
    check_tokenizer(tokenizer, 35)


@pytest.mark.parametrize("missing", ["pad_token", "eos_token"])
def test_one_of_padding_and_end_token_is_enough(missing: str) -> None:
    tokenizer = tiny.tokenizer()
    setattr(tokenizer, missing, None)
    check_tokenizer(tokenizer, 64)


def neither() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "num_embeddings", "said"),
    [
        (tiny.tokenizer(), 34, ["'>'", "id 34", "reward model", "34 embeddings", "resize"]),
        (neither(), 64, ["neither a padding nor an end-of-sequence token", "pad_token ="]),
        (None, 64, ["must be a tokenizer, got NoneType"]),
        (object(), 64, ["must be a tokenizer, got object", "text models"]),
    ],
)
def test_tokenizers_that_cannot_work_are_refused(
    tokenizer: Any, num_embeddings: int, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_tokenizer(tokenizer, num_embeddings, "reward model")
    for words in said:
        assert words in str(raised.value)
