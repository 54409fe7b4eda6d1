"""Runs that are continued by another number of ranks, and saves that fail on one of several."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import rank_changes
from rank_changes import BATCH, STOP, UPDATES
from ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.timeout(600)]


class Outcomes:
    """What each run did, by rank; the folders of the first parts are copied before they go on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.whole = [rank_changes.train(root / "whole")]
        self.one = [rank_changes.train(root / "one", stop=STOP, audit=True)]
        shutil.copytree(root / "one", root / "one_to_two")
        on_two = run_on_ranks(rank_changes.on_two_ranks, root, deadline_s=240)
        self.two = [outcome["two"] for outcome in on_two]
        self.one_to_two = [outcome["one_to_two"] for outcome in on_two]
        self.errors = [outcome["errors"] for outcome in on_two]
        self.machines = [outcome["machines"] for outcome in on_two]
        for name in ("two_to_one", "two_to_one_again", "two_to_four"):
            shutil.copytree(root / "two", root / name)
        self.two_to_one = [rank_changes.resume(root / "two_to_one")]
        self.two_to_one_again = [rank_changes.resume(root / "two_to_one_again")]
        folder = root / "two_to_four"
        self.two_to_four = run_on_ranks(rank_changes.resume, folder, num_ranks=4, deadline_s=240)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(tmp_path_factory.mktemp("ranks"))


def prompts(outcome: list[dict[str, Any]]) -> list[str]:
    """What all ranks saw, in the order of the batches: rank r of n has the rows r, r + n, ..."""
    return [
        prompt for row in zip(*(own["prompts"] for own in outcome), strict=True) for prompt in row
    ]


CHANGES = [("one", "one_to_two"), ("two", "two_to_one"), ("two", "two_to_four")]


@pytest.mark.parametrize("first, second", CHANGES)
def test_no_prompt_is_lost_or_seen_twice(outcomes: Outcomes, first: str, second: str) -> None:
    whole = prompts(outcomes.whole)
    before, after = prompts(getattr(outcomes, first)), prompts(getattr(outcomes, second))
    assert len(before) == STOP // UPDATES * BATCH
    # Every iteration has the same prompts in the same order as in a run that was never stopped.
    assert before + after == whole
    assert len(set(whole[:64])) == 64  # an epoch


@pytest.mark.parametrize("first, second", CHANGES)
def test_every_rank_continues_from_the_same_state(
    outcomes: Outcomes, first: str, second: str
) -> None:
    saved = getattr(outcomes, first)[0]["at_end"]
    assert saved["global_step"] == STOP
    assert saved["kl_control"]
    assert saved["score_moments"]
    for own in getattr(outcomes, second):
        assert own["at_begin"] == saved
        assert own["at_end"]["global_step"] == 24
        assert own["at_end"] == getattr(outcomes, second)[0]["at_end"]


@pytest.mark.parametrize("first, second", CHANGES)
def test_the_manifest_of_other_ranks_is_verified(
    outcomes: Outcomes, first: str, second: str
) -> None:
    journal = (outcomes.root / second / "out" / "sync_audit.jsonl").read_text().splitlines()
    resumed = [line for line in map(json.loads, journal) if line["event"] == "resume"]
    assert [(line["step"], line["verified"]) for line in resumed] == [(STOP, True)]
    assert len(getattr(outcomes, second)) != len(getattr(outcomes, first))


def test_ranks_draw_differently_and_the_same_at_every_resume(outcomes: Outcomes) -> None:
    states = [own["random_state"] for own in outcomes.two_to_four + outcomes.one_to_two]
    assert len(set(states[:4])) == 4
    # The draws are those of seed, step and rank, whoever saved.
    assert states[4:] == states[:2]
    assert outcomes.two_to_one == outcomes.two_to_one_again


def test_a_save_that_fails_on_one_rank_fails_on_all(outcomes: Outcomes) -> None:
    for failure in outcomes.errors[0]:
        rank = int(failure[0])
        own, other = outcomes.errors[rank][failure], outcomes.errors[1 - rank][failure]
        assert "checkpoint-16 could not be saved: OSError: [Errno 28] No space left" in own
        assert other.startswith("Another process cannot read or write the checkpoint")
        # That run saved nothing before.
        assert own.endswith("Left: []")
        assert other.endswith("Left: []")


def test_machines_with_disks_of_their_own(outcomes: Outcomes) -> None:
    first, second = outcomes.machines
    assert first["random_state_files"] == ["rng_state_0.pth"]
    assert second["random_state_files"] == ["rng_state_1.pth"]
    # One of them was killed before its save had a name: both go on from the one before.
    assert first["resumed_at"] == second["resumed_at"] == 4
    # Without save_on_each_node only the first one has checkpoints.
    assert first["alone"] == ["checkpoint-4"]
    assert second["alone"] == ["_incomplete-checkpoint-4"]
    assert len(first["said"]) == 1
    assert first["said"][0].startswith("checkpoint-4 lacks rng_state_1.pth: the processes do not")
    assert second["said"] == []
