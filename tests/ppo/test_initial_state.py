"""All four roles start alike on every rank: shown by checksum, or repaired and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engines
import initial_states
import tiny

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.engines)])
def found(request: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    tiny.llama().save_pretrained(folder / "base")
    return engines.run_on_engine(
        request.param, initial_states.start_from, request.param, str(folder)
    )


def test_ranks_that_start_alike_are_left_alone(found: Any) -> None:
    states = {answer["healthy"]["state"] for answer in found}
    assert len(states) == 1
    assert not any(answer["healthy"]["said"] for answer in found)


@pytest.mark.parametrize("name", [name for name in initial_states.SPOILED if name != "healthy"])
def test_a_role_that_differs_gets_the_state_of_rank_0(found: Any, name: str) -> None:
    healthy = found[0]["healthy"]["state"]
    assert [answer[name]["state"] for answer in found] == [healthy, healthy]
    (said,) = found[0][name]["said"]
    assert initial_states.SPOILED[name][1] in said
    assert said.startswith("1 tensor(s) of")
    assert not found[1][name]["said"]  # once, not once a rank


def test_another_model_is_refused_on_every_rank(found: Any) -> None:
    for answer in found:
        assert "Ranks were given different models" in answer["other_model"]
        assert "rank 1" in answer["other_model"]
