"""The helpers of TRL's ppo_trainer against TRL 1.12.0's own, on random inputs and tiny models."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import pad

import oracle
import tiny
from trl_sync.backbone.checkpointing import is_checkpointing
from trl_sync.backbone.roles import VALUE
from trl_sync.backbone.views import RoleView
from trl_sync.errors import ConfigError
from trl_sync.ppo import compat

PAD, STOP = 0, 1


def _oracle() -> SimpleNamespace:
    utils = ("first_true_indices", "get_reward")
    found = oracle.functions("experimental/utils.py", *utils, torch=torch)
    names = (
        *("generate", "batch_generation", "exact_div", "print_rich_table", "truncate_response"),
        *("forward", "masked_mean", "masked_var", "masked_whiten", "PolicyAndValueWrapper"),
    )
    found += oracle.functions(
        "experimental/ppo/ppo_trainer.py",
        *names,
        torch=torch,
        nn=torch.nn,
        pd=pd,
        pad=pad,
        first_true_indices=found[0],
        GenerationConfig=GenerationConfig,
        ModelOutput=ModelOutput,
        is_rich_available=lambda: True,
        Console=Console,
        Table=Table,
    )
    return SimpleNamespace(**dict(zip((*utils, *names), found, strict=True)))


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    return _oracle()


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tokens(seed: int, *shape: int, lowest: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, 8, shape, generator=generator)


def _queries() -> Tensor:
    """Four queries, padded on the left."""
    queries = _tokens(0, 4, 6, lowest=2)
    for row, length in enumerate((6, 3, 5, 1)):
        queries[row, : 6 - length] = PAD
    return queries


def _query_responses() -> Tensor:
    """The queries with responses of 4, 0, 2 and 1 tokens, padded on the right."""
    responses = _tokens(1, 4, 4, lowest=2)
    for row, length in enumerate((4, 0, 2, 1)):
        responses[row, length:] = PAD
    return torch.cat((_queries(), responses), dim=1)


def _sampling(**changes: Any) -> GenerationConfig:
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None}
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 0, "pad_token_id": PAD}
    return GenerationConfig(**(sampled | options | changes))


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masked_statistics_are_those_of_trl(
    trl: SimpleNamespace, seed: int, kind: torch.dtype
) -> None:
    values, mask = 3 * _random(seed, 5, 7) + 1, (_random(seed + 50, 5, 7) > 0).to(kind)
    mask[:, 0] = mask[0] = 1
    calls: list[Callable[[Any], Tensor]] = [
        lambda its: its.masked_mean(values, mask),
        lambda its: its.masked_mean(values, mask, 1),
        lambda its: its.masked_mean(values, mask, axis=0),
        lambda its: its.masked_var(values, mask),
        lambda its: its.masked_var(values, mask, unbiased=False),
        lambda its: its.masked_whiten(values, mask),
        lambda its: its.masked_whiten(values, mask, shift_mean=False),
    ]
    for call in calls:
        assert torch.equal(call(compat), call(trl))


def test_masked_statistics_by_hand() -> None:
    values, mask = torch.tensor([9.0, 2.0, 4.0, 9.0]), torch.tensor([0, 1, 1, 0])
    assert compat.masked_mean(values, mask) == 3.0
    assert compat.masked_var(values, mask) == 2.0  # (1 + 1) / (2 - 1)
    assert compat.masked_var(values, mask, unbiased=False) == 1.0
    whitened = compat.masked_whiten(values, mask)[1:3]
    half = 2**-0.5
    torch.testing.assert_close(whitened, torch.tensor([-half, half]))


def test_variance_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="mask is empty"):
        compat.masked_var(torch.ones(3), torch.zeros(3))


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(5))
def test_token_positions_are_those_of_trl(trl: SimpleNamespace, seed: int) -> None:
    tokens = _tokens(seed, 6, 9)
    tokens[0] = 5  # no stop token
    ours = compat.truncate_response(STOP, PAD, tokens)
    assert torch.equal(ours, trl.truncate_response(STOP, PAD, tokens))
    for bools in (tokens == STOP, (tokens == STOP).view(2, 3, 9)):
        for dtype in (torch.long, torch.int32):
            found = compat.first_true_indices(bools, dtype=dtype)
            expected = trl.first_true_indices(bools, dtype=dtype)
            assert torch.equal(found, expected)
            assert found.dtype == expected.dtype


def test_token_positions_by_hand() -> None:
    tokens = torch.tensor([[5, STOP, 6, STOP], [5, 6, 7, 5], [STOP, 5, 5, 5]])
    assert compat.first_true_indices(tokens == STOP).tolist() == [1, 4, 0]
    truncated = [[5, STOP, PAD, PAD], [5, 6, 7, 5], [STOP, PAD, PAD, PAD]]
    assert compat.truncate_response(STOP, PAD, tokens).tolist() == truncated


@pytest.mark.oracle
def test_outputs_are_those_of_trl(trl: SimpleNamespace) -> None:
    model, sequences = tiny.llama().eval(), _query_responses()
    with torch.no_grad():
        ours, theirs = (its.forward(model, sequences, PAD) for its in (compat, trl))
    assert torch.equal(ours.logits, theirs.logits)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))


@pytest.mark.oracle
def test_rewards_are_those_of_trl(trl: SimpleNamespace) -> None:
    model, sequences = tiny.reward_llama().eval(), _query_responses()
    with torch.no_grad():
        ours, theirs = (its.get_reward(model, sequences, PAD, 6) for its in (compat, trl))
    assert all(map(torch.equal, ours, theirs))
    assert ours[2].tolist() == [9, 5, 7, 6]  # an empty response: the query's last token


@pytest.mark.oracle
@pytest.mark.parametrize("batch_size", [3, 4, 64])
@pytest.mark.parametrize("eos", [None, STOP])
def test_responses_are_those_of_trl(trl: SimpleNamespace, batch_size: int, eos: int | None) -> None:
    model, queries = tiny.llama().eval(), _queries()
    sampling = _sampling(eos_token_id=eos, max_new_tokens=20)
    answers = []
    for its in (compat, trl):
        torch.manual_seed(3)
        answers.append(its.batch_generation(model, queries, batch_size, PAD, sampling))
    (sequences, scores), (expected_sequences, expected_scores) = answers
    assert torch.equal(sequences, expected_sequences)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(sequences[:, :6], queries)
    assert not scores.requires_grad


def test_shorter_responses_are_padded() -> None:
    """Two batches whose responses end after 1 and after 3 tokens."""
    queries = torch.tensor([[3], [4]])
    model = _Spelling({3: [STOP], 4: [7, 7, STOP]})
    sequences, scores = compat.batch_generation(model, queries, 1, 2, _sampling())
    assert sequences.tolist() == [[3, STOP, 2, 2], [4, 7, 7, STOP]]
    assert scores[:, :, 0].tolist() == [[1, 0, 0], [1, 1, 1]]


class _Spelling(torch.nn.Module):
    """Answers a query of one token with a given response; its scores are all 1."""

    def __init__(self, responses: dict[int, list[int]]) -> None:
        super().__init__()
        self.responses = responses

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Any:
        response = torch.tensor([self.responses[int(input_ids[0, 0])]])
        scores = tuple(torch.ones(1, 8) for _ in range(response.shape[1]))
        return SimpleNamespace(sequences=torch.cat((input_ids, response), 1), scores=scores)


@pytest.mark.oracle
def test_wrapper_answers_as_trl_s(trl: SimpleNamespace) -> None:
    policy, value_model = _without_old_name(tiny.llama()), tiny.reward_llama()
    inputs = {"input_ids": _query_responses(), "output_hidden_states": True}
    ours = compat.PolicyAndValueWrapper(policy, value_model).eval()
    theirs = trl.PolicyAndValueWrapper(policy, value_model).eval()
    with torch.no_grad():
        (output, values), (expected_output, expected_values) = ours(**inputs), theirs(**inputs)
    assert torch.equal(output.logits, expected_output.logits)
    assert torch.equal(values, expected_values)
    assert ours.critic_backbone is theirs.critic_backbone
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()


def _without_old_name(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the attribute that TRL 1.12.0 reads, which warns on transformers 5.23."""
    kind = type(model)
    attributes = {"is_gradient_checkpointing": False}
    model.__class__ = type(kind.__name__, (kind,), attributes)
    return model


