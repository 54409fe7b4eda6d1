from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sync.ppo.batch import Experience, PromptBatch, Rollout, ScoredRollout
from trl_sync.ppo.padding import Lengths, RightAligned

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


def test_a_micro_batch_is_as_wide_as_its_longest_row_and_rows_end_in_the_last_column() -> None:
    whole = experience(PROMPT_LENGTHS, RESPONSE_LENGTHS)
    part = whole.micro_batch(torch.tensor([1, 0]), torch.tensor(6))
    # Rows 1 and 0, in that order: 2 + 1 and 1 + 2 tokens fill three columns, without padding.
    assert part["input_ids"].tolist() == [[111, 112, 121], [12, 21, 22]]
    assert part["attention_mask"].tolist() == [[True] * 3, [True] * 3]
    assert part["response_mask"].tolist() == [[False, True], [True, True]]
    # Row 1 has the numbers 5.., row 0 the numbers 1..
    assert part["old_logprobs"].tolist() == [[0.0, -5.0], [-1.0, -2.0]]
    assert part["old_values"].tolist() == [[0.0, 50.0], [10.0, 20.0]]
    assert part["advantages"].tolist() == [[0.0, 500.0], [100.0, 200.0]]
    assert part["returns"].tolist() == [[0.0, 5000.0], [1000.0, 2000.0]]
    assert int(part["loss_denominator"]) == 6


def test_shorter_rows_of_a_micro_batch_are_padded_on_the_left() -> None:
    whole = experience(PROMPT_LENGTHS, RESPONSE_LENGTHS)
    part = whole.micro_batch(torch.tensor([0, 2]), torch.tensor(6))
    assert part["input_ids"].tolist() == [[0, 0, 0, 12, 21, 22], [211, 212, 213, 221, 222, 223]]
    assert part["attention_mask"].tolist() == [[False] * 3 + [True] * 3, [True] * 6]
    assert part["response_mask"].tolist() == [[False, True, True], [True, True, True]]


def test_the_longest_prompt_and_response_of_a_micro_batch_decide() -> None:
    whole = experience(PROMPT_LENGTHS, RESPONSE_LENGTHS)
    part = whole.micro_batch(torch.tensor([2]), torch.tensor(6))
    assert part["input_ids"].tolist() == [[211, 212, 213, 221, 222, 223]]
    assert part["advantages"].tolist() == [[900.0, 1000.0, 1100.0]]


def test_a_micro_batch_of_empty_responses_keeps_one_masked_column() -> None:
    part = experience([2, 1], [0, 0]).micro_batch(torch.tensor([0, 1]), torch.tensor(1))
    assert part["response_mask"].tolist() == [[False], [False]]
    assert part["attention_mask"].tolist() == [[True, True], [False, True]]
    assert part["advantages"].tolist() == [[0.0], [0.0]]


def test_the_shortest_micro_batch_still_has_a_column_to_predict_from() -> None:
    part = experience([1, 1], [0, 0]).micro_batch(torch.tensor([0]), torch.tensor(1))
    assert part["attention_mask"].tolist() == [[False, True]]
    assert part["response_mask"].tolist() == [[False]]


@NO_DEADLINE
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=3, max_size=3), st.data())
def test_a_micro_batch_loses_no_token(lengths: list[tuple[int, int]], data: st.DataObject) -> None:
    whole = experience([p for p, _ in lengths], [r for _, r in lengths])
    rows = data.draw(st.permutations(range(3))), data.draw(st.integers(1, 3))
    chosen = torch.tensor(rows[0][: rows[1]])
    part = whole.micro_batch(chosen, torch.tensor(1))
    width, num_response = part["input_ids"].shape[1], part["response_mask"].shape[1]
    longest = max(sum(lengths[row]) for row in chosen.tolist())
    assert width == max(2, longest), "a column of padding is left in front"
    for row, original in enumerate(chosen.tolist()):
        prompt, response = lengths[original]
        kept = part["input_ids"][row][part["attention_mask"][row]].tolist()
        start = NUM_PROMPT - prompt
        assert kept == INPUT_IDS[original, start : NUM_PROMPT + response].tolist()
        # Each row ends in the last column.
        tokens = [False] * (width - prompt - response) + [True] * (prompt + response)
        assert part["attention_mask"][row].tolist() == tokens
        of_response = [False] * (num_response - response) + [True] * response
        assert part["response_mask"][row].tolist() == of_response
        positions = part["response_positions"] - row * num_response
        inside = (positions >= 0) & (positions < num_response)
        assert positions[inside].tolist() == list(range(num_response - response, num_response))
        returns = part["returns"][row][part["response_mask"][row]].tolist()
        assert returns == whole.returns[original, :response].tolist()


@NO_DEADLINE
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=3, max_size=3), st.data())
def test_what_is_cut_is_written_back_where_it_was(
    lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    whole = experience([p for p, _ in lengths], [r for _, r in lengths])
    rows = data.draw(st.permutations(range(3))), data.draw(st.integers(1, 3))
    chosen = torch.tensor(rows[0][: rows[1]])
    aligned = RightAligned(
        chosen, whole.lengths, prompt_width=NUM_PROMPT, device=torch.device("cpu")
    )
    back = torch.full_like(whole.returns, -1.0)
    aligned.write_back(aligned.responses(whole.returns), back)
    for row in range(3):
        if row not in chosen.tolist():
            assert back[row].tolist() == [-1.0] * NUM_RESPONSE
            continue
        written = max(1, max(lengths[r][1] for r in chosen.tolist()))
        assert back[row, :written].tolist() == whole.returns[row, :written].tolist()


def test_parts_hold_every_row_once_and_similar_lengths_together() -> None:
    prompts, responses = torch.tensor([3, 1, 2, 1, 3]), torch.tensor([4, 1, 4, 3, 0])
    lengths = Lengths(prompts=prompts, responses=responses)
    # Together 7, 2, 6, 4, 3.
    assert [part.tolist() for part in lengths.parts(2)] == [[1, 4], [3, 2], [0]]
    chosen = torch.tensor([0, 2, 4])
    assert [part.tolist() for part in lengths.parts(2, chosen)] == [[4, 2], [0]]


@pytest.mark.parametrize("noun", [PromptBatch, Rollout, ScoredRollout, Experience])
def test_nouns_are_frozen_slotted_and_keyword_only(noun: type) -> None:
    assert noun.__dataclass_params__.frozen
    assert "__slots__" in vars(noun)
    assert all(field.kw_only for field in dataclasses.fields(noun))
