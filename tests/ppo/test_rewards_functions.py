"""Reward functions: their keywords, answers for some episodes or tokens only, and `async` ones."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import pytest
import torch
from trl.rewards import get_soft_overlong_punishment, think_format_reward

import tiny
from rollouts import CPU, rollout
from trl_sync.errors import RewardError
from trl_sync.ppo.advantage import place_rewards
from trl_sync.ppo.rewards import FunctionReward, evaluate, reward_source

# a = 3, b = 4, c = 5; [EOS] is 1. Responses "b c [EOS]", "" and "c".
THREE = rollout([[3], [3, 4], [5]], [[4, 5, 1], [], [5]], padding=9)


def source(function: Any, **options: Any) -> FunctionReward:
    return FunctionReward(function, tiny.tokenizer(), conversational=False, **options)


def combined(*functions: Any, weights: list[float] | None = None) -> Any:
    return reward_source(
        list(functions),
        tiny.tokenizer(),
        conversational=False,
        batch_size=4,
        device=CPU,
        weights=weights,
    )


# --- Keywords


def test_functions_get_the_token_ids_of_their_responses() -> None:
    def reward(completion_ids: list[list[int]]) -> list[float]:
        assert completion_ids == [[4, 5, 1], [], [5]]
        return [float(len(ids)) for ids in completion_ids]

    assert source(reward)(THREE).tolist() == [3.0, 0.0, 1.0]


def test_functions_get_the_state_of_the_trainer_as_it_is_when_they_are_called() -> None:
    steps = iter([7, 8])

    def reward(completions: list[str], trainer_state: int) -> list[float]:
        return [float(trainer_state)] * len(completions)

    built = source(reward, trainer_state=lambda: next(steps))
    assert built(THREE).tolist() == [7.0] * 3
    assert built(THREE).tolist() == [8.0] * 3


def test_functions_with_keywords_get_the_state_too() -> None:
    def reward(**keywords: Any) -> list[float]:
        assert set(keywords) == {"prompts", "completions", "completion_ids", "trainer_state"}
        return [0.0] * 3

    source(reward, trainer_state=lambda: "state")(THREE)


def test_trls_own_reward_functions_work_unchanged() -> None:
    punishment = get_soft_overlong_punishment(max_completion_len=3, soft_punish_cache=2)
    # Of 3, 0 and 1 tokens, of which 1 is free: (1 - 3) / 2, 0, 0.
    assert source(punishment)(THREE).tolist() == [-1.0, 0.0, 0.0]
    built = FunctionReward(think_format_reward, tiny.tokenizer(), conversational=True)
    assert built(THREE).tolist() == [0.0, 0.0, 0.0]


# --- None: not applicable


def test_none_leaves_an_episode_out_of_the_weighted_sum() -> None:
    def first(**_: Any) -> list[float | None]:
        return [1.0, None, 3.0]

    def second(**_: Any) -> list[float | None]:
        return [10.0, 20.0, None]

    reward = evaluate(combined(first, second, weights=[2.0, 0.5]), THREE)
    # 2 * 1 + 0.5 * 10, 0.5 * 20, 2 * 3
    assert reward.scores.tolist() == [7.0, 10.0, 6.0]
    torch.testing.assert_close(
        reward.by_source["first"], torch.tensor([1.0, torch.nan, 3.0]), equal_nan=True
    )
    torch.testing.assert_close(
        reward.by_source["second"], torch.tensor([10.0, 20.0, torch.nan]), equal_nan=True
    )


@pytest.mark.parametrize("several", [False, True])
def test_an_episode_to_which_no_function_applies_is_refused(several: bool) -> None:
    def reward(**_: Any) -> list[float | None]:
        return [1.0, None, 3.0]

    built = combined(reward, reward) if several else source(reward)
    with pytest.raises(RewardError, match="None for episode 1, whose prompt is 'prompt 1'"):
        evaluate(built, THREE)
    # What is printed beside completions shows that there is none.
    assert built(THREE).isnan().tolist() == [False, True, False]


def test_nan_is_not_none() -> None:
    def second(**_: Any) -> list[float]:
        return [1.0, 2.0, float("nan")]

    with pytest.raises(RewardError, match="second gave episode 2 the score nan"):
        evaluate(combined(ordinary, second), THREE)


# --- Rewards on tokens


def test_rewards_on_tokens_stand_on_their_tokens() -> None:
    def reward(**_: Any) -> list[list[float]]:
        return [[0.5, -1.0, 2.0], [], [4.0]]

    found = evaluate(source(reward), THREE)
    assert found.scores.tolist() == [1.5, 0.0, 4.0]
    assert found.token_rewards is not None
    rewards = place_rewards(
        found.scores, torch.zeros(3, 3), THREE.response_mask, 0.1, found.token_rewards
    )
    assert rewards.tolist() == [[0.5, -1.0, 2.0], [0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]


def test_the_rest_of_a_score_stands_on_the_last_token() -> None:
    def on_tokens(**_: Any) -> list[list[float] | None]:
        return [[0.5, -1.0, 2.0], [], None]

    def whole(**_: Any) -> list[float]:
        return [8.0, 16.0, 32.0]

    found = evaluate(combined(on_tokens, whole, weights=[2.0, 0.5]), THREE)
    # 2 * 1.5 + 0.5 * 8; the empty response has a score, but no token for it.
    assert found.scores.tolist() == [7.0, 8.0, 16.0]
    kl = torch.ones(3, 3).masked_fill(~THREE.response_mask, 0.0)
    rewards = place_rewards(found.scores, kl, THREE.response_mask, 0.25, found.token_rewards)
    # -0.25 on each token; 2 * (0.5, -1, 2) and 0.5 * 8 on the third; 0.5 * 32 on the only one.
    assert rewards.tolist() == [[0.75, -2.25, 7.75], [0.0, 0.0, 0.0], [15.75, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([[1.0, 2.0], [], [3.0]], r"\[1.0, 2.0\] for completion 0: .* \(here 3\)"),
        ([[1.0] * 3, 0.0, [3.0]], "returned 0.0 for completion 1"),
        ([[1.0] * 3, [], ["x"]], r"returned \['x'\] for completion 2"),
        ([0.0, [], 1.0], r"returned \[\] for completion 1: expected a number"),
        (torch.ones(3, 3), "for completion 1: .* for each of its tokens"),
    ],
)
def test_rewards_on_tokens_must_be_one_a_token(answer: Any, said: str) -> None:
    def reward(**_: Any) -> Any:
        return answer

    with pytest.raises(RewardError, match=said):
        source(reward)(THREE)


def test_rows_of_tensors_are_rewards_on_tokens_too() -> None:
    def reward(completion_ids: list[list[int]]) -> list[torch.Tensor]:
        return [torch.tensor(ids, dtype=torch.float64) for ids in completion_ids]

    assert source(reward)(THREE).tolist() == [10.0, 0.0, 5.0]


# --- Asynchronous functions


class Meeting:
    """Functions that end only after each of them has begun."""

    def __init__(self, number: int) -> None:
        self.loops: set[int] = set()
        self._number = number
        self._here = 0
        self._all_here: asyncio.Event | None = None

    async def wait(self) -> None:
        self._all_here = self._all_here or asyncio.Event()
        self.loops.add(id(asyncio.get_running_loop()))
        self._here += 1
        if self._here == self._number:
            self._all_here.set()
        await asyncio.wait_for(self._all_here.wait(), timeout=20)


class Asynchronous:
    """An object whose call is asynchronous."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting

    async def __call__(self, completions: list[str]) -> list[float]:
        await self._meeting.wait()
        return [float(len(text)) for text in completions]


