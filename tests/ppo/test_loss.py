from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from trl_sync.ppo.loss import mean_ratio, policy_loss, ppo_loss, value_loss

NO_DEADLINE = settings(deadline=None)  # the machine may be busy with other things
FP64 = {"rtol": 1e-12, "atol": 1e-12}  # a few dozen fp64 roundings of numbers below 100
CLIP = 0.2
TEN = torch.tensor(10)

batches = st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 2**32 - 1))


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.tensor([[column < length for column in range(width)] for length in lengths])


def draw(batch: tuple[list[int], int], count: int) -> tuple[Tensor, ...]:
    """A mask and `count` fp64 tensors; masked positions hold values that no result may show."""
    lengths, seed = batch
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of(lengths, 7)
    values = torch.randn(count, len(lengths), 7, generator=generator, dtype=torch.float64)
    return mask, *(0.3 * values).masked_fill(~mask, 1e3)


def row(numbers: list[float]) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


# One token a column, then one that is masked.
# ratio r, advantage A      -A r   -A clip(r)   larger       d loss / d log pi = -A r, 0 if clipped
# 1.5,  2                   -3.0   -2.4         -2.4 clipped   0
# 0.5,  2                   -1.0   -1.6         -1.0           -1.0
# 1.5, -2                    3.0    2.4          3.0            3.0
# 0.5, -2                    1.0    1.6          1.6 clipped   0
# 1.1,  2                   -2.2   -2.2         -2.2           -2.2
# sum                                           -1.0
RATIOS = [1.5, 0.5, 1.5, 0.5, 1.1]
ADVANTAGES = row([2.0, 2.0, -2.0, -2.0, 2.0, 9.0])
POLICY_GRADIENT = row([0.0, -0.1, 0.3, 0.0, -0.22, 0.0])  # divided by 10
OLD_LOGPROBS = row([-1.0, -2.0, -3.0, -4.0, -5.0, 0.0])
FIRST_FIVE = mask_of([5], 6)


def hand_logprobs() -> Tensor:
    logs = row([*(math.log(ratio) for ratio in RATIOS), 5.0])
    return (OLD_LOGPROBS + logs).requires_grad_()


def test_policy_loss_by_hand() -> None:
    logprobs = hand_logprobs()
    loss, statistics = policy_loss(
        logprobs, OLD_LOGPROBS, ADVANTAGES, FIRST_FIVE, cliprange=CLIP, denominator=TEN
    )
    loss.backward()
    assert loss.item() == pytest.approx(-0.1, abs=1e-12)
    torch.testing.assert_close(logprobs.grad, POLICY_GRADIENT, **FP64)
    assert {name: float(value) for name, value in statistics.items()} == pytest.approx(
        {
            "policy_loss": -1.0,
            "policy_clipped": 2,
            "tokens": 5,
            "ratio": 5.1,  # 1.5 + 0.5 + 1.5 + 0.5 + 1.1
            "squared_ratio": 6.21,  # 2.25 + 0.25 + 2.25 + 0.25 + 1.21
            # half the squared logs of 1.5, 0.5, 1.5, 0.5 and 1.1:
            # (0.16440195 + 0.48045301 + 0.16440195 + 0.48045301 + 0.00908403) / 2
            "approx_kl": 0.64939698,
        },
        abs=1e-7,  # the logarithms above have eight digits
    )


def test_statistics_carry_no_gradient() -> None:
    logprobs = hand_logprobs()
    _, of_policy = policy_loss(
        logprobs, OLD_LOGPROBS, ADVANTAGES, FIRST_FIVE, cliprange=CLIP, denominator=TEN
    )
    _, of_value = value_loss(
        logprobs, OLD_LOGPROBS, ADVANTAGES, FIRST_FIVE, cliprange_value=CLIP, denominator=TEN
    )
    assert not any(value.requires_grad for value in (of_policy | of_value).values())


def test_before_the_first_update_the_gradient_is_that_of_policy_gradient() -> None:
    # Ratio 1: the loss is -mean(A), its gradient -A / denominator, nothing is clipped.
    logprobs = OLD_LOGPROBS.clone().requires_grad_()
    loss, statistics = policy_loss(
        logprobs, OLD_LOGPROBS, ADVANTAGES, FIRST_FIVE, cliprange=CLIP, denominator=TEN
    )
    loss.backward()
    assert loss.item() == pytest.approx(-0.2, abs=1e-12)  # -(2 + 2 - 2 - 2 + 2) / 10
    torch.testing.assert_close(logprobs.grad, row([-0.2, -0.2, 0.2, 0.2, -0.2, 0.0]), **FP64)
    assert float(statistics["approx_kl"]) == 0.0
    assert int(statistics["policy_clipped"]) == 0


