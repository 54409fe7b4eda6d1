from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
)

import tiny
from rollouts import CPU, PROMPTS, RESPONSES, classifier, one_by_one, rollout, with_adapter
from trl_sync.errors import ConfigError, RewardError
from trl_sync.ppo.rewards import (
    FunctionReward,
    ModelReward,
    check_scores,
    completion_texts,
    reward_source,
)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("padding", [0, 1, 9_999])
@pytest.mark.parametrize("adapter", [False, True])
def test_model_rewards_equal_the_classifier_on_each_sequence_alone(
    adapter: bool, padding: int, batch_size: int
) -> None:
    # Padding with the id of the end token, or with one beyond the embeddings, changes nothing.
    model = with_adapter(classifier()) if adapter else classifier()
    expected = one_by_one(model.eval(), PROMPTS, RESPONSES)
    model.config.pad_token_id = 1
    source = ModelReward(model, tiny.tokenizer(), batch_size=batch_size, device=CPU)
    found = source(rollout(padding=padding))
    assert found.dtype == torch.float32
    assert float(expected.std()) > 1.0  # or equality would say little
    # atol: fp32, two layers over sums of 64 terms, scores up to 10, other padding.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-5)


def test_positions_count_from_the_first_real_token() -> None:
    # Of a model with absolute positions, which left padding would shift.
    torch.manual_seed(4)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 64}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=1)).eval()
    with torch.no_grad():
        model.score.weight *= 50
        model.transformer.wpe.weight *= 50
    expected = one_by_one(model, PROMPTS, RESPONSES)
    source = ModelReward(model, tiny.tokenizer(), batch_size=4, device=CPU)
    # atol: as above
    torch.testing.assert_close(source(rollout()), expected, rtol=0.0, atol=2e-5)


def test_an_adapter_really_changes_the_scores() -> None:
    plain = one_by_one(classifier().eval(), PROMPTS, RESPONSES)
    adapted = one_by_one(with_adapter(classifier()).eval(), PROMPTS, RESPONSES)
    assert float((plain - adapted).abs().min()) > 0.01


def test_a_reward_model_is_frozen_and_in_evaluation_mode() -> None:
    model = classifier(attention_dropout=0.5).train()
    source = ModelReward(model, tiny.tokenizer(), batch_size=4, device=CPU)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    first, second = source(rollout()), source(rollout())
    assert torch.equal(first, second)
    assert not first.requires_grad


def three_labels() -> nn.Module:
    return LlamaForSequenceClassification(tiny.llama_config(num_labels=3))


