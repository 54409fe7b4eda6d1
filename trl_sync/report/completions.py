"""`completions.jsonl`: answers to the same prompts before and after training, one prompt a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_sync.errors import ConfigError
from trl_sync.report.files import read_lines, write_whole
from trl_sync.report.text import finite, plain

FILE = "completions.jsonl"
QUERY, RESPONSE, SCORE = "query", "model response", "score"

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model wrote, and its score if it has one that is a number."""

    text: str
    score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answers to one prompt; None where it was not asked."""

    query: str
    before: Answer | None
    after: Answer | None


def write_completions(folder: str | os.PathLike[str], before: Columns, after: Columns) -> None:
    """Writes completions.jsonl into `folder`, for the page of `trl-sync report`.

    Both are what `PPOTrainer.completions()` returns. Called on the main process alone. Where both
    have the same queries, answers to one query share a line; else each answer has its own.

    Raises:
        ConfigError: a column is missing, or columns differ in length.
        OSError: the file cannot be written.
    """
    columns = {"before": before, "after": after}
    answers = {when: _answers(when, given) for when, given in columns.items()}
    if list(before[QUERY]) == list(after[QUERY]):
        pairs = zip(answers["before"], answers["after"], strict=True)
        rows = [{**first, **second} for first, second in pairs]
    else:
        rows = answers["before"] + answers["after"]
    lines = [json.dumps({QUERY: None, "before": None, "after": None} | row) for row in rows]
    write_whole(Path(folder) / FILE, "".join(f"{line}\n" for line in lines).encode())


def _answers(when: str, columns: Columns) -> list[dict[str, Any]]:
    for name in (QUERY, RESPONSE, SCORE):
        if name not in columns:
            raise ConfigError(
                f"Completions {when} training have no column {name!r}: pass what "
                f"PPOTrainer.completions() returns. Found: {list(columns)}."
            )
    lengths = {name: len(columns[name]) for name in (QUERY, RESPONSE, SCORE)}
    if len(set(lengths.values())) > 1:
        raise ConfigError(
            f"The columns of completions {when} training differ in length: {lengths}."
        )
    rows = zip(columns[QUERY], columns[RESPONSE], columns[SCORE], strict=True)
    return [
        {QUERY: str(query), when: {RESPONSE: str(text), SCORE: _number(score)}}
        for query, text, score in rows
    ]


def _number(score: Any) -> float | None:
    # A score of one element is a number too; one that is NaN is none that JSON could hold.
    return None if score is None else finite(float(score))


def read_completions(path: Path) -> tuple[Completion, ...]:
    """What `write_completions` wrote; a last line that was cut short is left out.

    Raises:
        ConfigError: there is no file that can be read, or a line is something else.
    """
    found = []
    for number, row in enumerate(read_lines(path), start=1):
        where = f"{path}, row {number}"
        if QUERY not in row:
            raise ConfigError(f"{where}: no {QUERY!r}, so these are no completions.")
        found.append(
            Completion(
                query=plain(row[QUERY]),
                before=_read_answer(row.get("before"), where),
                after=_read_answer(row.get("after"), where),
            )
        )
    return tuple(found)


def _read_answer(value: Any, where: str) -> Answer | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or RESPONSE not in value:
        raise ConfigError(f"{where}: an answer has no {RESPONSE!r}, so these are no completions.")
    return Answer(text=plain(value[RESPONSE]), score=finite(value.get(SCORE)))


def mean_scores(completions: Sequence[Completion]) -> tuple[float | None, float | None]:
    """The mean scores before and after training; None where there is none."""
    before = [completion.before for completion in completions]
    after = [completion.after for completion in completions]
    return _mean_score(before), _mean_score(after)


def _mean_score(answers: Sequence[Answer | None]) -> float | None:
    scores = [answer.score for answer in answers if answer and answer.score is not None]
    return sum(scores) / len(scores) if scores else None
