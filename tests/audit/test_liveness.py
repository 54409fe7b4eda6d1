"""Who should have moved and did not, and who is excused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trl_sync.audit.liveness import UPDATES, Liveness, Motion, expected_motion


def parameter(
    value: float, gradient: float | None, dtype: torch.dtype = torch.float32
) -> nn.Parameter:
    made = nn.Parameter(torch.full((3,), value, dtype=dtype))
    made.grad = None if gradient is None else torch.full((3,), gradient, dtype=dtype)
    return made


@pytest.mark.parametrize(
    "value, gradient, rate, dtype, expected",
    [
        (1.0, 0.5, 1e-3, torch.float32, Motion.MOVE),
        (0.0, 1e-4, 1e-6, torch.float32, Motion.MOVE),  # at zero every step counts
        (1.0, 0.5, 0.0, torch.float32, Motion.NOTHING),  # warm-up
        (1.0, None, 1e-3, torch.float32, Motion.NOTHING),  # unused
        (1.0, 0.0, 1e-3, torch.float32, Motion.NOTHING),  # lora_A while lora_B is zero
        (1.0, 1e-7, 1e-3, torch.float32, Motion.NOTHING),  # below Adam's epsilon
        (1.0, 0.5, 1e-8, torch.float32, Motion.NOTHING),  # the end of a decay: under the rounding
        (1.0, 0.5, 1e-3, torch.bfloat16, Motion.UNDERFLOW),  # eps of bf16 is 7.8e-3
        (1.0, 0.5, 1e-1, torch.bfloat16, Motion.MOVE),
        (1.0, 0.0, 1e-3, torch.bfloat16, Motion.NOTHING),
    ],
)
def test_expected_motion(
    value: float, gradient: float | None, rate: float, dtype: torch.dtype, expected: Motion
) -> None:
    assert expected_motion(parameter(value, gradient, dtype), rate) is expected


def test_nothing_is_expected_of_an_empty_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = nn.Parameter(torch.empty(0, 4))
    empty.grad = torch.empty(0, 4)

    def asked(tensor: torch.Tensor) -> bool:
        raise AssertionError("a question that waits for the device")

    monkeypatch.setattr(torch.Tensor, "__bool__", asked)
    assert expected_motion(empty, 1e-3) is Motion.NOTHING


def run(
    liveness: Liveness, still: set[str], moving: Motion = Motion.MOVE
) -> tuple[list[str], list[str]]:
    names = ["a", "b", "c"]
    parameters = [parameter(1.0, 0.5) for _ in names]
    rates = {id(p): 1e-2 for p in parameters}
    expected = liveness.expect(names, parameters, lambda: rates)
    assert all(motion is Motion.MOVE for motion in expected.values())
    return liveness.observe(names, frozenset(still), expected)


def test_named_after_enough_updates_in_a_row() -> None:
    liveness = Liveness()
    # The first update makes it a suspect; only suspects' gradients are looked at.
    for _ in range(UPDATES):
        assert run(liveness, {"b"}) == ([], [])
    assert run(liveness, {"b"}) == (["b"], [])


def test_moving_once_clears_it() -> None:
    liveness = Liveness()
    for _ in range(UPDATES):
        run(liveness, {"b"})
    assert run(liveness, set()) == ([], [])
    assert run(liveness, {"b"}) == ([], [])


def test_nobody_is_suspected_without_reason() -> None:
    liveness = Liveness()

    def never() -> dict[int, float]:
        raise AssertionError("learning rates are read without a suspect")

    assert liveness.expect(["a"], [parameter(1.0, 0.5)], never) == {}


def test_a_copy_in_the_optimizer_gets_the_largest_rate() -> None:
    liveness = Liveness()
    liveness.observe(["a"], frozenset({"a"}), {})
    expected = liveness.expect(["a"], [parameter(1.0, 0.5)], lambda: {0: 1e-2, 1: 0.0})
    assert expected == {"a": Motion.MOVE}