def test_tensors_share_memory_issue_5150() -> None:
    """TRL's wrapper held the value trunk under two names, and safetensors refused to save it."""
    wrapper = compat.PolicyAndValueWrapper(tiny.llama(), tiny.reward_llama())
    pointers = [tensor.data_ptr() for tensor in wrapper.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


def test_wrapper_switches_checkpointing_of_both_models() -> None:
    wrapper = compat.PolicyAndValueWrapper(tiny.llama(), tiny.reward_llama())
    models = (wrapper.policy, wrapper.value_model)
    assert not wrapper.is_gradient_checkpointing
    wrapper.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert wrapper.is_gradient_checkpointing
    assert all(is_checkpointing(model) for model in models)
    wrapper.gradient_checkpointing_disable()
    assert not wrapper.is_gradient_checkpointing
    assert not any(is_checkpointing(model) for model in models)


def test_no_attribute_base_model_prefix_issue_1977() -> None:
    """TRL stopped inside training with an AttributeError."""
    for call in (
        lambda: compat.get_reward(torch.nn.Linear(2, 2), _query_responses(), PAD, 6),
        lambda: compat.get_reward(tiny.llama(), _query_responses(), PAD, 6),
        lambda: compat.PolicyAndValueWrapper(tiny.llama(), tiny.llama()),
    ):
        with pytest.raises(ConfigError, match="AutoModelForSequenceClassification"):
            call()


def test_a_view_of_a_shared_backbone_is_told_apart() -> None:
    backbone = SimpleNamespace(causal_model=tiny.llama())
    view = RoleView(backbone, VALUE)
    for call in (
        lambda: compat.get_reward(view, _query_responses(), PAD, 6),
        lambda: compat.PolicyAndValueWrapper(tiny.llama(), view),
    ):
        with pytest.raises(
            ConfigError, match=r"view of a shared backbone.*value_model\(input_ids\)"
        ):
            call()


@pytest.mark.oracle
def test_exact_division_is_that_of_trl(trl: SimpleNamespace) -> None:
    for its in (compat, trl):
        assert its.exact_div(12, 4) == 3
        with pytest.raises(ValueError, match=r"batch, inexact division: 12 / 5 = 2.4"):
            its.exact_div(12, 5, "batch")


@pytest.mark.oracle
def test_table_is_that_of_trl(trl: SimpleNamespace) -> None:
    frame = pd.DataFrame({"query": ["ab", "c"], "score": [0.5, 2.0]})
    printed = []
    for its in (compat, trl):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            its.print_rich_table(frame)
        printed.append(text.getvalue())
    assert printed[0] == printed[1]
    assert "0.5" in printed[0]


def test_table_shows_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    """TRL's raised a MarkupError at a response such as this."""
    compat.print_rich_table(pd.DataFrame({"response": ["[/INST] [PAD]"]}))
    assert "[/INST] [PAD]" in capsys.readouterr().out


def test_state_counts_episodes() -> None:
    state = compat.OnlineTrainerState(global_step=3)
    assert (state.episode, state.global_step) == (0, 3)


def test_simple_chat_template() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = compat.SIMPLE_CHAT_TEMPLATE
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "User: hi\n\nAssistant: yo\n\n"
    question = tokenizer.apply_chat_template(
        messages[:1], tokenize=False, add_generation_prompt=True
    )
    assert question == "User: hi\n\nAssistant:"


def test_device_map_of_a_quantized_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compat.get_kbit_device_map() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compat, "PartialState", lambda: SimpleNamespace(local_process_index=1))
    assert compat.get_kbit_device_map() == {"": 1}
