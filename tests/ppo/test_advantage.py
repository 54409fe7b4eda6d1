from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from trl_sync.ppo.advantage import (
    explained_variance,
    generalized_advantages,
    kl_estimate,
    masked_mean_and_variance,
    place_rewards,
    whiten,
)

NO_DEADLINE = settings(deadline=None)  # the machine may be busy with other things
EXACT = {"rtol": 0.0, "atol": 0.0}
FP32 = {"rtol": 1e-6, "atol": 1e-6}  # a few fp32 roundings of numbers below 10
FP64 = {"rtol": 1e-12, "atol": 1e-12}  # a few dozen fp64 roundings of numbers below 100

# Rows of up to 6 tokens, empty ones and all-empty batches included; the last column may be unused.
batches = st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 2**32 - 1))


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.tensor([[column < length for column in range(width)] for length in lengths])


def draw(batch: tuple[list[int], int], count: int, *, width: int = 7) -> tuple[Tensor, ...]:
    """A mask and `count` fp64 tensors; masked positions hold values that no result may show."""
    lengths, seed = batch
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of(lengths, width)
    shape = (count, len(lengths), width)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return mask, *values.masked_fill(~mask, 1e6)


def in_two_processes(
    function: Callable[[int, Callable[[Tensor], Tensor]], object],
) -> list[object]:
    """`function(rank, reduce_sum)` on two threads whose reduce_sum really adds over both."""
    barrier = threading.Barrier(2, timeout=20)
    slots: list[Tensor] = [torch.empty(0)] * 2

    def run(rank: int) -> object:
        def reduce_sum(tensor: Tensor) -> Tensor:
            slots[rank] = tensor.clone()
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        return function(rank, reduce_sum)

    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in (0, 1)]]


# --- KL estimates


def test_kl_estimates_by_hand() -> None:
    policy = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 7.0, 7.0]])
    reference = torch.tensor([[-1.5, -1.0, -3.0], [-2.5, 9.0, 9.0]])
    mask = mask_of([3, 1], 3)
    # log r = reference - policy = [-0.5, 1, 0], [-2]
    k1 = [[0.5, -1.0, 0.0], [2.0, 0.0, 0.0]]
    k3 = [
        # e^-0.5 - 1 + 0.5 = 0.60653066 - 0.5; e - 1 - 1 = 2.71828183 - 2; 1 - 1 - 0
        [0.10653066, 0.71828183, 0.0],
        # e^-2 - 1 + 2 = 0.13533528 + 1
        [1.13533528, 0.0, 0.0],
    ]
    torch.testing.assert_close(kl_estimate(policy, reference, mask, "k1"), torch.tensor(k1))
    torch.testing.assert_close(kl_estimate(policy, reference, mask, "k3"), torch.tensor(k3), **FP32)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_estimate_is_unbiased(estimator: str) -> None:
    # Averaged over all tokens with the policy's probabilities, an estimate is the KL itself.
    policy, reference = [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]
    expected = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    probabilities = torch.tensor([policy], dtype=torch.float64)
    other = torch.tensor([reference], dtype=torch.float64)
    everything = torch.ones(1, 3, dtype=torch.bool)
    estimate = kl_estimate(probabilities.log(), other.log(), everything, estimator)
    assert float((estimate * probabilities).sum()) == pytest.approx(expected, abs=1e-12)


@NO_DEADLINE
@given(batches)
def test_k3_is_never_negative(batch: tuple[list[int], int]) -> None:
    mask, policy, reference = draw(batch, 2)
    assert (kl_estimate(policy, reference, mask, "k3") >= 0).all()


def test_k3_keeps_small_differences_in_fp32() -> None:
    # (r - 1) - log r of log r = 1e-3 is 5.0017e-7; computed as exp(x) - 1 in fp32 it would carry an
    # error of 6e-8, more than a tenth of it.
    policy = torch.tensor([[0.0]])
    reference = torch.tensor([[1e-3]])
    found = kl_estimate(policy, reference, torch.tensor([[True]]), "k3")
    # rtol: one fp32 rounding of 1e-3 is 6e-11, 1.2e-4 of the difference.
    torch.testing.assert_close(found, torch.tensor([[5.0016671e-7]]), rtol=3e-4, atol=0.0)


# --- Placing the rewards


