from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sync.ppo.batch import Experience, PromptBatch, Rollout, ScoredRollout

NO_DEADLINE = settings(deadline=None)  # the machine may be busy with other things

# Three sequences of up to 3 prompt tokens (left-padded) and up to 4 response tokens. Token ids tell
# row, part and position: 1 2 1 is row 1, response, position 1. The padding is 0 throughout.
INPUT_IDS = torch.tensor(
    [
        [0, 0, 12, 21, 22, 0, 0],
        [0, 111, 112, 121, 0, 0, 0],
        [211, 212, 213, 221, 222, 223, 0],
    ]
)
PROMPT_LENGTHS, RESPONSE_LENGTHS = [1, 2, 3], [2, 1, 3]
NUM_PROMPT, NUM_RESPONSE = 3, 4


def experience(prompt_lengths: list[int], response_lengths: list[int]) -> Experience:
    rows = len(prompt_lengths)
    prompt_mask = torch.tensor(
        [[column >= NUM_PROMPT - n for column in range(NUM_PROMPT)] for n in prompt_lengths]
    )
    response_mask = torch.tensor(
        [[column < n for column in range(NUM_RESPONSE)] for n in response_lengths]
    )
    numbers = torch.arange(rows * NUM_RESPONSE, dtype=torch.float32).view(rows, NUM_RESPONSE) + 1
    numbers = numbers.masked_fill(~response_mask, 0.0)
    return Experience(
        input_ids=INPUT_IDS[:rows],
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        response_mask=response_mask,
        old_logprobs=-numbers,
        old_values=10 * numbers,
        advantages=100 * numbers,
        returns=1000 * numbers,
    )


def test_a_rollout_joins_prompts_and_responses() -> None:
    rollout = Rollout(
        prompts=PromptBatch(prompts=["a", "bc"], token_ids=[[5], [6, 7]], columns={}),
        prompt_ids=torch.tensor([[0, 5], [6, 7]]),
        prompt_mask=torch.tensor([[False, True], [True, True]]),
        response_ids=torch.tensor([[8, 1, 0], [9, 9, 9]]),
        response_mask=torch.tensor([[True, True, False], [True, True, True]]),
        stopped=torch.tensor([True, False]),
    )
    assert rollout.input_ids.tolist() == [[0, 5, 8, 1, 0], [6, 7, 9, 9, 9]]
    assert rollout.attention_mask.tolist() == [
        [False, True, True, True, False],
        [True, True, True, True, True],
    ]
    assert len(rollout.prompts) == 2


def test_a_micro_batch_drops_the_columns_that_are_padding_in_all_its_rows() -> None:
    whole = experience(PROMPT_LENGTHS, RESPONSE_LENGTHS)
    part = whole.micro_batch(torch.tensor([1, 0]), torch.tensor(6))
    # Rows 1 and 0, in that order: 2 prompt columns and 2 response columns remain.
    assert part["input_ids"].tolist() == [[111, 112, 121, 0], [0, 12, 21, 22]]
    assert part["attention_mask"].tolist() == [
        [True, True, True, False],
        [False, True, True, True],
    ]
    assert part["response_mask"].tolist() == [[True, False], [True, True]]
    # Row 1 has the numbers 5.., row 0 the numbers 1..
    assert part["old_logprobs"].tolist() == [[-5.0, 0.0], [-1.0, -2.0]]
    assert part["old_values"].tolist() == [[50.0, 0.0], [10.0, 20.0]]
    assert part["advantages"].tolist() == [[500.0, 0.0], [100.0, 200.0]]
    assert part["returns"].tolist() == [[5000.0, 0.0], [1000.0, 2000.0]]
    assert int(part["loss_denominator"]) == 6


def test_the_longest_prompt_and_response_of_a_micro_batch_decide() -> None:
    whole = experience(PROMPT_LENGTHS, RESPONSE_LENGTHS)
    part = whole.micro_batch(torch.tensor([2]), torch.tensor(6))
    assert part["input_ids"].tolist() == [[211, 212, 213, 221, 222, 223]]
    assert part["advantages"].tolist() == [[900.0, 1000.0, 1100.0]]


def test_a_micro_batch_of_empty_responses_keeps_one_masked_column() -> None:
    part = experience([2, 1], [0, 0]).micro_batch(torch.tensor([0, 1]), torch.tensor(1))
    assert part["response_mask"].tolist() == [[False], [False]]
    assert part["attention_mask"].tolist() == [[True, True, False], [False, True, False]]
    assert part["advantages"].tolist() == [[0.0], [0.0]]


@NO_DEADLINE
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=3, max_size=3), st.data())
def test_a_micro_batch_loses_no_token(lengths: list[tuple[int, int]], data: st.DataObject) -> None:
    whole = experience([p for p, _ in lengths], [r for _, r in lengths])
    rows = data.draw(st.permutations(range(3))), data.draw(st.integers(1, 3))
    chosen = torch.tensor(rows[0][: rows[1]])
    part = whole.micro_batch(chosen, torch.tensor(1))
    prompts = part["input_ids"].shape[1] - part["response_mask"].shape[1]
    for row, original in enumerate(chosen.tolist()):
        num_prompt, num_response = lengths[original]
        kept = part["input_ids"][row][part["attention_mask"][row]].tolist()
        start = NUM_PROMPT - num_prompt
        assert kept == INPUT_IDS[original, start : NUM_PROMPT + num_response].tolist()
        # The response begins where the prompt columns end.
        response = part["attention_mask"][row, prompts:]
        assert response.tolist() == part["response_mask"][row].tolist()
        returns = part["returns"][row][part["response_mask"][row]].tolist()
        assert returns == whole.returns[original, :num_response].tolist()
    assert part["attention_mask"][:, 0].any(), "a column of padding is left in front"


@pytest.mark.parametrize("noun", [PromptBatch, Rollout, ScoredRollout, Experience])
def test_nouns_are_frozen_slotted_and_keyword_only(noun: type) -> None:
    assert noun.__dataclass_params__.frozen
    assert "__slots__" in vars(noun)
    assert all(field.kw_only for field in dataclasses.fields(noun))
