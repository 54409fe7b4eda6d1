"""`trl-sync demo`: two CPU ranks, one planted fault, the message, and whether it is right.

How ranks are started is in `demo_ranks`, what runs on each in `demo_rank`.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sync.audit.findings import Cause
from trl_sync.cli.demo_ranks import RankOutcome, run_ranks
from trl_sync.errors import ConfigError

if TYPE_CHECKING:
    from trl_sync.audit.faults import Fault

HEALTHY = "none"
# Updates after the one that a fault strikes in which it may be named: frozen state is checked in
# slices, a parameter must stand still for some updates, a step too many shows in the next one.
LATEST_AFTER = {
    Cause.FROZEN_CHANGED: 4,
    Cause.QUANTIZATION_CHANGED: 4,
    Cause.NEVER_UPDATED: 8,
    Cause.STEP_SKEW: 1,
}
# Half of the LoRA factors have gradients of zero, equal on all ranks, in the first update.
LATEST_AT_ONCE = 2
# These concern every tensor, of which the audit may name any.
ON_EVERY_TENSOR = frozenset({"optimizer_holds_copies", "gradients_clipped"})
SHOWN_LOG_LINES = 15


def run_demo(fault: Fault | None, seed: int, *, as_json: bool = False) -> bool:
    """Runs the drill and prints it; True if the audit named the fault, or was silent on none."""
    if as_json:
        with tempfile.TemporaryDirectory(prefix="trl_sync_demo_") as folder:
            ranks = run_ranks(HEALTHY if fault is None else fault.name, seed, Path(folder))
        content = as_data(fault, ranks)
        print(json.dumps(content, indent=2))
        return not content["mistakes"]
    text = "nothing: a healthy run" if fault is None else f"{fault.name}: {fault.description}"
    print(f"Planted  {text}.", flush=True)
    with tempfile.TemporaryDirectory(prefix="trl_sync_demo_") as folder:
        ranks = run_ranks(HEALTHY if fault is None else fault.name, seed, Path(folder))
    print(f"Where    {where(ranks, fault)}.\n")
    if fault is None:
        return judge_healthy(ranks)
    reporter = next((outcome for outcome in ranks if outcome.message), None)
    if reporter is not None:
        print(f"The message of rank {reporter.rank}:\n\n{reporter.message}\n")
    wrong = mistakes(fault, ranks, reporter)
    if reporter is None or wrong:
        print(f"NOT named right: {'; '.join(wrong)}.")
        show_logs(ranks)
        return False
    print(f"named right: {named(reporter, ranks)}")
    return True


def as_data(fault: Fault | None, ranks: list[RankOutcome]) -> dict[str, Any]:
    """What was planted, what each rank said, and what is wrong with it, for JSON."""
    on, step, tensor = planted_on(ranks)
    reporter = next((outcome for outcome in ranks if outcome.message), None)
    if fault is not None:
        wrong = mistakes(fault, ranks, reporter)
    else:
        alarms = [outcome for outcome in ranks if outcome.message or outcome.exit_code]
        wrong = [f"rank {o.rank} was not silent, exit code {o.exit_code}" for o in alarms]
    return {
        "fault": HEALTHY if fault is None else fault.name,
        "cause": None if fault is None else fault.cause,
        "planted": {"ranks": sorted(on), "step": step, "tensor": tensor},
        "ranks": [
            {
                "rank": outcome.rank,
                "exit_code": outcome.exit_code,
                "findings": outcome.findings,
                "message": outcome.message,
            }
            for outcome in ranks
        ],
        "mistakes": wrong,
    }


def planted_on(ranks: list[RankOutcome]) -> tuple[set[int], int | None, str | None]:
    """Ranks, update (None: before the first) and tensor of the fault."""
    known = [outcome.planted for outcome in ranks if outcome.planted]
    tensor = next((planted["tensor"] for planted in known if planted["tensor"]), None)
    if not known:
        return set(), None, tensor
    rank = known[0]["rank"]
    everyone = {outcome.rank for outcome in ranks}
    return everyone if rank is None else {rank}, known[0]["step"], tensor


def where(ranks: list[RankOutcome], fault: Fault | None) -> str:
    on, step, tensor = planted_on(ranks)
    if fault is None:
        return f"{len(ranks)} CPU ranks"
    if not on:
        return "nowhere: no rank came that far"
    if fault.on == "checkpoint":
        place = f"in the checkpoint that {len(ranks)} CPU ranks resume from"
    else:
        number = "all" if len(on) == len(ranks) else f"rank {', '.join(map(str, on))} of"
        time_ = "before the first update" if step is None else f"in update {step}"
        place = f"on {number} {len(ranks)} CPU ranks, {time_}"
    return place if tensor is None else f"{place}, {tensor}"


def mistakes(fault: Fault, ranks: list[RankOutcome], reporter: RankOutcome | None) -> list[str]:
    """What the audit should have said and did not."""
    if reporter is None:
        codes = ", ".join(f"rank {outcome.rank}: {outcome.exit_code}" for outcome in ranks)
        return [f"expected cause {fault.cause}, but no rank named anything (exit codes {codes})"]
    if not reporter.findings:
        return [f"expected cause {fault.cause}, but the message names none"]
    finding = reporter.findings[0]
    on, step, tensor = planted_on(ranks)
    wrong = []
    if finding["cause"] != fault.cause:
        wrong.append(f"expected cause {fault.cause}, found {finding['cause']}")
    if not on <= named_ranks(ranks):
        wrong.append(f"expected ranks {sorted(on)}, found {sorted(named_ranks(ranks))}")
    is_named = fault.name in ON_EVERY_TENSOR or names_tensor(tensor, finding["tensor"])
    if not is_named and f"{tensor}" not in f"{reporter.message}":
        wrong.append(f"expected tensor {tensor}, found {finding['tensor']}")
    if fault.on != "checkpoint":
        first, last = named_between(Cause(fault.cause), step)
        if not first <= finding["step"] <= last:
            wrong.append(f"expected step {first} to {last}, found {finding['step']}")
    silent = [o for o in ranks if o.message is None and o.exit_code == 0]
    wrong += [f"rank {o.rank} ended as if nothing had been found" for o in silent]
    return wrong


def named_between(cause: Cause, step: int | None) -> tuple[int, int]:
    """The first and the last update in which a fault of update `step` (None: at once) is named."""
    if step is None:
        return 0, LATEST_AT_ONCE + LATEST_AFTER.get(cause, 0)
    return step, step + LATEST_AFTER.get(cause, 0)


def names_tensor(planted: str | None, found: str | None) -> bool:
    """True if both mean one tensor: the audit puts roles before a name, and moments behind it."""
    return planted is None or (found is not None and f".{planted}." in f".{found}.")


def named_ranks(ranks: list[RankOutcome]) -> set[int]:
    """Ranks that the first finding names on any rank: one that is alone names only itself."""
    return {rank for outcome in ranks if outcome.findings for rank in outcome.findings[0]["ranks"]}


def named(reporter: RankOutcome, ranks: list[RankOutcome]) -> str:
    finding = reporter.findings[0]
    parts = [f"cause {finding['cause']}"]
    if finding["tensor"] is not None:
        parts.append(f"tensor {finding['tensor']}")
    parts.append(f"ranks {','.join(map(str, sorted(named_ranks(ranks))))}")
    parts.append(f"step {finding['step']}")
    parts.append(f"{reporter.after_ms:,.0f} ms after {reporter.since}")
    return ", ".join(parts)


def judge_healthy(ranks: list[RankOutcome]) -> bool:
    alarms = [outcome for outcome in ranks if outcome.message or outcome.exit_code]
    if alarms:
        print(alarms[0].message or "")
        codes = ", ".join(f"rank {o.rank}: {o.exit_code}" for o in ranks)
        print(f"NOT silent on a healthy run (exit codes {codes}).")
        show_logs(ranks)
        return False
    print(ranks[0].summary)
    print("silent, as it should be.")
    return True


def show_logs(ranks: list[RankOutcome]) -> None:
    for outcome in ranks:
        lines = outcome.log.splitlines()[-SHOWN_LOG_LINES:]
        print(f"\nRank {outcome.rank}, exit code {outcome.exit_code}, last lines of its output:")
        print("\n".join(f"  {line}" for line in lines))


def find_fault(name: str) -> Fault | None:
    """The fault of this name, else the first with this cause; None for the healthy run.

    Raises:
        ConfigError: neither; the near matches are named.
    """
    from trl_sync.audit.faults import FAULTS

    if name == HEALTHY:
        return None
    if name in FAULTS:
        return FAULTS[name]
    for fault in FAULTS.values():
        if fault.cause == name:
            return fault
    known = [*FAULTS, *dict.fromkeys(fault.cause for fault in FAULTS.values()), HEALTHY]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"no fault or cause is called {name!r}; {hint}See trl-sync demo --list.")


def show_faults(*, as_json: bool = False) -> None:
    """A table of all faults."""
    from trl_sync.audit.faults import FAULTS
    from trl_sync.cli.console import make_console, make_table

    if as_json:
        names = ("name", "cause", "on", "seen_by", "description")
        faults = [{name: str(getattr(f, name)) for name in names} for f in FAULTS.values()]
        print(json.dumps(faults, indent=2))
        return
    table = make_table("fault", "cause", "ranks", "seen by", "description")
    for fault in FAULTS.values():
        table.add_row(fault.name, fault.cause, fault.on, fault.seen_by, fault.description)
    make_console().print(table)
