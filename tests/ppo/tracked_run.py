"""A short run whose metrics and completions go to trackio, in a process of its own.

Trackio chooses its folder when it is imported. Prints what trackio stored, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trackio
from trackio.sqlite_storage import SQLiteStorage

import runs
import tiny

PROJECT = "ppo"
_SCORES = "train/objective/scores"


def main(folder: Path) -> None:
    """Trains, writes completions once more after the end, and shows what arrived."""
    trainer = runs.train(
        folder,
        report_to=["trackio"],
        project=PROJECT,
        run_name="short",
        eval_prompts=tiny.prompts(2),
        num_sample_generations=1,
        total_episodes=16,
    )
    assert trackio.context_vars.current_run.get() is None  # the run ends with the training
    trainer.generate_completions()
    stored = SQLiteStorage.get_logs(PROJECT, "short")
    found = {
        "logged": [row["objective/scores"] for row in runs.rows(trainer, "objective/scores")],
        "scores": [row[_SCORES] for row in stored if _SCORES in row],
        "tables": [row["completions"]["_value"] for row in stored if "completions" in row],
    }
    print("STORED " + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