async def constant(meeting: Meeting, value: float, completions: list[str]) -> list[float]:
    await meeting.wait()
    return [value] * len(completions)


def ordinary(**_: Any) -> list[float]:
    return [100.0, 200.0, 300.0]


def test_asynchronous_functions_run_concurrently_in_one_loop() -> None:
    meeting = Meeting(2)
    rewards = combined(partial(constant, meeting, 0.5), ordinary, Asynchronous(meeting))
    # "b c" has three characters.
    assert evaluate(rewards, THREE).scores.tolist() == [103.5, 200.5, 301.5]
    assert list(rewards.names) == ["partial", "ordinary", "Asynchronous"]
    assert len(meeting.loops) == 1


def test_the_loop_stays_the_same_for_clients_that_are_bound_to_it() -> None:
    meeting = Meeting(1)
    reward = source(partial(constant, meeting, 1.0))
    assert reward(THREE).tolist() == reward(THREE).tolist() == [1.0] * 3
    assert len(meeting.loops) == 1


def test_asynchronous_functions_work_where_a_loop_runs_already() -> None:
    async def notebook_cell() -> list[float]:
        return source(partial(constant, Meeting(1), 2.0))(THREE).tolist()

    assert asyncio.run(notebook_cell()) == [2.0] * 3


def test_a_function_that_returns_a_coroutine_is_awaited() -> None:
    def reward(completions: list[str]) -> Any:
        return constant(Meeting(1), 3.0, completions)

    assert source(reward)(THREE).tolist() == [3.0] * 3


def test_the_error_of_one_asynchronous_function_ends_the_others() -> None:
    cancelled = threading.Event()

    async def endless(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return []

    async def broken(**_: Any) -> list[float]:
        await asyncio.sleep(0.01)
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        combined(endless, broken)(THREE)
    assert cancelled.wait(timeout=20)


def test_wrong_answers_of_asynchronous_functions_are_refused() -> None:
    async def reward(**_: Any) -> list[float]:
        return [1.0]

    with pytest.raises(RewardError, match="reward returned 1 scores for 3 completions"):
        source(reward)(THREE)


# --- Several


def test_names_of_sources_are_made_distinct() -> None:
    def reward(**_: Any) -> list[float]:
        return [1.0, 2.0, 3.0]

    rewards = combined(reward, ordinary, reward)
    assert list(rewards.names) == ["reward", "ordinary", "reward_2"]
    assert list(evaluate(rewards, THREE).by_source) == ["reward", "ordinary", "reward_2"]


def test_one_source_is_itself_unless_it_is_weighted() -> None:
    assert isinstance(combined(ordinary), FunctionReward)
    weighted = evaluate(combined(ordinary, weights=[0.25]), THREE)
    assert weighted.scores.tolist() == [25.0, 50.0, 75.0]
    assert weighted.by_source == {}