# Old value 1, so values clip to 0.8 .. 1.2.
# V, return     (V - G)^2   (clip - G)^2   larger          d loss / d V = V - G, 0 if clipped
# 1.5, 2        0.25        0.64           0.64 clipped    0
# 1.5, 1        0.25        0.04           0.25            0.5
# 0.5, 0        0.25        0.64           0.64 clipped    0
# 0.5, 1        0.25        0.04           0.25            -0.5
# 1.1, 1        0.01        0.01           0.01            0.1
# half the sum                             0.895
NEW_VALUES = row([1.5, 1.5, 0.5, 0.5, 1.1, 44.0])
OLD_VALUES = row([1.0, 1.0, 1.0, 1.0, 1.0, -8.0])
RETURNS = row([2.0, 1.0, 0.0, 1.0, 1.0, 3.0])
VALUE_GRADIENT = row([0.0, 0.05, 0.0, -0.05, 0.01, 0.0])  # divided by 10


def test_value_loss_by_hand() -> None:
    values = NEW_VALUES.clone().requires_grad_()
    loss, statistics = value_loss(
        values, OLD_VALUES, RETURNS, FIRST_FIVE, cliprange_value=CLIP, denominator=TEN
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.0895, abs=1e-12)
    torch.testing.assert_close(values.grad, VALUE_GRADIENT, **FP64)
    assert float(statistics["value_loss"]) == pytest.approx(0.895, abs=1e-12)
    assert int(statistics["value_clipped"]) == 2
    assert set(statistics) == {"value_loss", "value_clipped"}


@pytest.mark.parametrize(
    ("column", "policy_clipped", "value_clipped"),
    [(0, 1, 1), (1, 0, 0), (2, 0, 1), (3, 1, 0), (4, 0, 0), (5, 0, 0)],  # as marked in the tables
)
def test_the_clipped_tokens_are_those_whose_clipped_term_counts(
    column: int, policy_clipped: int, value_clipped: int
) -> None:
    one = slice(column, column + 1)
    mask = FIRST_FIVE[:, one]
    _, of_policy = policy_loss(
        *(hand_logprobs()[:, one], OLD_LOGPROBS[:, one], ADVANTAGES[:, one], mask),
        cliprange=CLIP,
        denominator=TEN,
    )
    _, of_value = value_loss(
        *(NEW_VALUES[:, one], OLD_VALUES[:, one], RETURNS[:, one], mask),
        cliprange_value=CLIP,
        denominator=TEN,
    )
    assert int(of_policy["policy_clipped"]) == policy_clipped
    assert int(of_value["value_clipped"]) == value_clipped


Loss = Callable[[Tensor], Tensor]


def of_policy(others: tuple[Tensor, Tensor], mask: Tensor, denominator: Tensor) -> Loss:
    return lambda new: policy_loss(new, *others, mask, cliprange=CLIP, denominator=denominator)[0]


def of_value(others: tuple[Tensor, Tensor], mask: Tensor, denominator: Tensor) -> Loss:
    return lambda new: value_loss(
        new, *others, mask, cliprange_value=CLIP, denominator=denominator
    )[0]


LOSSES = pytest.mark.parametrize("kind", [of_policy, of_value])


@LOSSES
def test_gradients_equal_finite_differences(kind: Callable[..., Loss]) -> None:
    # 28 tokens, some clipped; a step of 1e-6 stays on one side of every kink.
    mask, *tensors = draw(([7, 6, 0, 1, 7], 3), 3)
    new, *others = (tensor.masked_fill(~mask, 0.0) for tensor in tensors)
    new.requires_grad_()
    loss = kind(others, mask, torch.tensor(21))
    (gradient,) = torch.autograd.grad(loss(new), new)
    step = 1e-6
    zeros = 0
    for position in torch.cartesian_prod(*(torch.arange(size) for size in new.shape)).tolist():
        moved = torch.zeros_like(new)
        moved[tuple(position)] = step
        with torch.no_grad():
            slope = float(loss(new + moved) - loss(new - moved)) / (2 * step)
        # Central differences: step^2 times a third derivative below 1, and 1e-16 / step rounding.
        assert float(gradient[tuple(position)]) == pytest.approx(slope, abs=1e-9)
        zeros += slope == 0.0
    masked = int((~mask).sum())
    assert masked < zeros < new.numel(), "some tokens must be clipped and some must not"


def slow_policy_sum(rows: list[tuple[float, float, float]]) -> float:
    total = 0.0
    for new, old, advantage in rows:
        ratio = math.exp(new - old)
        limit = min(max(ratio, 1 - CLIP), 1 + CLIP)
        # The pessimistic one of two objectives, to be maximised.
        total -= min(advantage * ratio, advantage * limit)
    return total


def slow_value_sum(rows: list[tuple[float, float, float]]) -> float:
    total = 0.0
    for new, old, target in rows:
        near = min(max(new, old - CLIP), old + CLIP)
        total += max((new - target) ** 2, (near - target) ** 2) / 2
    return total


