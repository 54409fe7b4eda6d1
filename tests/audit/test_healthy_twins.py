"""No alarm in at least 2,000 real optimizer steps of correct training on two processes."""

from __future__ import annotations

from typing import Any

import pytest

import healthy_twins
from ranks import run_on_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

STEPS = dict.fromkeys(healthy_twins.TWINS, 160)
# Warned about, each once: what was declared, what cannot move in 16 bits, buffers of other lengths.
WARNINGS = {
    "declared_reference_sync": ["frozen_changed"],
    "sixteen_bits": ["never_updated"],
    "buffers_that_follow_the_data": ["buffers_differ"],
}


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, dict[str, Any]]]:
    return run_on_ranks(healthy_twins.run_twins, STEPS, deadline_s=280)


@pytest.mark.parametrize("name", STEPS)
def test_twin_is_silent(outcomes: Any, name: str) -> None:
    for outcome in (rank[name] for rank in outcomes):
        assert outcome["desyncs"] == 0
        assert outcome["warnings"] == WARNINGS.get(name, [])
        every = 3 if name == "every_third_step" else 1
        assert outcome["audits"] == STEPS[name] // every + 2


def test_at_least_2000_real_steps(outcomes: Any) -> None:
    total = sum(outcome["steps"] for outcome in outcomes[0].values())
    print(f"\n{total} optimizer steps on two processes, no alarm")
    assert total >= 2000
