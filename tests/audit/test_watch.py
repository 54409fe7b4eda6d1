from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from ranks import free_port, launcher_environment
from trl_sync.audit.rank_state import MissingRanks, Phase
from trl_sync.audit.uncaught import name_missing_on_uncaught
from trl_sync.audit.watch import EXIT_CODE, ProgressWatch
from trl_sync.errors import ConfigError

SCRIPT = Path(__file__).with_name("watched_run.py")
ROOT = SCRIPT.parents[2]
TIMEOUT_S = 3.0
# Import, traceback and exit of a process on a machine whose cores are busy; a deaf survivor would
# wait for half an hour.
SLACK_S = 6.0


# The watch in its own process.


def watch_of(
    rank: int, store: HashStore, found: list[MissingRanks], **options: Any
) -> ProgressWatch:
    fields: dict[str, Any] = {"timeout_s": 1.0, "on_missing": found.append, **options}
    return ProgressWatch(rank=rank, world_size=2, store=store, name="watch", **fields)


def test_the_watch_reports_once_and_exits_though_the_report_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, codes = HashStore(), []
    exited = threading.Event()

    def exit_process(code: int) -> None:
        codes.append(code)
        exited.set()

    def on_missing(missing: MissingRanks) -> None:
        raise OSError("the journal's disk is full")

    watch = watch_of(0, store, [], on_missing=on_missing, exit_process=exit_process)
    watch.advance(1, Phase.COMPARING)
    watch.start()
    assert exited.wait(SLACK_S)
    watch.stop()
    assert codes == [EXIT_CODE]
    errors = capsys.readouterr().err
    assert "the journal's disk is full" in errors
    assert "Rank 1 is lagging" in errors


def test_two_watches_that_move_together_find_nothing() -> None:
    store, found = HashStore(), list[MissingRanks]()
    watches = [watch_of(rank, store, found) for rank in (0, 1)]
    for watch in watches:
        watch.start()
    for step in range(15):
        for watch in watches:
            watch.advance(step, Phase.STEP_BEGUN)
            time.sleep(0.1)
    started_s = time.monotonic()
    for watch in watches:
        watch.stop()
    assert time.monotonic() - started_s < 4
    assert found == []
    with pytest.raises(RuntimeError, match="make a new one"):
        watches[0].start()


def test_backward_passes_count_on_and_open_the_next_step() -> None:
    watch = watch_of(0, HashStore(), [])
    watch.advance(7, Phase.STEP_BEGUN)
    watch.count_backward()
    watch.count_backward()
    assert watch._state().position == (7, Phase.BACKWARD, 2)
    watch.advance(7, Phase.AFTER_UPDATE)
    watch.count_backward()
    assert watch._state().position == (8, Phase.BACKWARD, 1)


def test_pauses_nest_and_must_match() -> None:
    watch = watch_of(0, HashStore(), [])
    with watch.pause("evaluation"):
        with watch.pause("saving"):
            assert watch._state().paused == "saving"
        assert watch._state().paused == "evaluation"
    with pytest.raises(ZeroDivisionError), watch.pause("an evaluation that fails"):
        _ = 1 / 0
    assert watch._state().paused is None
    with pytest.raises(RuntimeError, match="expected a begin_pause"):
        watch.end_pause()


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="timeout_s=0"):
        watch_of(0, HashStore(), [], timeout_s=0.0)
    with pytest.raises(ConfigError, match=r"poll_s=0\.9"):
        watch_of(0, HashStore(), [], timeout_s=1.0, poll_s=0.9)


def test_without_a_process_group_the_error_says_what_to_do() -> None:
    watch = ProgressWatch(rank=0, world_size=2, timeout_s=1.0, on_missing=print)
    with pytest.raises(RuntimeError, match=r"start it after init_process_group"):
        watch.start()


def test_stop_puts_the_hook_for_uncaught_errors_back() -> None:
    before = sys.excepthook
    watch = watch_of(0, HashStore(), [])
    name_missing_on_uncaught(watch)
    assert sys.excepthook is not before
    watch.stop()
    assert sys.excepthook is before


def test_a_sigterm_during_the_explanation_comes_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    missing = MissingRanks(ranks=(1,), kind="dead", reason="gone", waited_s=0.0, states=())

    def find_missing() -> MissingRanks:
        os.kill(os.getpid(), signal.SIGTERM)
        return missing

    watch = watch_of(0, HashStore(), [], on_missing=lambda found: order.append("report"))
    monkeypatch.setattr(watch, "find_missing", find_missing)
    monkeypatch.setattr(sys, "excepthook", lambda *error: order.append("traceback"))
    before = signal.signal(signal.SIGTERM, lambda number, frame: order.append("sigterm"))
    try:
        name_missing_on_uncaught(watch)
        sys.excepthook(RuntimeError, RuntimeError("Connection closed by peer"), None)
    finally:
        watch.stop()
        signal.signal(signal.SIGTERM, before)
    assert order == ["traceback", "report", "sigterm"]


