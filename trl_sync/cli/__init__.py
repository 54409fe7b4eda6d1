"""The command line: `trl-sync demo`, `trl-sync report` and `trl-sync verify`.

What a command needs is imported when it runs, so that `--help` comes at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="trl-sync",
    help="Synchronization audits of distributed training: see one work, read one, verify a save.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


@app.command("demo")
def _demo(
    fault: Annotated[
        str, typer.Option(metavar="NAME", help="A fault or a cause of --list, or none.")
    ] = "gradient_not_reduced",
    show_list: Annotated[
        bool, typer.Option("--list", help="List all faults and what sees them.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and data.")] = 0,
) -> None:
    """Plant one fault in a training job of two CPU ranks and show how the audit names it.

    Exit codes: 0 the audit named the fault as it should (or was silent on none), 1 it did not,
    2 wrong usage.
    """
    from trl_sync.cli.demo import find_fault, run_demo, show_faults

    if show_list:
        show_faults()
        return
    raise typer.Exit(0 if run_demo(find_fault(fault), seed) else 1)


@app.command("report")
def _report(
    path: Annotated[Path, typer.Argument(metavar="RUN_DIR_OR_JOURNAL")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Summarize the journal (sync_audit.jsonl) of an audited run.

    Exit codes: 0 no desync, 3 the journal holds a desync, 2 there is no journal that can be read.
    """
    from trl_sync.cli.report import show_report

    raise typer.Exit(3 if show_report(path, as_json=as_json) else 0)


@app.command("verify")
def _verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT")],
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also compare this base model's files.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Check a checkpoint's files against the manifest (sync_manifest.json) written beside them.

    Exit codes: 0 verified, 1 something is wrong, or it was saved unverified, 2 there is no
    manifest that can be read.
    """
    from trl_sync.cli.verify import show_verification

    raise typer.Exit(0 if show_verification(checkpoint, base, as_json=as_json) else 1)


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    from trl_sync.errors import ConfigError

    try:
        code = app(standalone_mode=False)
    except ConfigError as error:
        sys.exit(_fail(str(error)))
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        # What typer says of wrong usage; its classes lie in private modules.
        if not hasattr(error, "format_message"):
            raise
        sys.exit(_fail(error.format_message()))
    sys.exit(code or 0)


def _fail(message: str) -> int:
    # Without a command typer has shown the help already, and says nothing more.
    if message:
        print(f"error: {message}", file=sys.stderr)
    return 2
