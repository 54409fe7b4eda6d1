"""The memory table of docs/scaling.md says what the plan command says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from planned_models import CONFIGS, write_config
from trl_sync.cli import main

PAGE = Path(__file__).parents[2] / "docs/scaling.md"
SIZES = "--batch 4 --rollout-batch 16 --prompt-tokens 512 --response-tokens 512"
TOTALS = ("static", "peak in rollout", "peak in update")


def table() -> dict[str, list[str]]:
    """The cells of each row by its flags, in the order of `CONFIGS`."""
    lines = PAGE.read_text().partition("<!-- memory table:")[2].splitlines()[2:]
    head, _, *rows = lines[: lines.index("", 1)]
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["flags", *CONFIGS]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {flags.strip("`"): figures for flags, *figures in cells}


def test_the_table_is_of_the_sizes_that_the_command_names() -> None:
    assert f"    {SIZES}\n" in PAGE.read_text()
    engines = {flags.split()[1] for flags in table()}
    assert engines >= {"none", "ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2_qlora", "hsdp"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_memory_table_is_what_the_plan_computes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_config(name, tmp_path))
    column = list(CONFIGS).index(name)
    for flags, cells in table().items():
        given = [model if flag == "SAME" else flag for flag in flags.split()]
        plan = ["--plan", "--model", model, "--json", *SIZES.split()]
        monkeypatch.setattr(sys, "argv", ["trl-sync", "env", *plan, *given])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        totals = json.loads(capsys.readouterr().out)["totals"]
        assert cells[column] == " / ".join(f"{totals[what] / 1e9:.1f}" for what in TOTALS), flags
