"""What a user sees while PPO trains: one bar, completions now and then; lines of text in a pipe."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

SHOWN = {"objective/scores": "reward", "objective/kl": "KL"}


def progress_callback() -> TrainerCallback:
    """A bar if somebody watches a terminal, else a line of text for each line of the log."""
    return PPOProgressBar() if sys.stderr.isatty() else PPOProgressLines()


class PPOProgressBar(ProgressCallback):
    """The stock progress bar with reward and KL beside the remaining time, instead of log lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = shown_metrics(logs)
            if shown:
                self.training_bar.set_postfix(shown)
            evaluated = evaluated_metrics(logs)
            if evaluated:
                self.training_bar.write(f"step {state.global_step}: {evaluated}")


class PPOProgressLines(TrainerCallback):
    """Step, time, reward and KL: what the bar shows, as text on the standard error stream."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started_s, self._first_step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        shown = ", ".join(f"{name}={value}" for name, value in shown_metrics(logs).items())
        if shown and state.global_step > self._first_step:
            elapsed_s = time.perf_counter() - self._started_s
            done = state.global_step - self._first_step
            left_s = elapsed_s / done * (state.max_steps - state.global_step)
            times = f"{_clock(elapsed_s)}, {_clock(left_s)} left"
            _say(f"step {state.global_step}/{state.max_steps} ({times}): {shown}")
        evaluated = evaluated_metrics(logs)
        if evaluated:
            _say(f"step {state.global_step}: {evaluated}")


def shown_metrics(logs: dict[str, Any]) -> dict[str, str]:
    """The metrics of a log line that are worth watching, by short name."""
    return {text: f"{logs[name]:.2f}" for name, text in SHOWN.items() if name in logs}


def evaluated_metrics(logs: dict[str, Any]) -> str:
    """The metrics of an evaluation as one text; empty if the log line has none."""
    return ", ".join(f"{n}={logs[n]:.4g}" for n in logs if n.startswith("eval_objective"))


def print_completions(columns: dict[str, list[Any]], title: str) -> None:
    """One row for each prompt: a table on a terminal, else a line for each value."""
    rows = [[_text(value) for value in row] for row in zip(*columns.values(), strict=True)]
    console = Console()
    if not console.is_terminal:
        print(title)
        for row in rows:
            for name, value in zip(columns, row, strict=True):
                # A line stays a line, whatever a model writes.
                print(f"  {name}: {' '.join(value.split())}")
            print()
        return
    table = Table(title=title, show_lines=True)
    for name in columns:
        table.add_column(name, justify="right" if name.startswith("score") else "left")
    for row in rows:
        # Text of a model may look like markup: str alone would let rich interpret it.
        table.add_row(*map(Text, row))
    console.print(table)


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