def test_a_forked_child_leaves_the_watch_alone() -> None:
    watch = watch_of(0, HashStore(), [], timeout_s=60.0)
    watch.start()
    child = os.fork()
    if child == 0:
        watch.stop()
        os._exit(0 if watch.find_missing() is None and watch._thread is not None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert watch._thread is not None
    assert watch._thread.is_alive()
    watch.stop()


# Real processes, real deaths.

FAULTS = [
    {"name": f"{fault} {place}", "fault": fault, "place": place, "step": 3, "ranks": [1]}
    for fault in ("kill", "delay")
    for place in ("before_backward", "in_step", "before_audit")
]
FAULTS += [
    {"name": "freeze", "fault": "freeze", "place": "in_step", "step": 3, "ranks": [1]},
    {"name": "freeze rank 0", "fault": "freeze", "place": "in_step", "step": 3, "ranks": [0]},
    {"name": "kill rank 0", "fault": "kill", "place": "in_step", "step": 3, "ranks": [0]},
    {"name": "raise", "fault": "raise", "place": "in_step", "step": 3, "ranks": [1]},
]
LAST_SEEN = {
    "before_backward": "last seen at step 3, begun, before its backward pass",
    "in_step": "last seen at step 3, about to update",
    "before_audit": "last seen at step 3, updated, not yet audited",
}
HEALTHY: list[dict[str, Any]] = [
    {"name": "slow", "fault": "slow"},
    {"name": "pause", "fault": "pause", "place": "in_step", "step": 3, "ranks": [0, 1]},
    {"name": "pause of one", "fault": "pause", "place": "in_step", "step": 3, "ranks": [1]},
    {"name": "one rank stops later", "end": "late"},
    {"name": "never stopped", "end": "never_stop"},
    {"name": "process group destroyed first", "end": "destroy_first"},
]
PLANS_AT_A_TIME = 4


class Ended:
    """What one rank's process left behind."""

    def __init__(self, directory: Path, name: str, rank: int, code: int, ended_s: float) -> None:
        self.code = code
        self.ended_s = ended_s
        self.errors = (directory / f"{name}.{rank}.err").read_text()
        self.output = (directory / f"{name}.{rank}.out").read_text()


Runs = dict[str, dict[int, Ended]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every plan's ranks after their end, by the plan's name: a few launches for all tests."""
    directory = tmp_path_factory.mktemp("watched")
    plans = [{"timeout_s": TIMEOUT_S, **plan} for plan in [*FAULTS, *HEALTHY]]
    for plan in plans:
        port = free_port()
        plan["environments"] = [launcher_environment(rank, 2, port) for rank in (0, 1)]
    answer = subprocess.run(
        [sys.executable, str(SCRIPT), "fork", str(directory), str(PLANS_AT_A_TIME)],
        input=json.dumps(plans),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    ended: Runs = {}
    for name, rank, code, ended_s in json.loads(answer.stdout):
        ended.setdefault(name, {})[rank] = Ended(directory, name, rank, code, ended_s)
    return ended


@pytest.mark.ranks
@pytest.mark.parametrize("plan", FAULTS, ids=lambda plan: plan["name"])
def test_every_surviving_rank_ends_and_names_the_missing_one(
    plan: dict[str, Any], runs: Runs
) -> None:
    ranks = runs[plan["name"]]
    (culprit,) = plan["ranks"]
    fault_s = float(ranks[culprit].output.split("fault at ")[1])
    # A process that was killed, was frozen or raised has nothing to say about itself.
    witnesses = {0, 1} if plan["fault"] == "delay" else {1 - culprit}
    assert all(ended.code != 0 for ended in ranks.values())
    for rank in witnesses:
        assert ranks[rank].errors.count(f"Rank {culprit} is ") == 1, ranks[rank].errors
        assert f"Rank {1 - culprit} is " not in ranks[rank].errors
        assert LAST_SEEN[plan["place"]] in ranks[rank].errors
        assert ranks[rank].code in (1, EXIT_CODE)
        assert ranks[rank].ended_s - fault_s < TIMEOUT_S + SLACK_S
    if plan["fault"] == "delay":
        # It slept on for longer than that: its own watch ended it.
        assert ranks[culprit].code == EXIT_CODE


@pytest.mark.ranks
@pytest.mark.parametrize("plan", HEALTHY, ids=lambda plan: plan["name"])
def test_a_healthy_run_ends_well_and_in_silence(plan: dict[str, Any], runs: Runs) -> None:
    ranks = runs[plan["name"]]
    assert {rank: ended.code for rank, ended in ranks.items()} == {0: 0, 1: 0}
    printed = [line for ended in ranks.values() for line in ended.errors.splitlines()]
    warning = (
        f"rank 1 paused for evaluation, and others have waited for longer than timeout_s="
        f"{TIMEOUT_S:g}."
    )
    assert printed == ([warning] if plan["name"] == "pause of one" else [])


@pytest.mark.ranks
@pytest.mark.parametrize("fault", ["kill", "delay"])
def test_the_missing_rank_is_named_under_torchrun(fault: str) -> None:
    plan = {"timeout_s": TIMEOUT_S, "fault": fault, "place": "in_step", "step": 3, "ranks": [1]}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [*launcher, "--master_port", str(free_port()), str(SCRIPT), json.dumps(plan)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode != 0
    assert "Rank 1 is " in ended.stderr
    assert LAST_SEEN["in_step"] in ended.stderr
    assert "Rank 0 is " not in ended.stderr
