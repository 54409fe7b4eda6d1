"""Completions reach the trackers of a run, and what a model writes cannot break the tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import markdown
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.trainer_callback import TrainerCallback

import runs
import tiny
from trl_sync.ppo.completions import log_completions, markdown_table

HEADER = ["step", "query", "model response", "score"]
NASTY = "a|b\\|c <user: *x*> `y` _z_\r\n# 1. [l](u) ![i](v) & {w}\n\n- end"
COLUMNS: dict[str, list[Any]] = {
    "query": ["a b", "c"],
    "model response": [NASTY, ""],
    "score": [0.5, -1.25],
}
ROWS = [[7, "a b", NASTY, 0.5], [7, "c", "", -1.25]]


def send(*names: str, callbacks: tuple[TrainerCallback, ...] = ()) -> None:
    log_completions(COLUMNS, step=7, name="completions", report_to=names, callbacks=callbacks)


def test_cells_of_a_markdown_table_read_as_their_text() -> None:
    table = markdown_table(HEADER, ROWS)
    assert len(table.splitlines()) == 4
    # The library with which TensorBoard shows texts.
    page = markdown.markdown(table, extensions=["markdown.extensions.tables"])
    shown = "a|b\\|c &lt;user: *x*&gt; `y` _z_<br># 1. [l](u) ![i](v) &amp; {w}<br><br>- end"
    first, second = page.partition("<tbody>")[2].split("</tr>")[:2]
    assert f"<td>{shown}</td>" in first.replace("<br />", "<br>")
    assert [cell in second for cell in ("<td>7</td>", "<td>c</td>", "<td>-1.25</td>")] == [True] * 3
    assert page.count("<th>") == 4


class StandIn(types.ModuleType):
    """Stands in for the package of a tracker that the tests do not install; keeps what is sent."""

    def __init__(self, name: str, open_run: bool) -> None:
        super().__init__(name)
        self.run = object() if open_run else None
        self.sent: list[Any] = []
        # The name that wandb gives its class.
        self.Table = lambda columns, data: (columns, data)

    def log(self, metrics: dict[str, Any]) -> None:
        self.sent.append(metrics)

    # comet_ml
    def get_running_experiment(self) -> Any:
        return self if self.run is not None else None

    def log_table(self, filename: str, tabular_data: Any, headers: Any) -> None:
        self.sent.append((filename, tabular_data, headers))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wandb", {"completions": (HEADER, ROWS), "train/global_step": 7}),
        ("comet_ml", ("completions.csv", ROWS, HEADER)),
    ],
)
def test_wandb_and_comet_get_a_table_while_a_run_is_open(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: Any
) -> None:
    for open_run in (True, False):
        package = StandIn(name, open_run)
        monkeypatch.setitem(sys.modules, name, package)
        send(name)
        assert package.sent == ([expected] if open_run else [])
        send("trackio", "mlflow")  # no run of trackio is open, and mlflow has no tables
        assert len(package.sent) == int(open_run)


def texts(folder: Path) -> dict[str, dict[int, str]]:
    """The texts in TensorBoard's files by name and step."""
    reader = EventAccumulator(str(folder)).Reload()
    found: dict[str, dict[int, str]] = {}
    for name in reader.Tags()["tensors"]:
        for event in reader.Tensors(name):
            [text] = event.tensor_proto.string_val
            found.setdefault(name.removesuffix("/text_summary"), {})[event.step] = text.decode()
    return found


def only_folder(out: Path) -> Path:
    [folder] = (out / "runs").iterdir()
    return folder


def test_tensorboard_gets_metrics_and_tables_during_and_after_training(tmp_path: Path) -> None:
    trainer = runs.train(
        tmp_path,
        report_to=["tensorboard"],
        eval_prompts={"few": tiny.prompts(1), "more": tiny.prompts(3)},
        num_sample_generations=3,
    )
    folder = only_folder(tmp_path / "out")
    first = texts(folder)
    assert list(first["completions_few"]) == list(first["completions_more"]) == [4, 8, 12]
    assert len(first["completions_few"][4].splitlines()) == 3
    assert len(first["completions_more"][4].splitlines()) == 5
    assert first["completions_few"][12].splitlines()[0] == f"| {' | '.join(HEADER)} |"
    scores = EventAccumulator(str(folder)).Reload().Scalars("train/objective/scores")
    logged = [row["objective/scores"] for row in runs.rows(trainer, "objective/scores")]
    assert [event.value for event in scores] == pytest.approx(logged)

    trainer.state.global_step = 13  # another step, so that the new table is told from the old one
    trainer.generate_completions()
    assert list(texts(folder)["completions_few"]) == [4, 8, 12, 13]
    assert only_folder(tmp_path / "out") == folder


def test_without_evaluation_prompts_nothing_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = runs.make(tmp_path)
    capsys.readouterr()
    trainer.generate_completions()
    trainer.generate_completions(sampling=True)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_trackio_stores_metrics_and_tables_of_a_run(tmp_path: Path) -> None:
    offline = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(tests / "tracked_run.py"), str(tmp_path)],
        env=os.environ | offline | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("STORED ")[2])
    assert len(found["scores"]) == 1
    assert found["scores"] == found["logged"]
    [table] = found["tables"]
    assert [list(row) for row in table] == [HEADER, HEADER]
    tokenizer = tiny.tokenizer()
    queries = [tokenizer.decode(tokenizer(p)["input_ids"]) for p in tiny.prompts(2)["prompt"]]
    assert [row["query"] for row in table] == queries
    assert [row["step"] for row in table] == [4, 4]
    assert [row["score"] for row in table] == [
        float(row["model response"].count("e")) for row in table
    ]
    assert (tmp_path / "trackio").is_dir()
