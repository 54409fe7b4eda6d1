"""`trl-sync report`: what the journal of an audited run says, and the page of a run."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_sync.audit.journal import JOURNAL_NAME, read_journal
from trl_sync.cli.console import make_console, make_table
from trl_sync.errors import ConfigError
from trl_sync.report.output import PAGE_NAME, write_report
from trl_sync.report.run_folder import Run, has_sources, read_runs

Event = Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class RunReport:
    """One run of a journal: the events from one "begin" to the next.

    `share_of_step` is the audit's part of the training time, known if the run came to its `end`.
    """

    begin: Event | None = None
    audits: int = 0
    first_step: int | None = None
    last_step: int | None = None
    size_bytes: int = 0
    seconds: float = 0.0
    share_of_step: float | None = None
    ended: bool = False
    desyncs: list[Event] = field(default_factory=list)
    warnings: list[Event] = field(default_factory=list)
    saves: list[Event] = field(default_factory=list)
    resumes: list[Event] = field(default_factory=list)
    repairs: list[Event] = field(default_factory=list)


def show_report(
    paths: Sequence[Path], *, as_json: bool, html: bool = True, output: Path | None = None
) -> bool:
    """Prints the runs of journals and writes the page of run folders; True if one holds a desync.

    A run folder without journal has a page all the same. The page goes to `output`, or into the
    first run folder; where that cannot be written to, this is said, and is no error.

    Raises:
        ConfigError: a path leads to nothing that can be read, or `output` cannot be written.
    """
    folders = [path for path in paths if path.is_dir()] if html else []
    if output is not None and not folders:
        raise ConfigError(
            "--output is for the page of run folders: pass the folder of a run, without --no-html."
        )
    # All is read before anything is printed: what cannot be read is told in one line.
    journals = [_journal_of(path, has_page=path in folders) for path in paths]
    pages = read_runs(folders)
    reports = [_read_reports(journal) for journal in journals]
    if as_json:
        contents = [as_content(*pair) for pair in zip(journals, reports, strict=True)]
        desynced = any(content["desynced"] for content in contents)
        several = {"desynced": desynced, "reports": contents}
        print(json.dumps(contents[0] if len(contents) == 1 else several, indent=2))
    else:
        for path, journal, runs in zip(paths, journals, reports, strict=True):
            show_runs(path, journal, runs)
    if pages:
        write_page(pages, output, folders[0] / PAGE_NAME, quiet=as_json)
    return any(run.desyncs for runs in reports for run in runs)


def _journal_of(path: Path, *, has_page: bool) -> Path | None:
    """The journal at `path`, or None for a run folder without one that has a page."""
    if has_page and not (path / JOURNAL_NAME).is_file() and has_sources(path):
        return None
    return find_journal(path)


def _read_reports(journal: Path | None) -> list[RunReport]:
    if journal is None:
        return []
    with _read_as_written(journal):
        runs = summarize(read_journal(journal))
    if not runs:
        raise ConfigError(f"{journal} holds no events: the run ended before its first audit.")
    return runs


@contextlib.contextmanager
def _read_as_written(journal: Path) -> Iterator[None]:
    """Names the journal where its lines are not what is expected of them."""
    try:
        yield
    except ConfigError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{journal} is not as this version writes it ({type(error).__name__}: {error}). Read "
            "it with the version of trl_sync that wrote it; its first line names that."
        ) from error


def as_content(journal: Path | None, runs: list[RunReport]) -> dict[str, Any]:
    return {
        "journal": None if journal is None else str(journal),
        "desynced": any(run.desyncs for run in runs),
        "runs": [asdict(run) for run in runs],
    }


def show_runs(path: Path, journal: Path | None, runs: list[RunReport]) -> None:
    console = make_console()
    if journal is None:
        text = f"{path}: no {JOURNAL_NAME}, so nothing is known of an audit"
        console.print(text, markup=False, soft_wrap=True)
        return
    with _read_as_written(journal):
        console.print(f"{journal}: {count(len(runs), 'run')}", markup=False, soft_wrap=True)
        for number, run in enumerate(runs, start=1):
            print_run(console, number, run)


def write_page(runs: list[Run], output: Path | None, default: Path, *, quiet: bool) -> None:
    """Writes the page and the plots and says where; if `quiet`, on the standard error.

    Raises:
        ConfigError: `output` was asked for, and cannot be written.
    """
    page = default if output is None else output
    said = sys.stderr if quiet else sys.stdout
    try:
        written = write_report(runs, page)
    except OSError as error:
        reason = f"cannot write {page}: {error.strerror or error}"
        if output is not None:
            raise ConfigError(f"--output: {reason}.") from error
        print(f"no page: {reason}. Name another place with --output", file=sys.stderr)
        return
    print(f"page     {written.page}", file=said)
    if written.plots is None:
        print("plots    none: they need matplotlib: pip install 'trl-sync[report]'", file=said)
    elif not written.plots:
        print("plots    none: the log holds nothing that is drawn", file=said)
    else:
        print(f"plots    {count(len(written.plots), 'PNG')} beside it", file=said)


def find_journal(path: Path) -> Path:
    """The journal in a run's folder, or the file itself."""
    if not path.is_dir():
        return path
    journal = path / JOURNAL_NAME
    if journal.is_file():
        return journal
    deeper = sorted(path.glob(f"*/{JOURNAL_NAME}"))
    hint = f"; there is {deeper[0]}" if deeper else ""
    raise ConfigError(
        f"{path} holds no {JOURNAL_NAME}{hint}. Pass the output_dir of a run that was audited, or "
        "the journal itself."
    )


