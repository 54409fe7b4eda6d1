"""The command line: `trl-sync demo`, `trl-sync report`, `trl-sync verify` and `trl-sync env`.

What a command needs is imported when it runs, so that `--help` comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="trl-sync",
    help="Synchronization audits of distributed training: see one work, read one, verify a save.",
    add_completion=True,
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
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Plant one fault in a training job of two CPU ranks and show how the audit names it.

    Exit codes: 0 the audit named the fault as it should (or was silent on none), 1 it did not,
    2 wrong usage.
    """
    from trl_sync.cli.demo import find_fault, run_demo, show_faults

    if show_list:
        show_faults(as_json=as_json)
        return
    raise typer.Exit(0 if run_demo(find_fault(fault), seed, as_json=as_json) else 1)


@app.command("report")
def _report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN_DIR_OR_JOURNAL...")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page. Default: report.html in the first RUN_DIR."),
    ] = None,
    no_html: Annotated[
        bool, typer.Option("--no-html", help="Print only: no page and no PNGs.")
    ] = False,
) -> None:
    """Summarize audited runs, and write a page with curves, audit and completions of run folders.

    Several folders are compared. The page is one file that needs no other; PNGs lie beside it.

    Exit codes: 0 no desync, 3 a journal (sync_audit.jsonl) holds a desync, 2 there is nothing
    that can be read.
    """
    from trl_sync.cli.report import show_report

    desynced = show_report(paths, as_json=as_json, html=not no_html, output=output)
    raise typer.Exit(3 if desynced else 0)


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


@app.command("env")
def _env(
    plan: Annotated[
        bool, typer.Option("--plan", help="Compute the memory per GPU of a PPO run.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="NAME_OR_DIR", help="Only its config is read.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="none (default), ddp, zero1, zero2, zero3, fsdp2, fsdp2_qlora or hsdp.",
        ),
    ] = None,
    num_gpus: Annotated[
        int | None, typer.Option("--gpus", help="All of them. Default: 1 for none, else 8.")
    ] = None,
    num_shards: Annotated[
        int | None,
        typer.Option("--shards", help="hsdp: GPUs that share one copy. Default: half of them."),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Exit with 1 if a GPU of that size is small.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="per_device_train_batch_size. Default: 8.")
    ] = None,
    rollout_batch: Annotated[
        int | None, typer.Option(help="local_rollout_forward_batch_size. Default: 64.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Of the longest prompt. Default: 512.")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(help="response_length. Default: 53.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="lora_r. Default: 16.")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="lora_dropout. Default: 0.05.")] = None,
    quantization: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="nf4, 8bit or none. Default: nf4; separate: none."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="KIND", help="What computes: bf16 (default) or fp32.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="function (default), adapter, or a model: NAME_OR_DIR."),
    ] = None,
    reward_in_4bit: Annotated[
        bool, typer.Option("--reward-in-4bit", help="The reward model in NF4, else bf16.")
    ] = False,
    separate: Annotated[
        bool, typer.Option("--separate", help="Whole models for policy, value and reference.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Whether layers recompute their activations. Default: yes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show versions, devices and which engines run here; with --plan the memory a run needs.

    Exit codes: 0 it fits, or nothing was asked, 1 it does not fit into --gpu-memory, 2 wrong
    usage, or no config that can be read.
    """
    sizes = {
        "engine": engine,
        "num_gpus": num_gpus,
        "num_shards": num_shards,
        "batch": batch,
        "rollout_batch": rollout_batch,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
        "lora_rank": lora_rank,
        "lora_dropout": lora_dropout,
        "quantization": quantization,
        "dtype": dtype,
        "reward_in_4bit": reward_in_4bit or None,
        "separate": separate or None,
        "gradient_checkpointing": gradient_checkpointing,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    named = {"model": model, "reward": reward, "gpu_memory": gpu_memory}
    if not plan:
        from trl_sync.cli.env import show_environment

        _refuse_sizes({**given, **{n: v for n, v in named.items() if v is not None}})
        show_environment(as_json=as_json)
        return
    from trl_sync.cli.plan import show_plan

    fits = show_plan(model, reward or "function", gpu_memory, as_json=as_json, **given)
    raise typer.Exit(0 if fits else 1)


def _refuse_sizes(given: Iterable[str]) -> None:
    """Nothing, if no setting was given that only a plan has.

    Raises:
        ConfigError: names them.
    """
    from trl_sync.errors import ConfigError

    flags = [f"--{name.removeprefix('num_').replace('_', '-')}" for name in given]
    if flags:
        raise ConfigError(f"{', '.join(flags)}: for --plan only. Add --plan, or leave it out.")


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
        # One line, whatever a file's name or a library's message holds.
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2
