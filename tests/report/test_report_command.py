"""`trl-sync report`: what is printed and written, and the exit codes, for run folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_folders import journal_lines
from trl_sync.cli import main
from trl_sync.cli import report as command

Call = Callable[..., tuple[int, str, str]]
HEALTHY = [line for line in journal_lines() if line["event"] != "desync"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command; its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trl-sync", "report", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, printed.out, printed.err

    return run


def test_a_run_folder_is_printed_and_has_a_page(call: Call, make_run: Any) -> None:
    folder = make_run()
    code, out, err = call(folder)
    assert (code, err) == (3, "")
    assert f"{folder / 'sync_audit.jsonl'}: 2 runs" in out
    assert f"page     {folder / 'report.html'}" in out
    assert "10 PNGs beside it" in out
    assert (folder / "report.html").is_file()
    assert len(list(folder.glob("report-*.png"))) == 10


def test_json_stays_json(call: Call, make_run: Any) -> None:
    folder = make_run()
    code, out, err = call(folder, "--json")
    assert code == 3
    assert json.loads(out)["journal"] == str(folder / "sync_audit.jsonl")
    assert "report.html" in err


def test_without_a_page_nothing_is_written(call: Call, make_run: Any) -> None:
    folder = make_run(journal=HEALTHY)
    before = sorted(folder.iterdir())
    code, out, _ = call(folder, "--no-html")
    assert code == 0
    assert "page     " not in out
    # What a page would need is not even read.
    (folder / "summary.json").write_text("{")
    assert call(folder, "--no-html")[0] == 0
    assert sorted(folder.iterdir()) == before


def test_a_journal_alone_has_no_page(call: Call, make_run: Any) -> None:
    folder = make_run()
    assert call(folder / "sync_audit.jsonl")[0] == 3
    assert not (folder / "report.html").exists()
    code, _, err = call(folder / "sync_audit.jsonl", "--output", folder / "page.html")
    assert code == 2
    assert "--output is for the page of run folders" in err


def test_several_runs_on_one_page(call: Call, make_run: Any, tmp_path: Path) -> None:
    first, second = make_run("first", journal=HEALTHY), make_run("second")
    code, out, _ = call(first, second, "--output", tmp_path / "both.html")
    assert code == 3
    assert str(first) in out
    assert str(second) in out
    assert "Settings that differ" in (tmp_path / "both.html").read_text()
    assert not (first / "report.html").exists()
    content = json.loads(call(first, second, "--json")[1])
    assert content["desynced"] is True
    assert [report["desynced"] for report in content["reports"]] == [False, True]


def test_a_run_that_was_not_audited_has_a_page(call: Call, make_run: Any) -> None:
    folder = make_run(journal=None)
    code, out, _ = call(folder)
    assert code == 0
    assert "no sync_audit.jsonl" in out
    assert (folder / "report.html").is_file()
    assert json.loads(call(folder, "--json")[1]) == {
        "journal": None,
        "desynced": False,
        "runs": [],
    }
    assert call(folder, "--no-html")[0] == 2


def test_a_file_that_cannot_be_read_is_one_line(call: Call, make_run: Any) -> None:
    folder = make_run(summary="{")
    code, out, err = call(folder)
    assert code == 2
    assert out == ""
    assert err.startswith(f"error: {folder / 'summary.json'}: not JSON")
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "line",
    [
        {"event": "end", "audits": 1, "size_bytes": 1, "seconds": "a", "share_of_step": "b"},
        {"event": "audit", "step": 1, "size_bytes": "many"},
        {"event": "desync", "step": 1, "findings": [{"cause": 1, "step": 1, "ranks": 5}]},
        {"event": "begin", "step": 0, "world_size": 2, "scopes": 7},
    ],
)
def test_a_line_of_another_form_is_one_line(call: Call, make_run: Any, line: Any) -> None:
    code, _, err = call(make_run(journal=[line, line]))
    assert code == 2
    assert "sync_audit.jsonl is not as this version writes it" in err
    assert err.count("\n") == 1


def test_a_page_that_was_asked_for_and_cannot_be_written(
    call: Call, make_run: Any, tmp_path: Path
) -> None:
    code, _, err = call(make_run(), "--output", tmp_path / "nowhere" / "page.html")
    assert code == 2
    assert f"--output: cannot write {tmp_path / 'nowhere' / 'page.html'}: No such file" in err


def test_a_folder_that_cannot_be_written_to_leaves_the_exit_code(
    call: Call, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command, "write_report", refuse)
    code, out, err = call(make_run())
    assert code == 3
    assert "2 runs" in out
    assert "Permission denied. Name another place with --output" in err
