"""Answers to the evaluation prompts as a table, and where that table is sent.

Trackers get one row for each prompt with the columns step, query, model response and score: wandb
and trackio a table, TensorBoard a Markdown text, Comet a CSV file. The others that transformers
knows have no tables for text; they get the metrics alone.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from trl_sync.ppo.collectives import together
from trl_sync.ppo.evaluation import EvaluationBatch, EvaluationLoader
from trl_sync.ppo.rewards import RewardSource, completion_texts
from trl_sync.ppo.rollout import Sampling, roll_out
from trl_sync.tracker_runs import open_wandb_run, trackio_has_run

logger = logging.get_logger(__name__)

COMPLETION_COLUMNS = ("query", "model response", "score")

Table = dict[str, list[Any]]
Row = list[Any]


def answer_prompts(
    model: Any,
    loader: EvaluationLoader,
    rewards: RewardSource,
    sampling: Sampling,
    *,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    batch_size: int,
    role: str,
    num_batches: int | None = None,
) -> Table:
    """Answers of `role` to the prompts of all processes, in the columns `COMPLETION_COLUMNS`.

    A collective. `model` is in evaluation mode. `num_batches` limits what each process answers.
    Draws from torch's global generators.

    Raises:
        RewardError: on every process, if scoring failed on one.
    """

    def answers(batch: EvaluationBatch) -> list[tuple[str, str, float]]:
        rollout = roll_out(
            model,
            batch.prompts,
            sampling,
            batch_size=batch_size,
            device=accelerator.device,
            role=role,
        )
        queries = tokenizer.batch_decode(batch.prompts.token_ids, skip_special_tokens=True)
        responses = completion_texts(rollout, tokenizer)
        rows = list(zip(queries, responses, rewards(rollout).tolist(), strict=True))
        return rows[: batch.num_counted]

    batches = itertools.islice(loader, num_batches)
    rows = together(accelerator, lambda: [row for batch in batches for row in answers(batch)])
    columns = zip(*gather_object(rows), strict=True)
    return dict(zip(COMPLETION_COLUMNS, map(list, columns), strict=True))


def log_completions(
    columns: Table,
    *,
    step: int,
    name: str,
    report_to: Iterable[str],
    callbacks: Iterable[TrainerCallback],
) -> None:
    """Sends the table to the trackers named in `report_to` whose run is open, under `name`.

    Called on the main process alone. A tracker whose run has ended is passed over, with a line in
    the log; TensorBoard has none and writes another event file beside those of the run.
    """
    header = ["step", *columns]
    rows = [[step, *row] for row in zip(*columns.values(), strict=True)]
    wanted = set(report_to)
    for tracker, send in _TRACKERS.items():
        if tracker in wanted and not send(name, header, rows):
            logger.info(f"{name} of step {step} not sent to {tracker}: no run is open there.")
    if "tensorboard" in wanted:
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback):
                _to_tensorboard(callback, name, markdown_table(header, rows), step)


def _to_wandb(name: str, header: list[str], rows: list[Row]) -> bool:
    import wandb

    if open_wandb_run() is None:
        return False
    table = wandb.Table(columns=header, data=rows)
    wandb.log({name: table, "train/global_step": rows[0][0]})
    return True


def _to_trackio(name: str, header: list[str], rows: list[Row]) -> bool:
    import trackio

    if not trackio_has_run():
        return False
    table = trackio.Table(columns=header, data=rows)
    trackio.log({name: table, "train/global_step": rows[0][0]})
    return True


def _to_comet(name: str, header: list[str], rows: list[Row]) -> bool:
    import comet_ml

    experiment = comet_ml.get_running_experiment()
    if experiment is None:
        return False
    experiment.log_table(f"{name}.csv", tabular_data=rows, headers=header)
    return True


_TRACKERS: dict[str, Callable[[str, list[str], list[Row]], bool]] = {
    "comet_ml": _to_comet,
    "trackio": _to_trackio,
    "wandb": _to_wandb,
}


def _to_tensorboard(callback: TensorBoardCallback, name: str, text: str, step: int) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text(name, text, step)
    elif callback.logging_dir is not None:  # the run has ended and closed its writer
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(log_dir=callback.logging_dir) as writer:
            writer.add_text(name, text, step)


def markdown_table(header: list[str], rows: list[Row]) -> str:
    """A Markdown table whose cells read exactly as their text."""
    cells = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _cell(value: Any) -> str:
    text = html.escape(f"{value:.4g}" if isinstance(value, float) else str(value), quote=False)
    # What a model writes may look like Markdown.
    text = re.sub(r"([\\`*_{}\[\]()#+\-.!|])", r"\\\1", text)
    return re.sub(r"\r\n|\r|\n", "<br>", text)