def test_the_score_stands_on_the_last_real_token() -> None:
    scores = torch.tensor([10.0, 20.0, 30.0, -5.0])
    kl = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 6.0, 0.0]])
    rewards = place_rewards(scores, kl, mask_of([3, 1, 0, 2], 3), kl_coef=0.5)
    expected = [
        [-0.5, -1.0, 8.0],  # 10 - 0.5 * 4 on the last of three
        [18.5, 0.0, 0.0],  # 20 - 0.5 * 3 on the only one
        [0.0, 0.0, 0.0],  # an empty response has no token for its score
        [0.5, -8.0, 0.0],  # -5 - 0.5 * 6 on the second of two
    ]
    torch.testing.assert_close(rewards, torch.tensor(expected), **EXACT)


def test_placing_rewards_leaves_its_inputs_alone() -> None:
    scores, kl = torch.tensor([1.0]), torch.tensor([[2.0, 3.0]])
    place_rewards(scores, kl, mask_of([2], 2), kl_coef=1.0)
    assert scores.tolist() == [1.0]
    assert kl.tolist() == [[2.0, 3.0]]


@NO_DEADLINE
@given(batches, st.floats(0, 2))
def test_rewards_sum_to_score_minus_kl(batch: tuple[list[int], int], kl_coef: float) -> None:
    mask, kl, scores = draw(batch, 2)
    scores = scores[:, 0]
    rewards = place_rewards(scores, kl, mask, kl_coef)
    for row, length in enumerate(batch[0]):
        penalty = kl_coef * sum(kl[row, :length].tolist())
        expected = float(scores[row]) - penalty if length else 0.0
        assert float(rewards[row].sum()) == pytest.approx(expected, abs=1e-11)
    assert not rewards[~mask].any()


# --- Generalized advantage estimation

