from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import processors
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

import runs
import tiny
from trl_sync import PPOTrainer
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


def test_tokens_decide_as_in_trl_and_reward_functions_get_the_text() -> None:
    batch = prompts({"prompt": ["a"], "input_ids": [[B]]}).batch([0])
    assert batch.token_ids == [[B]]
    assert batch.prompts == ["a"]
    assert batch.columns == {}


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


# --- Messages with tools and template arguments

# Writes down all that a template can see.
TEMPLATE = (
    "{% if tools %}{% for t in tools %}[{{ t | tojson }}]{% endfor %}{% endif %}"
    "{% if mood is defined %}({{ mood }}){% endif %}"
    "{% for m in messages %}<{{ m['role'] }}: {{ m['content'] or '' }}"
    "{% if 'tool_calls' in m %}!{{ m['tool_calls'] | tojson }}{% endif %}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant: {% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "number"}}}}
SAY = {"type": "function", "function": {"name": "say", "parameters": {"y": {"type": "string"}}}}
ADD_TEXT = (
    '[{"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "number"}}}}]'
)
SAY_TEXT = ADD_TEXT.replace("add", "say").replace('"x"', '"y"').replace("number", "string")


class Recorded(PreTrainedTokenizerFast):
    """Keeps the texts that it is asked to tokenize."""

    texts: list[str]

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.texts.append(text)
        return super().__call__(text, *args, **kwargs)


def texts_of(columns: dict[str, list[Any]], **options: Any) -> list[str]:
    """What the chat template makes of the rows."""
    tokenizer = tiny.tokenizer()
    recorded = Recorded(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", chat_template=TEMPLATE
    )
    recorded.texts = []
    PromptDataset(
        Dataset.from_dict(columns),
        recorded,
        max_prompt_tokens=None,
        response_length=8,
        **options,
    )
    return recorded.texts


def test_each_row_has_its_own_tools() -> None:
    columns = {"prompt": [[MESSAGE]] * 4, "tools": [[ADD], [SAY], [], None]}
    expected = [ADD_TEXT, SAY_TEXT, "", ""]
    assert texts_of(columns) == [f"{tools}<user: a><assistant: " for tools in expected]


def test_tools_may_be_json() -> None:
    columns = {"prompt": [[MESSAGE]] * 2, "tools": [json.dumps([ADD]), json.dumps([SAY, ADD])]}
    expected = [ADD_TEXT, SAY_TEXT + ADD_TEXT]
    assert texts_of(columns) == [f"{tools}<user: a><assistant: " for tools in expected]


def test_template_arguments_of_the_run_and_of_a_row() -> None:
    columns = {
        "prompt": [[MESSAGE]] * 3,
        "chat_template_kwargs": [{"mood": "bad"}, {"mood": None}, None],
    }
    given = {"mood": "good"}
    moods = [text.partition("<")[0] for text in texts_of(columns, chat_template_kwargs=given)]
    assert moods == ["(bad)", "(good)", "(good)"]
    assert [text.partition("<")[0] for text in texts_of(columns)] == ["(bad)", "", ""]


def test_a_last_message_of_the_assistant_is_continued() -> None:
    start = {"role": "assistant", "content": "bc"}
    columns = {"prompt": [[MESSAGE, start], [MESSAGE]]}
    assert texts_of(columns) == ["<user: a><assistant: bc", "<user: a><assistant: "]


def test_messages_have_no_fields_of_other_rows() -> None:
    call = {"function": {"name": "add", "arguments": {"x": 1}}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "content": "c"}
    columns = {"prompt": [[MESSAGE, calling, answer], [MESSAGE]]}
    called = '[{"function": {"name": "add", "arguments": {"x": 1}}}]'
    assert texts_of(columns) == [
        f"<user: a><assistant: !{called}><tool: c><assistant: ",
        "<user: a><assistant: ",
    ]


def test_tools_and_arguments_reach_reward_functions_too() -> None:
    columns = {"prompt": [[MESSAGE]], "tools": [[ADD]], "chat_template_kwargs": [{"mood": "x"}]}
    batch = prompts(columns).batch([0])
    assert batch.columns == {"tools": [[ADD]], "chat_template_kwargs": [{"mood": "x"}]}


def test_beside_text_tools_are_a_column_like_others() -> None:
    batch = prompts({"prompt": ["a"], "tools": [[ADD]]}).batch([0])
    assert batch.token_ids == [[A]]
    assert batch.columns == {"tools": [[ADD]]}


RAISING = "{{ raise_exception('only two turns') }}"


@pytest.mark.parametrize(
    ("columns", "template", "said"),
    [
        ({"prompt": [[MESSAGE], [{"role": "system", "content": "a"}]]}, None, ["Prompt 1", "last"]),
        ({"prompt": [[MESSAGE]]}, RAISING, ["Prompt 0", "only two turns"]),
        ({"prompt": [[MESSAGE]], "tools": ["[{"]}, None, ["Prompt 0", "JSONDecodeError"]),
        ({"prompt": [[MESSAGE]], "chat_template_kwargs": ["3"]}, None, ["Prompt 0", "dictionary"]),
        ({"prompt": [[], [{"content": "a"}]]}, None, ["Prompt 0", "expected text"]),
    ],
)
def test_messages_that_cannot_be_rendered_are_refused(
    columns: dict[str, list[Any]], template: str | None, said: list[str]
) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template or TEMPLATE
    with pytest.raises(ConfigError) as raised:
        prompts(columns, tokenizer)
    for words in said:
        assert words in str(raised.value)


@pytest.mark.parametrize("columns", [{"prompt": ["a"]}, {"input_ids": [[A]]}])
def test_template_arguments_without_messages_are_refused(columns: dict[str, list[Any]]) -> None:
    with pytest.raises(ConfigError, match="no effect: the prompts are no messages"):
        texts_of(columns, chat_template_kwargs={"mood": "good"})


# --- Tokens with a mask, and collators


@pytest.mark.parametrize("mask", [[0, 0, 1, 1], [False, False, True, True], [0.0, 0.0, 1.0, 1.0]])
def test_padding_is_left_out_by_the_mask(mask: list[Any]) -> None:
    columns: dict[str, list[Any]] = {
        "input_ids": [[0, 0, A, B], [A, C, 0, 0]],
        "attention_mask": [mask, mask[::-1]],
        "lengths": [2, 2],
    }
    batch = prompts(columns).batch([0, 1])
    assert batch.token_ids == [[A, B], [A, C]]
    assert batch.prompts == ["a b", "a c"]
    assert batch.columns == {"lengths": [2, 2]}


def test_the_mask_decides_where_padding_and_end_are_one_token() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    columns = {"input_ids": [[1, 1, A, 1]], "attention_mask": [[0, 1, 1, 1]]}
    assert prompts(columns, tokenizer).batch([0]).token_ids == [[1, A, 1]]


@pytest.mark.parametrize("mask", [[1, 0, 1], [1, 1], [1, 2, 1], [1, 1, 1, 1]])
def test_masks_that_say_something_else_are_refused(mask: list[int]) -> None:
    with pytest.raises(ConfigError, match="Prompt 1 has 3 token ids and the attention mask"):
        prompts({"input_ids": [[A], [A, B, C]], "attention_mask": [[1], mask]})


def test_a_prompt_that_is_all_padding_is_refused() -> None:
    with pytest.raises(ConfigError, match="Prompt 1 has no tokens"):
        prompts({"input_ids": [[A], [0, 0]], "attention_mask": [[1], [0, 0]]})


def collated(columns: dict[str, list[Any]], collator: Any) -> PromptDataset:
    return PromptDataset(
        Dataset.from_dict(columns),
        tiny.tokenizer(),
        max_prompt_tokens=3,
        response_length=8,
        data_collator=collator,
    )


@pytest.mark.parametrize("prompt", [{"prompt": ["ab", "c"]}, {"input_ids": [[A, B], [C]]}])
def test_a_padding_collator_changes_nothing(prompt: dict[str, list[Any]]) -> None:
    columns = prompt | {"answer": ["x", "y"], "info": [{"n": 1}, {"n": 2}]}
    batch = collated(columns, DataCollatorWithPadding(tiny.tokenizer())).batch([1, 0])
    assert batch.token_ids == [[C], [A, B]]
    assert batch.columns == {"answer": ["y", "x"], "info": [{"n": 2}, {"n": 1}]}


def test_a_collator_sees_tokens_alone_and_may_cut_them() -> None:
    seen: list[Any] = []

    def cut(features: list[dict[str, list[int]]]) -> dict[str, Any]:
        seen.extend(features)
        names = ("input_ids", "attention_mask")
        return {name: [row[name][-3:] for row in features] for name in names}

    # max_prompt_tokens is 3, and one prompt has 5 tokens.
    dataset = collated({"prompt": ["abcab", "c"], "answer": ["x", "y"]}, cut)
    assert dataset.batch([0, 1]).token_ids == [[C, A, B], [C]]
    assert dataset.batch([0]).prompts == ["abcab"]
    assert seen == [
        {"input_ids": [A, B, C, A, B], "attention_mask": [1] * 5},
        {"input_ids": [C], "attention_mask": [1]},
    ]


def test_more_prompts_than_are_collated_together() -> None:
    collator = DataCollatorWithPadding(tiny.tokenizer())
    texts = tiny.prompts(150)["prompt"][:]
    dataset = PromptDataset(
        tiny.prompts(150),
        tiny.tokenizer(),
        max_prompt_tokens=None,
        response_length=8,
        data_collator=collator,
    )
    alone = prompts({"prompt": texts})
    assert dataset.batch(range(150)) == alone.batch(range(150))
    assert dataset.fingerprint() == alone.fingerprint()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({"labels": [[A], [B]]}, r"returned \['labels'\] for 2 prompts"),
        ({"input_ids": [[A], [B]]}, "expected `input_ids` and `attention_mask`"),
        ({"input_ids": [[A]], "attention_mask": [[1]]}, "with one row for each"),
        ([[A], [B]], "returned a list"),
        (None, "returned a NoneType"),
        ({"input_ids": [[A], [99]], "attention_mask": [[1], [1]]}, "Prompt 1 has the token id 99"),
        ({"input_ids": [[A], [B]], "attention_mask": [[1], [0]]}, "Prompt 1 has no tokens"),
    ],
)
def test_collators_that_return_something_else_are_refused(output: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        collated({"prompt": ["a", "b"]}, lambda features: output)


# --- Through the trainer


def test_the_trainer_hands_collator_and_template_arguments_on(tmp_path: Path) -> None:
    rewarded: dict[str, Any] = {}

    def reward(prompts: list[Any], completions: list[Any], info: list[Any]) -> list[float]:
        rewarded.update(zip((str(i) for i in info), prompts, strict=True))
        return [0.0] * len(prompts)

    def last_three(features: list[dict[str, list[int]]]) -> dict[str, Any]:
        names = ("input_ids", "attention_mask")
        return {name: [row[name][-3:] for row in features] for name in names}

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ mood }}"
    rows = [[{"role": "user", "content": "a" * (1 + i)}] for i in range(16)]
    dataset = Dataset.from_dict({"prompt": rows, "info": [{"n": i, "t": "x"} for i in range(16)]})
    trainer = PPOTrainer(
        tiny.config(tmp_path / "out", total_episodes=16, chat_template_kwargs={"mood": "bc"}),
        tokenizer,
        tiny.llama(),
        reward_model=reward,
        train_dataset=dataset,
        eval_dataset={"some": dataset.select(range(2))},
        data_collator=last_three,
        peft_config=runs.lora(),
    )
    for found in (trainer.train_dataset, trainer.eval_dataset["some"]):
        assert found.batch([0, 1]).token_ids == [[A, B, C], [A, B, C]]
    assert trainer.get_eval_dataloader(dataset).dataset.batch([15]).token_ids == [[A, B, C]]
    assert trainer.data_collator is last_three
    trainer.train()
    assert rewarded == {str({"n": i, "t": "x"}): rows[i] for i in range(16)}


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
