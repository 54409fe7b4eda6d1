"""What trackers get from the audit: its figures with every log line, its events when found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trainer_runs
from tracked_audit import train_broken
from trl_sync import AuditConfig, SyncAuditCallback
from trl_sync.audit.compare import Comparison
from trl_sync.audit.findings import Cause, Finding, SyncReport
from trl_sync.audit.journal import JOURNAL_NAME, read_journal
from trl_sync.audit.rank_state import MissingRanks
from trl_sync.audit.reaction import Reaction

FIGURES = {f"audit/{name}" for name in ("audits", "desyncs", "seconds", "share_of_step")}


def audit_run(output_dir: Path) -> EventAccumulator:
    """TensorBoard's run of the audit, which lies beside the training's."""
    folders = sorted((output_dir / "runs").iterdir())
    [training, audit] = sorted(folders, key=lambda folder: folder.name.endswith("_sync_audit"))
    assert audit.name.endswith("_sync_audit")
    assert "train/loss" in EventAccumulator(str(training)).Reload().Tags()["scalars"]
    return EventAccumulator(str(audit)).Reload()


def test_tensorboard_gets_the_figures_of_a_healthy_run(tmp_path: Path) -> None:
    trainer_runs.save_bases(tmp_path)
    audit = SyncAuditCallback()
    trainer_runs.trainer(
        "trainer", "full", tmp_path, audit, name="run", report_to=["tensorboard"]
    ).train()
    found = audit_run(tmp_path / "run")
    assert set(found.Tags()["scalars"]) == FIGURES
    assert not found.Tags()["tensors"]
    audits = {event.step: event.value for event in found.Scalars("audit/audits")}
    # One of everything at the start, then one an update.
    assert audits == {step: step + 1 for step in range(1, trainer_runs.STEPS + 1)}
    assert {event.value for event in found.Scalars("audit/desyncs")} == {0.0}
    assert 0 < found.Scalars("audit/seconds")[-1].value <= audit.summary().seconds


def test_tensorboard_gets_a_desync_before_the_error_ends_the_training(tmp_path: Path) -> None:
    error = train_broken(tmp_path, report_to=["tensorboard"])
    found = audit_run(tmp_path / "run")
    assert [(event.step, event.value) for event in found.Scalars("audit/desync")] == [(3, 1.0)]
    [event] = found.Tensors("audit/desync/text_summary")
    assert event.step == 3
    [text] = event.tensor_proto.string_val
    assert text.decode() == f"```\n{error}\n```"
    assert "reference" in str(error)


def test_no_tracker_was_asked_for(tmp_path: Path) -> None:
    train_broken(tmp_path, report_to=[])
    assert not (tmp_path / "run" / "runs").exists()


@pytest.mark.slow
def test_trackio_stores_figures_and_an_alert(tmp_path: Path) -> None:
    offline = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "tracked_audit.py"), str(tmp_path)],
        env=os.environ | offline | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads(done.stdout.rpartition("STORED ")[2])
    figures = [row for row in stored["logs"] if row.keys() >= FIGURES]
    assert [row["train/global_step"] for row in figures] == [1, 2]
    assert [row["audit/audits"] for row in figures] == [2, 3]
    [alert] = stored["alerts"]
    assert alert["title"] == "sync audit: desync"
    assert alert["level"] == "error"
    assert alert["text"] == stored["error"]
    [desync] = [row for row in stored["logs"] if "audit/desync" in row]
    assert desync["train/global_step"] == 3


class WandbRun:
    """Stands in for a run of wandb, which the tests do not install; keeps what is sent."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []

    def log(self, figures: dict[str, Any]) -> None:
        self.logs.append(figures)

    def alert(self, *, title: str, text: str, level: str) -> None:
        self.alerts.append({"title": title, "text": text, "level": level})


def test_wandb_gets_figures_and_an_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("wandb")
    package.run = WandbRun()
    monkeypatch.setitem(sys.modules, "wandb", package)
    # Its own callback would need all of wandb.
    monkeypatch.setattr(
        "transformers.trainer.get_reporting_integration_callbacks", lambda report_to: []
    )
    error = train_broken(tmp_path, report_to=["wandb"])
    assert package.run.alerts == [
        {"title": "sync audit: desync", "text": str(error), "level": "ERROR"}
    ]
    assert [row["train/global_step"] for row in package.run.logs] == [1, 2, 3]
    assert package.run.logs[-1] == {"audit/desync": 1, "train/global_step": 3}


Events = list[tuple[str, dict[str, Any]]]


def heard(folder: Path, make: Callable[[Events], SyncAuditCallback]) -> Events:
    events: Events = []
    trainer_runs.save_bases(folder)
    trainer_runs.trainer("trainer", "full", folder, make(events), name="run").train()
    return events


def test_on_event_hears_what_the_journal_holds(tmp_path: Path) -> None:
    events = heard(
        tmp_path, lambda told: SyncAuditCallback(on_event=lambda *event: told.append(event))
    )
    lines = trainer_runs.journal(tmp_path / "run")
    assert len(lines) > trainer_runs.STEPS
    written = [
        (
            line["event"],
            {key: value for key, value in line.items() if key not in ("event", "time_s")},
        )
        for line in lines
    ]
    assert json.loads(json.dumps(events)) == json.loads(json.dumps(written))


def test_on_event_is_called_without_a_journal_too(tmp_path: Path) -> None:
    events = heard(
        tmp_path,
        lambda told: SyncAuditCallback(journal=None, on_event=lambda *event: told.append(event)),
    )
    assert events[0][0] == "begin"
    assert events[-1][0] == "end"
    assert not trainer_runs.journal(tmp_path / "run")


def test_on_event_must_be_a_function() -> None:
    # Without the type checks of the tests, which are before it.
    code = "from trl_sync import SyncAuditCallback; SyncAuditCallback(on_event='print')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "ConfigError: on_event must be a function of an event's name and fields, not 'print'."
    assert done.stderr.splitlines()[-1].endswith(said)


def test_nobody_is_called_for_a_missing_rank(tmp_path: Path) -> None:
    """The watch ends the process next: code that hangs there would keep it alive."""
    told: list[str] = []
    config = AuditConfig(on_event=lambda event, fields: told.append(event))
    reaction = Reaction(Comparison(timeout_s=1), config, tmp_path)
    before = reaction.journal
    before.write("begin")
    missing = MissingRanks(ranks=(1,), kind="dead", reason="gone", waited_s=1.0, states=())
    finding = Finding(cause=Cause.RANK_MISSING, step=3, ranks=(1,), evidence="gone")
    report = SyncReport(step=3, audit=3, findings=(finding,), roots={}, size_bytes=0, seconds=0.0)
    reaction.write_missing(report, missing)
    before.close()
    reaction.close()
    assert told == ["begin"]
    assert [line["event"] for line in read_journal(tmp_path / JOURNAL_NAME)] == ["begin", "desync"]