def summarize(events: Iterable[Event]) -> list[RunReport]:
    """The runs of a journal, in order."""
    runs: list[RunReport] = []
    for event in events:
        # A run that is refused at once, such as one that is not distributed, has no "begin".
        if event["event"] == "begin" or not runs or runs[-1].ended:
            runs.append(RunReport())
        add(runs[-1], event)
    return runs


def add(run: RunReport, event: Event) -> None:
    kind = event["event"]
    lists = {
        "desync": run.desyncs,
        "warning": run.warnings,
        "save": run.saves,
        "resume": run.resumes,
        "repair": run.repairs,
    }
    if kind == "begin":
        run.begin = event
    elif kind == "audit":
        run.audits += 1
        run.size_bytes += event.get("size_bytes", 0)
        run.seconds += event.get("seconds", 0.0)
    elif kind == "end":
        # Its totals hold what audits leave out, such as the time before the comparison.
        run.ended = True
        run.audits, run.size_bytes = event["audits"], event["size_bytes"]
        run.seconds, run.share_of_step = event["seconds"], event["share_of_step"]
    elif kind in lists:
        lists[kind].append(event)
    step = event.get("step")
    if step is not None:
        run.first_step = step if run.first_step is None else min(run.first_step, step)
        run.last_step = step if run.last_step is None else max(run.last_step, step)


def print_run(console: Console, number: int, run: RunReport) -> None:
    console.print(f"\n{title(number, run.begin)}", markup=False, soft_wrap=True)
    if run.begin is not None:
        console.print(scope_table(run.begin))
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, text in describe(run).items():
        facts.add_row(name, escape(text))
    console.print(facts)
    if run.desyncs:
        console.print(desync_table(run.desyncs))


def title(number: int, begin: Event | None) -> str:
    if begin is None:
        return f"Run {number}: refused before its first audit"
    every = "every step" if begin["every_steps"] == 1 else f"every {begin['every_steps']} steps"
    return (
        f"Run {number} from step {begin['step']}: {count(begin['world_size'], 'rank')}, engine "
        f"{begin['engine']}, audited {every}, on_desync={begin['on_desync']}"
    )


def scope_table(begin: Event) -> Table:
    """What is audited, and what is not, with the reason."""
    table = make_table("scope", "status")
    table.add_column("tensors", justify="right")
    table.add_column("bytes", justify="right")
    for scope, entry in begin["scopes"].items():
        status = entry["status"]
        if entry.get("reason"):
            status += f": {entry['reason']}"
        numbers = [entry.get("tensors"), entry.get("size_bytes")]
        table.add_row(scope, escape(status), *("" if n is None else f"{n:,}" for n in numbers))
    return table


def describe(run: RunReport) -> dict[str, str]:
    share = "" if run.share_of_step is None else f" ({run.share_of_step:.2%} of training time)"
    unverified = [save for save in run.saves if not save.get("verified")]
    facts = {
        "audits": f"{run.audits:,}",
        "steps": "none" if run.first_step is None else f"{run.first_step} to {run.last_step}",
        "hashed": f"{run.size_bytes / 1e6:,.1f} MB",
        "time": f"{run.seconds:.2f} s{share}",
        "end": "regular" if run.ended else "none written: the run was stopped, or still runs",
        "desyncs": str(len(run.desyncs)),
    }
    if run.saves:
        facts["saves"] = f"{len(run.saves)}, {len(unverified)} of them not verified"
    if run.resumes:
        facts["resumed"] = ", ".join(f"{r['folder']} (verified)" for r in run.resumes)
    if run.repairs:
        facts["repairs"] = f"{len(run.repairs)}, at steps {steps(run.repairs)}"
    for position, warning in enumerate(run.warnings, start=1):
        where = warning.get("tensor") or warning.get("scope") or "the run"
        facts[f"warning {position}"] = f"step {warning['step']}, {where}: {warning['cause']}"
    return facts


def desync_table(desyncs: list[Event]) -> Table:
    table = make_table("desync at step", "cause", "ranks", "tensor")
    for desync in desyncs:
        for finding in desync["findings"]:
            ranks = ",".join(map(str, finding["ranks"]))
            tensor = finding["tensor"] or finding["scope"] or "-"
            table.add_row(str(finding["step"]), finding["cause"], ranks, escape(tensor))
    return table


def steps(events: list[Event]) -> str:
    return ", ".join(str(event["step"]) for event in events)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def escape(text: str) -> str:
    """`text` as it is: rich reads [brackets] as markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(text)