REWARDS = [[1.0, 2.0, 4.0], [3.0, 6.0, 99.0], [7.0, 99.0, 99.0], [99.0, 99.0, 99.0]]
VALUES = [[2.0, 4.0, 8.0], [1.0, 2.0, 99.0], [3.0, 99.0, 99.0], [99.0, 99.0, 99.0]]
LENGTHS = [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        # delta = 1 + 0.5*4 - 2, 2 + 0.5*8 - 4, 4 - 8 = 1, 2, -4
        # A2 = -4; A1 = 2 + 0.25 * -4 = 1; A0 = 1 + 0.25 * 1 = 1.25
        # second row: delta = 3 + 0.5*2 - 1, 6 - 2 = 3, 4; A0 = 3 + 0.25 * 4 = 4
        (0.5, 0.5, [[1.25, 1.0, -4.0], [4.0, 4.0, 0.0]]),
        # All that is to come, minus the value: 7 - 2, 6 - 4, 4 - 8; 9 - 1, 6 - 2
        (1.0, 1.0, [[5.0, 2.0, -4.0], [8.0, 4.0, 0.0]]),
        # One step: 1 + 4 - 2, 2 + 8 - 4, 4 - 8; 3 + 2 - 1, 6 - 2
        (1.0, 0.0, [[3.0, 6.0, -4.0], [4.0, 4.0, 0.0]]),
        # The present alone: r - V, whatever lambda is
        (0.0, 0.9, [[-1.0, -2.0, -4.0], [2.0, 4.0, 0.0]]),
        # delta = 1 + 2 - 2, 2 + 4 - 4, -4 = 1, 2, -4; A1 = 2 + 0.5 * -4 = 0; A0 = 1
        # second row: delta = 3 + 1 - 1, 4; A0 = 3 + 0.5 * 4 = 5
        (0.5, 1.0, [[1.0, 0.0, -4.0], [5.0, 4.0, 0.0]]),
    ],
)
def test_advantages_by_hand(gamma: float, lam: float, expected: list[list[float]]) -> None:
    # A response of one token: 7 - 3 = 4, whatever gamma and lambda are. An empty one has none.
    expected = [*expected, [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    mask = mask_of(LENGTHS, 3)
    advantages, returns = generalized_advantages(
        torch.tensor(REWARDS), torch.tensor(VALUES), mask, gamma=gamma, lam=lam
    )
    torch.testing.assert_close(advantages, torch.tensor(expected), **EXACT)
    # return = advantage + value where there is a token
    sums = [
        [a + v if column < length else 0.0 for column, (a, v) in enumerate(zip(*row, strict=True))]
        for row, length in zip(zip(expected, VALUES, strict=True), LENGTHS, strict=True)
    ]
    torch.testing.assert_close(returns, torch.tensor(sums), **EXACT)


def test_the_score_reaches_the_last_token_without_a_discount() -> None:
    # Score 8 on the last of three tokens, no values: lam^2 * 8, lam * 8, 8.
    mask = mask_of([3], 4)
    rewards = place_rewards(torch.tensor([8.0]), torch.zeros(1, 4), mask, kl_coef=0.0)
    advantages, _ = generalized_advantages(rewards, torch.zeros(1, 4), mask, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[2.0, 4.0, 8.0, 0.0]]


@NO_DEADLINE
@given(batches, st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_discounted_sums_of_deltas(
    batch: tuple[list[int], int], gamma: float, lam: float
) -> None:
    mask, rewards, values = draw(batch, 2)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(batch[0]):
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-11)
            assert float(returns[row, t]) == pytest.approx(expected + v[t], abs=1e-11)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@NO_DEADLINE
@given(batches)
def test_each_row_has_its_own_advantages(batch: tuple[list[int], int]) -> None:
    mask, rewards, values = draw(batch, 2)
    together, _ = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.8)
    for row in range(len(mask)):
        one = slice(row, row + 1)
        alone, _ = generalized_advantages(rewards[one], values[one], mask[one], gamma=0.9, lam=0.8)
        torch.testing.assert_close(alone, together[one], **EXACT)


@NO_DEADLINE
@given(batches, st.randoms(use_true_random=False))
def test_permuted_rows_give_permuted_experience(
    batch: tuple[list[int], int], random: object
) -> None:
    mask, policy, reference, values, scores = draw(batch, 4)
    order = list(range(len(mask)))
    random.shuffle(order)

    def experience(rows: list[int]) -> Tensor:
        kl = kl_estimate(policy[rows], reference[rows], mask[rows], "k1")
        rewards = place_rewards(scores[rows, 0], kl, mask[rows], 0.1)
        advantages, _ = generalized_advantages(
            rewards, values[rows], mask[rows], gamma=1.0, lam=0.95
        )
        return whiten(advantages, mask[rows])

    straight = experience(list(range(len(mask))))
    torch.testing.assert_close(experience(order), straight[order], **FP64)


# --- Moments and whitening

# Counted: 1, 2, 3, 6. Mean 12 / 4 = 3; squares 4 + 1 + 0 + 9 = 14; unbiased variance 14 / 3.
FOUR = torch.tensor([[1.0, 2.0, 3.0], [6.0, 50.0, 50.0]])
FOUR_MASK = mask_of([3, 1], 3)


def test_mean_and_variance_by_hand() -> None:
    mean, variance = masked_mean_and_variance(FOUR, FOUR_MASK)
    assert float(mean) == 3.0
    assert float(variance) == pytest.approx(14 / 3, abs=1e-15)
    assert mean.dtype == variance.dtype == torch.float64


@pytest.mark.parametrize(("lengths", "mean"), [([0, 0], 0.0), ([0, 1], 6.0)])
def test_no_token_and_one_token_have_no_variance(lengths: list[int], mean: float) -> None:
    found = masked_mean_and_variance(FOUR, mask_of(lengths, 3))
    assert [float(value) for value in found] == [mean, 0.0]
    whitened = whiten(FOUR, mask_of(lengths, 3))
    assert whitened.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_variance_of_large_numbers_that_hardly_differ() -> None:
    # 10^6 and 10^6 + 1, 500 of each: fp32 rounds their sum to a multiple of 64, which moves the
    # mean.
    values = torch.tensor([[1e6, 1e6 + 1]]).repeat(1, 500)
    mean, variance = masked_mean_and_variance(values, mask_of([1000], 1000))
    assert float(mean) == 1e6 + 0.5
    assert float(variance) == pytest.approx(0.25 * 1000 / 999, abs=1e-15)


@pytest.mark.parametrize(("shift_mean", "added_back"), [(True, 0.0), (False, 3.0)])
def test_whitening_by_hand(shift_mean: bool, added_back: float) -> None:
    # (x - 3) / sqrt(14 / 3) = (x - 3) / 2.16024690
    z = [-0.92582010, -0.46291005, 0.0, 1.38873015]
    expected = [[z[0] + added_back, z[1] + added_back, z[2] + added_back]]
    expected.append([z[3] + added_back, 0.0, 0.0])
    found = whiten(FOUR, FOUR_MASK, shift_mean=shift_mean)
    torch.testing.assert_close(found, torch.tensor(expected), **FP32)
    assert found.dtype == torch.float32


@NO_DEADLINE
@given(batches)
def test_moments_against_plain_python(batch: tuple[list[int], int]) -> None:
    mask, values = draw(batch, 1)
    numbers = [values[r, c].item() for r, length in enumerate(batch[0]) for c in range(length)]
    mean, variance = masked_mean_and_variance(values, mask)
    expected_mean = math.fsum(numbers) / len(numbers) if numbers else 0.0
    squares = math.fsum((x - expected_mean) ** 2 for x in numbers)
    expected = squares / (len(numbers) - 1) if len(numbers) > 1 else 0.0
    assert float(mean) == pytest.approx(expected_mean, abs=1e-12)
    assert float(variance) == pytest.approx(expected, abs=1e-12)


@NO_DEADLINE
@given(batches, st.booleans())
def test_whitened_values_are_finite_and_masked(
    batch: tuple[list[int], int], shift_mean: bool
) -> None:
    mask, values = draw(batch, 1)
    whitened = whiten(values, mask, shift_mean=shift_mean)
    assert whitened.isfinite().all()
    assert not whitened[~mask].any()
    if mask.sum() > 1:
        mean, variance = masked_mean_and_variance(values, mask)
        counted = whitened[mask]
        expected = 0.0 if shift_mean else float(mean)
        assert float(counted.mean()) == pytest.approx(expected, abs=1e-9)
        # 1e-8 under the root: the variance falls short of 1 by 1e-8 / variance.
        assert float(counted.var()) == pytest.approx(1.0, abs=2e-8 / float(variance) + 1e-9)


@NO_DEADLINE
@given(batches, st.booleans())
def test_two_processes_whiten_as_one(batch: tuple[list[int], int], shift_mean: bool) -> None:
    mask, values = draw(batch, 1)
    whole = whiten(values, mask, shift_mean=shift_mean)
    # Round robin; with one row the second process has only an empty response.
    masks = [mask[0::2], mask[1::2] if len(mask) > 1 else torch.zeros_like(mask)]
    parts = [values[0::2], values[1::2] if len(mask) > 1 else values]
    halves = in_two_processes(
        lambda rank, reduce_sum: whiten(
            parts[rank], masks[rank], shift_mean=shift_mean, reduce_sum=reduce_sum
        )
    )
    torch.testing.assert_close(halves[0], whole[0::2], **FP64)
    if len(mask) > 1:
        torch.testing.assert_close(halves[1], whole[1::2], **FP64)


# --- Explained variance

RETURNS = FOUR  # variance 14 / 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # errors -1, 0, 0, 1: mean 0, variance 2 / 3; 1 - (2/3) / (14/3) = 6 / 7
        ([[2.0, 2.0, 3.0], [5.0, 0.0, 0.0]], 6 / 7),
        ([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]], 1.0),  # perfect
        ([[9.0, 9.0, 9.0], [9.0, 0.0, 0.0]], 0.0),  # constant: explains nothing
        ([[-1.0, -2.0, -3.0], [-6.0, 0.0, 0.0]], -3.0),  # errors 2 x: 1 - 4
    ],
)
def test_explained_variance_by_hand(values: list[list[float]], expected: float) -> None:
    found = explained_variance(torch.tensor(values), RETURNS, FOUR_MASK)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("lengths", [[2, 1], [1, 0], [0, 0]])