def few_embeddings() -> nn.Module:
    return tiny.reward_llama(vocab_size=20)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (three_labels, ["3 labels", "num_labels=1"]),
        (tiny.llama, ["LlamaForCausalLM has no `score` head", "SequenceClassification"]),
        (partial(nn.Linear, 2, 1), ["Linear has no `score` head"]),
        (few_embeddings, ["reward model has only 20 embeddings", "id 34"]),
    ],
)
def test_reward_models_that_cannot_work_are_refused(
    build: Callable[[], nn.Module], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        ModelReward(build(), tiny.tokenizer(), batch_size=4, device=CPU)
    for words in said:
        assert words in str(raised.value)


# --- Reward functions


def function_reward(function: Any, *, conversational: bool = False) -> FunctionReward:
    return FunctionReward(function, tiny.tokenizer(), conversational=conversational)


# a = 3, b = 4, c = 5; [PAD], [EOS] and [UNK] are 0 to 2
TWO = rollout(
    [[3], [3, 4]],
    [[4, 5, 1], [5]],
    texts=["a", "ab"],
    columns={"answer": ["x", "y"], "weight": [1.0, 2.0]},
    padding=9,  # an ordinary token: only the mask tells that it is none of the response
)


def test_functions_get_prompts_and_completions_by_keyword() -> None:
    def reward(completions: list[str], prompts: list[str]) -> list[float]:
        assert prompts == ["a", "ab"]
        assert completions == ["b c", "c"]  # without special tokens and padding
        return [0.5, -2]

    source = function_reward(reward)
    assert source.name == "reward"
    assert source(TWO).tolist() == [0.5, -2.0]
    assert source(TWO).dtype == torch.float32


def test_functions_get_the_columns_they_name() -> None:
    def reward(prompts: Any, completions: Any, answer: list[str]) -> list[float]:
        return [float(text == "y") for text in answer]

    assert function_reward(reward)(TWO).tolist() == [0.0, 1.0]


def test_functions_with_keywords_get_every_column() -> None:
    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        # And the responses' token ids, with the end-of-sequence token, without padding.
        ids = {"completion_ids": [[4, 5, 1], [5]]}
        assert columns == ids | {"answer": ["x", "y"], "weight": [1.0, 2.0]}
        return columns["weight"]

    assert function_reward(reward)(TWO).tolist() == [1.0, 2.0]


def test_columns_never_take_the_place_of_prompts_and_completions() -> None:
    columns = {"completions": ["gold"], "prompts": ["?"], "completion_ids": [[9]]}
    batch = rollout([[3]], [[4]], texts=["a"], columns=columns)

    def reward(prompts: list[str], completions: list[str], **others: Any) -> list[float]:
        assert (prompts, completions, others) == (["a"], ["b"], {"completion_ids": [[4]]})
        return [1.0]

    assert function_reward(reward)(batch).tolist() == [1.0]


def test_conversational_completions_are_messages() -> None:
    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        assert completions == [
            [{"role": "assistant", "content": "b c"}],
            [{"role": "assistant", "content": "c"}],
        ]
        return [1.0, 2.0]

    assert function_reward(reward, conversational=True)(TWO).tolist() == [1.0, 2.0]


def test_an_empty_response_is_an_empty_text() -> None:
    batch = rollout([[3]], [[]])
    assert completion_texts(batch, tiny.tokenizer()) == [""]


class Scorer:
    """An object that can be called."""

    def __call__(self, prompts: Any, completions: Any, weight: list[float]) -> list[float]:
        return weight


class Unreadable(Scorer):
    """Like a function written in C whose signature Python cannot read."""

    __signature__ = "not a signature"

    def __call__(self, **arguments: Any) -> list[float]:
        own = {"prompts", "completions", "completion_ids"}
        assert set(arguments) == own | {"answer", "weight"}
        return arguments["weight"]


def scaled(prompts: Any, completions: Any, weight: list[float], factor: float) -> list[float]:
    return [factor * value for value in weight]


@pytest.mark.parametrize(
    ("function", "name", "expected"),
    [
        (Scorer(), "Scorer", [1.0, 2.0]),
        (Unreadable(), "Unreadable", [1.0, 2.0]),
        (partial(scaled, factor=10), "partial", [10.0, 20.0]),
        (lambda completions, **_: map(len, completions), "<lambda>", [3.0, 1.0]),
        (lambda **_: [True, False], "<lambda>", [1.0, 0.0]),
        (lambda **_: torch.tensor([0.5, 2.0]), "<lambda>", [0.5, 2.0]),
        (lambda **_: torch.tensor([5, 2]), "<lambda>", [5.0, 2.0]),
        (lambda **_: [torch.tensor(0.5), torch.tensor(2.0)], "<lambda>", [0.5, 2.0]),
        (lambda **_: np.array([0.5, 2.0], dtype=np.float32), "<lambda>", [0.5, 2.0]),
        (lambda **_: [np.float32(0.5), np.int64(2)], "<lambda>", [0.5, 2.0]),
    ],
)
def test_kinds_of_functions_and_of_numbers(function: Any, name: str, expected: list[float]) -> None:
    source = function_reward(function)
    assert source.name == name
    assert source(TWO).tolist() == expected


def test_builtins_without_a_signature_get_every_column() -> None:
    # dict(prompts=..., completions=..., completion_ids=..., answer=..., weight=...): five keys.
    with pytest.raises(ValueError, match="no signature found"):
        inspect.signature(dict)
    with pytest.raises(RewardError, match=r"dict returned .'prompts': .* 'weight': "):
        function_reward(dict)(TWO)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([1.0], "reward returned 1 scores for 2 completions"),
        ([1.0, 2.0, 3.0], "reward returned 3 scores for 2 completions"),
        (["0.5", 1.0], "reward returned '0.5' for completion 0: expected a number"),
        ([1.0, [2.0]], r"reward returned \[2.0\] for completion 1"),
        (torch.ones(2, 1), "completion 0: expected a number"),
        ("ab", "reward returned 'a' for completion 0"),
        (None, "reward returned None: expected a list of 2 numbers"),
        (0.5, "reward returned 0.5: expected a list of 2 numbers"),
        (torch.tensor(0.5), r"reward returned tensor\(0.5000\): expected a list of 2 numbers"),
    ],
)
def test_scores_that_are_no_numbers_are_refused(scores: Any, said: str) -> None:
    def reward(**_: Any) -> Any:
        return scores

    with pytest.raises(RewardError, match=said):
        function_reward(reward)(TWO)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    source = function_reward(lambda **_: [1.0, value])
    # 1e39 is finite in Python, and too large for fp32.
    with pytest.raises(RewardError, match=r"reward gave episode 1 the score -?(nan|inf)"):
        check_scores(source(TWO), "reward")


def test_finite_scores_pass() -> None:
    check_scores(torch.tensor([0.0, -1e30, 1e30]), "reward")
    check_scores(torch.tensor([]), "reward")


# --- What the user may give


def source_of(reward: Any) -> Any:
    return reward_source(reward, tiny.tokenizer(), conversational=False, batch_size=4, device=CPU)


def test_a_path_is_loaded_and_scores_as_its_model(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    source = source_of(str(tmp_path))
    assert isinstance(source, ModelReward)
    expected = one_by_one(model.eval(), PROMPTS, RESPONSES)
    torch.testing.assert_close(source(rollout()), expected, rtol=0.0, atol=2e-5)  # as above


def test_models_and_functions_are_told_apart() -> None:
    assert isinstance(source_of(classifier()), ModelReward)
    assert isinstance(source_of(with_adapter(classifier())), ModelReward)
    assert isinstance(source_of(lambda **_: []), FunctionReward)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (None, "No reward source: pass reward_model"),
        (3, "must be a model, a path or a function, got int"),
        ([lambda **_: [], 3], "must be a model, a path or a function, got int"),
        ([], "reward_model is an empty list"),
    ],
)
def test_what_is_no_reward_source_is_refused(reward: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        source_of(reward)


def test_a_token_added_later_is_no_other_vocabulary(tmp_path: Path) -> None:
    tiny.reward_llama().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path)
    longer = tiny.tokenizer()
    longer.add_tokens(["<new>"])
    ModelReward(model, longer, batch_size=2, device=torch.device("cpu"))