@NO_DEADLINE
@given(batches)
def test_losses_against_plain_python(batch: tuple[list[int], int]) -> None:
    mask, new, old, third = draw(batch, 3)
    tokens = [
        (new[r, c].item(), old[r, c].item(), third[r, c].item())
        for r, length in enumerate(batch[0])
        for c in range(length)
    ]
    one = torch.tensor(1)
    found = float(of_policy((old, third), mask, one)(new))
    assert found == pytest.approx(slow_policy_sum(tokens), abs=1e-11)
    found = float(of_value((old, third), mask, one)(new))
    assert found == pytest.approx(slow_value_sum(tokens), abs=1e-11)


@NO_DEADLINE
@given(batches, st.lists(st.integers(1, 6), max_size=5))
def test_losses_and_statistics_add_up_over_micro_batches(
    batch: tuple[list[int], int], cuts: list[int]
) -> None:
    mask, new, old, third = draw(batch, 3)
    denominator = mask.sum().clamp(min=1)
    rows = list(range(len(mask)))
    bounds = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})

    def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        first, of_first = policy_loss(
            *(new[part], old[part], third[part], mask[part]),
            cliprange=CLIP,
            denominator=denominator,
        )
        second, of_second = value_loss(
            *(new[part], old[part], third[part], mask[part]),
            cliprange_value=CLIP,
            denominator=denominator,
        )
        return torch.stack([first, second]), of_first | of_second

    whole, statistics = losses(slice(None))
    parts = [losses(slice(a, b)) for a, b in pairwise(bounds)]
    torch.testing.assert_close(sum(part for part, _ in parts), whole, **FP64)
    for name, total in statistics.items():
        summed = sum(part[name] for _, part in parts)
        torch.testing.assert_close(summed, total, **FP64)


@LOSSES
@pytest.mark.parametrize("filler", [0.0, 1e30, float("inf"), float("nan")])
def test_masked_positions_never_reach_the_loss(kind: Callable[..., Loss], filler: float) -> None:
    mask, *tensors = draw(([3, 0, 7], 1), 3)
    clean = [tensor.masked_fill(~mask, 0.0) for tensor in tensors]
    dirty = [tensor.masked_fill(~mask, filler) for tensor in tensors]
    gradients = []
    values = []
    for new, *others in (clean, dirty):
        new.requires_grad_()
        loss = kind(others, mask, torch.tensor(10))(new)
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, new)[0])
    assert values[0] == values[1]
    torch.testing.assert_close(gradients[0], gradients[1].masked_fill(~mask, 0.0))
    if math.isfinite(filler):
        assert not gradients[1][~mask].any()


def test_a_batch_of_empty_responses_has_loss_and_gradient_zero() -> None:
    mask, new, old, third = draw(([0, 0], 0), 3)
    new.requires_grad_()
    one = torch.tensor(1)  # what the loader divides by when there is no token
    for loss in (of_policy((old, third), mask, one), of_value((old, third), mask, one)):
        value = loss(new)
        (gradient,) = torch.autograd.grad(value, new)
        assert value.item() == 0.0
        assert not gradient.any()


# --- Options


def test_clip_higher_by_hand() -> None:
    # Clip range 0.8 .. 1.4 instead of 0.8 .. 1.2:
    # ratio r, advantage A      -A r   -A clip(r)   larger
    # 1.5,  2                   -3.0   -2.8         -2.8 clipped
    # 0.5,  2                   -1.0   -1.6         -1.0
    # 1.5, -2                    3.0    2.8          3.0
    # 0.5, -2                    1.0    1.6          1.6 clipped
    # 1.1,  2                   -2.2   -2.2         -2.2
    # sum                                           -1.4
    loss, statistics = policy_loss(
        hand_logprobs(),
        OLD_LOGPROBS,
        ADVANTAGES,
        FIRST_FIVE,
        cliprange=CLIP,
        cliprange_high=0.4,
        denominator=TEN,
    )
    assert loss.item() == pytest.approx(-0.14, abs=1e-12)
    assert int(statistics["policy_clipped"]) == 2


@pytest.mark.parametrize(("ratio", "moves"), [(1.3, True), (1.5, False), (0.7, True)])
def test_clip_higher_moves_the_upper_edge_alone(ratio: float, moves: bool) -> None:
    # A good token with ratio 1.3 still gets a gradient; with equal ranges it would not.
    one = mask_of([1], 1)
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    arguments = (logprobs, torch.zeros_like(logprobs), torch.ones_like(logprobs), one)
    policy_loss(*arguments, cliprange=0.2, cliprange_high=0.4, denominator=TEN)[0].backward()
    assert (float(logprobs.grad) != 0) is moves
    # A bad token is clipped below 0.8 as before.
    logprobs.grad = None
    bad = (logprobs, torch.zeros_like(logprobs), -torch.ones_like(logprobs), one)
    policy_loss(*bad, cliprange=0.2, cliprange_high=0.4, denominator=TEN)[0].backward()
    assert (float(logprobs.grad) != 0) is (ratio > 0.8)