def test_explained_variance_of_returns_that_do_not_vary(lengths: list[int]) -> None:
    returns = torch.full((2, 2), 5.0)
    found = explained_variance(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), returns, mask_of(lengths, 2))
    assert found == 0.0


def test_explained_variance_over_two_processes() -> None:
    values = torch.tensor([[2.0, 2.0, 3.0], [5.0, 0.0, 0.0]])
    found = in_two_processes(
        lambda rank, reduce_sum: explained_variance(
            values[rank : rank + 1],
            RETURNS[rank : rank + 1],
            FOUR_MASK[rank : rank + 1],
            reduce_sum,
        )
    )
    assert found == [pytest.approx(6 / 7, abs=1e-12)] * 2  # as by hand above


# --- TRL 1.12.0


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(5))
def test_moments_and_whitening_equal_trl(seed: int) -> None:
    masked_mean, masked_var, masked_whiten = oracle.functions(
        "experimental/ppo/ppo_trainer.py",
        *("masked_mean", "masked_var", "masked_whiten"),
        torch=torch,
    )
    mask, values = draw(([3, 7, 0, 1, 5], seed), 1)
    values = values.masked_fill(~mask, 0.0)  # TRL multiplies by the mask
    mean, variance = masked_mean_and_variance(values, mask)
    torch.testing.assert_close(mean, masked_mean(values, mask), **FP64)
    # TRL divides the integers of n / (n - 1) in fp32, which rounds by 6e-8.
    rounded = {"rtol": 1.2e-7, "atol": 1.2e-7}
    torch.testing.assert_close(variance, masked_var(values, mask), **rounded)
    for shift_mean in (True, False):
        theirs = masked_whiten(values, mask, shift_mean=shift_mean).masked_fill(~mask, 0.0)
        torch.testing.assert_close(whiten(values, mask, shift_mean=shift_mean), theirs, **rounded)
