"""What is shown while PPO trains: a bar and tables on a terminal, lines of text in a pipe."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import runs
import tiny
from trl_sync.ppo import progress
from trl_sync.ppo.progress import PPOProgressBar, PPOProgressLines, print_completions

COLUMNS: dict[str, list[Any]] = {
    "query": ["a b", "[red]c[/red]"],
    "model response": ["d\ne", ""],
    "score": [1.0, -0.256],
}


class Terminal(io.StringIO):
    """Text that believes to be shown on a terminal."""

    def isatty(self) -> bool:
        return True


def test_in_a_pipe_each_log_line_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = runs.train(tmp_path, disable_tqdm=False)
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    rows = runs.rows(trainer, "objective/scores")
    assert len(lines) == len(rows) == 3
    for line, row in zip(lines, rows, strict=True):
        shown = f"reward={row['objective/scores']:.2f}, KL={row['objective/kl']:.2f}"
        assert re.fullmatch(rf"step {row['step']}/12 \(\d+:\d\d, \d+:\d\d left\): {shown}", line)
    assert "\r" not in said


def test_evaluations_are_shown_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = runs.train(
        tmp_path,
        disable_tqdm=False,
        eval_prompts=tiny.prompts(4),
        eval_strategy="steps",
        eval_steps=8,
    )
    said = capsys.readouterr().err.splitlines()
    rows = runs.rows(trainer, "eval_objective/scores")
    assert rows[0]["step"] == 8
    for row in rows:
        score = f"eval_objective/scores={row['eval_objective/scores']:.4g}"
        assert any(line.startswith(f"step {row['step']}: ") and score in line for line in said)


def test_nothing_is_shown_if_bars_are_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.train(tmp_path, disable_tqdm=True)
    assert "reward=" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "stream, kind", [(Terminal, PPOProgressBar), (io.StringIO, PPOProgressLines)]
)
def test_a_bar_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, stream: Any, kind: type[Any]
) -> None:
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream()))
    assert type(progress.progress_callback()) is kind


def test_completions_in_a_pipe_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_completions(COLUMNS, "step 4")
    assert capsys.readouterr().out.splitlines() == [
        "step 4",
        *("  query: a b", "  model response: d e", "  score: 1.00", ""),
        *("  query: [red]c[/red]", "  model response: ", "  score: -0.26", ""),
    ]


def test_completions_on_a_terminal_are_a_table() -> None:
    code = (
        "from test_progress import COLUMNS, print_completions; print_completions(COLUMNS, 'step 4')"
    )
    environment = os.environ | {
        "FORCE_COLOR": "1",
        "COLUMNS": "60",
    }  # what rich takes as a terminal
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "[red]c[/red]" in done.stdout
    assert "\u2503" in done.stdout  # a rule between columns
    assert "-0.26" in done.stdout
