"""What a user sees while PPO trains: one bar, completions now and then."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.trainer_callback import ProgressCallback

SHOWN = {"objective/scores": "reward", "objective/kl": "KL"}


class PPOProgressCallback(ProgressCallback):
    """The stock progress bar with reward and KL beside the remaining time, instead of log lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {text: f"{logs[name]:.2f}" for name, text in SHOWN.items() if name in logs}
            if shown:
                self.training_bar.set_postfix(shown)
            evaluated = [f"{n}={logs[n]:.4g}" for n in logs if n.startswith("eval_objective")]
            if evaluated:
                self.training_bar.write(f"step {state.global_step}: " + ", ".join(evaluated))


def print_completions(columns: dict[str, list[Any]], title: str) -> None:
    """A table on the terminal, one row for each prompt."""
    table = Table(title=title, show_lines=True)
    for name in columns:
        table.add_column(name, justify="right" if name.startswith("score") else "left")
    for row in zip(*columns.values(), strict=True):
        # Text of a model may look like markup: str() alone would let rich interpret it.
        table.add_row(*(_cell(value) for value in row))
    Console().print(table)


def _cell(value: Any) -> Any:
    from rich.text import Text

    return Text(f"{value:.2f}" if isinstance(value, float) else str(value))