def hand_micro_batch() -> dict[str, Tensor]:
    return {
        "response_mask": FIRST_FIVE,
        "old_logprobs": OLD_LOGPROBS,
        "advantages": ADVANTAGES,
        "old_values": OLD_VALUES,
        "returns": RETURNS,
        "loss_denominator": TEN,
    }


def hand_ppo_loss(
    folder: Path, logprobs: Tensor, policy_learns: bool = True, **changes: Any
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, statistics and the gradient of the values; that of `logprobs` is in `.grad`."""
    values = NEW_VALUES.clone().requires_grad_()
    loss, statistics = ppo_loss(
        logprobs,
        values,
        hand_micro_batch(),
        tiny.config(folder, vf_coef=0.1, **changes),
        policy_learns=policy_learns,
    )
    loss.backward()
    return loss, statistics, values.grad


def test_the_whole_loss_by_hand(tmp_path: Path) -> None:
    logprobs = hand_logprobs()
    loss, statistics, of_values = hand_ppo_loss(tmp_path, logprobs)
    assert loss.item() == pytest.approx(-0.1 + 0.1 * 0.0895, abs=1e-12)
    torch.testing.assert_close(logprobs.grad, POLICY_GRADIENT, **FP64)
    torch.testing.assert_close(of_values, 0.1 * VALUE_GRADIENT, **FP64)
    assert "skipped_micro_batches" not in statistics


def test_the_mean_ratio_by_hand() -> None:
    assert mean_ratio(hand_logprobs(), OLD_LOGPROBS, FIRST_FIVE).item() == pytest.approx(5.1 / 5)
    assert mean_ratio(hand_logprobs(), OLD_LOGPROBS, mask_of([0], 6)).item() == 0


@pytest.mark.parametrize(("threshold", "skipped"), [(1.0199, True), (1.0201, False)])
def test_a_micro_batch_above_the_ratio_threshold_has_no_gradient(
    tmp_path: Path, threshold: float, skipped: bool
) -> None:
    # The mean ratio is 5.1 / 5 = 1.02.
    logprobs = hand_logprobs()
    loss, statistics, of_values = hand_ppo_loss(tmp_path, logprobs, ratio_threshold=threshold)
    assert int(statistics["skipped_micro_batches"]) == skipped
    assert float(statistics["ratio"]) == pytest.approx(5.1)
    if skipped:
        assert loss.item() == 0
        assert float(statistics["policy_loss"]) == float(statistics["value_loss"]) == 0
        assert not logprobs.grad.any()
        assert not of_values.any()
    else:
        torch.testing.assert_close(logprobs.grad, POLICY_GRADIENT, **FP64)
        torch.testing.assert_close(of_values, 0.1 * VALUE_GRADIENT, **FP64)


def test_an_infinite_ratio_leaves_a_zero_gradient(tmp_path: Path) -> None:
    logprobs = (OLD_LOGPROBS + row([0.0, 800.0, 0.0, 0.0, 0.0, 0.0])).requires_grad_()
    assert logprobs.exp().isinf().any()
    loss, statistics, of_values = hand_ppo_loss(tmp_path, logprobs, ratio_threshold=10.0)
    assert loss.item() == 0
    assert torch.equal(logprobs.grad, torch.zeros_like(logprobs))
    assert torch.equal(of_values, torch.zeros_like(of_values))
    assert float(statistics["ratio"]) == math.inf
    # The twin without the threshold would break every parameter.
    without = (OLD_LOGPROBS + row([0.0, 800.0, 0.0, 0.0, 0.0, 0.0])).requires_grad_()
    bad = -ADVANTAGES.abs()
    policy_loss(without, OLD_LOGPROBS, bad, FIRST_FIVE, cliprange=CLIP, denominator=TEN)[
        0
    ].backward()
    assert not without.grad.isfinite().all()


def test_while_only_the_value_model_learns_the_policys_gradient_is_zero_not_absent(
    tmp_path: Path,
) -> None:
    logprobs = hand_logprobs()
    loss, statistics, of_values = hand_ppo_loss(tmp_path, logprobs, policy_learns=False)
    assert loss.item() == pytest.approx(-0.1 + 0.1 * 0.0895, abs=1e-12)  # measured all the same
    assert torch.equal(logprobs.grad, torch.zeros_like(logprobs))
    torch.testing.assert_close(of_values, 0.1 * VALUE_GRADIENT, **FP64)
    assert float(statistics["policy_loss"]) == pytest.approx(-1.0)
