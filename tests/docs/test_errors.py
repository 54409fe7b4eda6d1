"""The pages on the audit say what it does: scripts, messages, journal fields and options."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import error_scripts
import journal_run
import pytest

from ranks import free_port, run_on_ranks
from trl_sync.audit.config import AuditConfig
from trl_sync.audit.findings import Cause
from trl_sync.audit.journal import JOURNAL_NAME

AUDIT_PAGE = Path(__file__).parents[2] / "docs" / "audit.md"
WARNED_ABOUT = "buffers_differ"
ROW = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
OPTION = re.compile(r"^\| `(\w+)` \| `(.*?)` \|", re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, error_scripts.Outcome]]:
    """Of every script that leaves its processes alive, by rank."""
    causes = [cause for cause in error_scripts.scripts() if cause not in error_scripts.ALONE]
    return run_on_ranks(error_scripts.run_scripts, causes)


def test_every_cause_has_exactly_one_section() -> None:
    named = [cause for cause, _ in error_scripts.sections()]
    assert sorted(named) == sorted(cause.value for cause in Cause)


@pytest.mark.ranks
@pytest.mark.parametrize("cause", [c for c in Cause if c not in error_scripts.ALONE])
def test_script_raises_its_cause_with_the_message_of_the_page(
    outcomes: list[dict[str, error_scripts.Outcome]], cause: Cause
) -> None:
    # The log has warnings on rank 0 alone.
    speaking = outcomes[:1] if cause == WARNED_ABOUT else outcomes
    for ranks_outcomes in speaking:
        assert ranks_outcomes[cause].causes == (cause.value,)
        assert masked(ranks_outcomes[cause].message) == masked(error_scripts.messages()[cause])


@pytest.mark.ranks
def test_rank_missing_is_named_and_ends_both_processes() -> None:
    ends = error_scripts.launch("rank_missing", free_port())
    codes = [code for code, _ in ends]
    # The rank that is thrown out of a collective by the other's end may leave with 1.
    assert error_scripts.WATCH_EXIT_CODE in codes
    assert set(codes) <= {error_scripts.WATCH_EXIT_CODE, 1}
    for _, stderr in ends:
        found = error_scripts.message_in(stderr)
        assert "Cause: rank_missing. Rank 1 is lagging" in found
    page = masked(error_scripts.messages()["rank_missing"])
    assert masked(error_scripts.message_in(ends[0][1])) == page


@pytest.mark.ranks
def test_not_distributed_is_raised_by_each_process() -> None:
    page = masked(error_scripts.messages()["not_distributed"])
    for code, stderr in error_scripts.launch("not_distributed", free_port()):
        assert code == 1
        assert masked(error_scripts.message_in(stderr)) == page


@pytest.mark.ranks
def test_journal_tables_list_the_fields_of_a_real_journal(tmp_path: Path) -> None:
    run_on_ranks(journal_run.write_journal, str(tmp_path), num_ranks=3)
    written = journal_run.read_fields(tmp_path / JOURNAL_NAME)
    documented = {
        heading: set(ROW.findall(text))
        for heading, text in _subsections(_section("The journal")).items()
    }
    assert set(documented) == set(written)
    assert written.pop("warning") == written["finding"] | {"event", "time_s", "message"}
    for event, names in written.items():
        assert documented[event] == names - {"event", "time_s"}, event


def test_options_table_lists_every_option_with_its_default() -> None:
    defaults = {field.name: repr(_default(field)) for field in fields(AuditConfig)}
    assert dict(OPTION.findall(_section("Options"))) == defaults


def masked(message: str) -> str:
    """`message` without what differs from machine to machine and from run to run."""
    for pattern, replacement in (
        (r"\S*/(?=checkpoint-)", "PATH/"),
        (r"host \S+,", "host HOST,"),
        # Whether the other rank has already begun to end.
        (r", aborted$", ""),
        (r"0x[0-9a-f]+", "BITS"),
        (r"\b[0-9a-f]{12}\.\.\.|\b[0-9a-f]{32}\b", "DIGEST"),
        (r"-?\b\d[\d,.]*(?:e[-+]\d+)?\b", "N"),
    ):
        message = re.sub(pattern, replacement, message, flags=re.MULTILINE)
    return message


def _default(field: Any) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()


def _section(title: str) -> str:
    found = re.search(
        rf"^## {title}\n(.*?)(?=^## |\Z)", AUDIT_PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"{AUDIT_PAGE.name} has no section {title}"
    return found[1]


def _subsections(text: str) -> dict[str, str]:
    return dict(re.findall(r"^### (\S+)\n(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL))
