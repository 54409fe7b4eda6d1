"""The page of a run: what it shows, that it needs nothing else, and that nothing gets out of it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from report_pages import Page, needs_nothing_else
from run_folders import COMPLETIONS, RECORD, journal_lines, log_row
from trl_sync.errors import ConfigError
from trl_sync.report import read_runs, write_completions, write_report

NASTY = "</title></style></pre><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"


def page_of(*folders: Path) -> Page:
    text = write_report(read_runs(folders), folders[0] / "report.html").page.read_text("utf-8")
    page = Page(text)
    needs_nothing_else(page)
    return page


def test_the_page_of_a_run(make_run: Any) -> None:
    folder = make_run()
    page = page_of(folder)
    titles = ["Reward", "KL to the reference", "Value explained variance", "Entropy of the policy"]
    titles += ["Clip fractions", "Response length", "Loss", "Gradient norm", "Learning rate"]
    titles += ["Time by phase"]
    for title in titles:
        assert title in page.text
    assert page.count("figure", "chart") == len(titles)
    assert "last 1.5" in page.text  # the reward of the third iteration
    assert "episodes" in page.text
    assert "Mean score 0 before, 1 after training." in page.text
    assert "2 + 2 =" in page.text
    assert "learning_rate 0.001" in page.text
    assert "nested.a [1, 2]" in page.text
    assert "torch 2.13.0" in page.text
    assert "Not there" not in page.text


def test_a_png_of_each_chart_lies_beside_the_page(make_run: Any) -> None:
    folder = make_run()
    written = write_report(read_runs([folder]), folder / "mine.html")
    assert written.plots is not None
    assert len(written.plots) == 10
    assert folder / "mine-reward.png" in written.plots
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in written.plots)


def test_without_matplotlib_there_is_a_page_all_the_same(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = make_run()
    written = write_report(read_runs([folder]), folder / "report.html")
    assert written.plots is None
    assert written.page.is_file()
    assert not list(folder.glob("*.png"))


def test_every_event_of_the_audit_is_marked_and_explained(make_run: Any) -> None:
    page = page_of(make_run())
    kinds = ["begin", "warning", "desync", "repair", "save", "save_without_manifest", "end"]
    kinds += ["begin", "resume", "not_compared", "rank_missing"]
    for number, kind in enumerate(kinds, start=1):
        assert page.count("g", f"k-{kind}") == kinds.count(kind)
        assert f"{number} {kind} at step" in page.text
    assert page.count("svg", "timeline") == 2
    assert "1 desync in 6 audits" in page.text
    assert "cause stale_replica ranks 1 tensor body.weight, and 1 more" in page.text
    assert "step 3, body.weight: rank 0 holds d620" in page.text
    assert "rank 1 was killed" in page.text
    assert "full disk" in page.text
    assert "No end was written" in page.text
    # Of two rows of one attempt each a stretch of rank 1 parted, warned, missing.
    assert [page.count("rect", kind) for kind in ("parted", "warned", "missing")] == [1, 1, 1]


def put_everywhere(value: Any) -> Any:
    """`value` with the nasty text as every name that a run chooses, and as every text."""
    if isinstance(value, dict):
        return {name: put_everywhere(item) for name, item in value.items()} | {NASTY: NASTY}
    if isinstance(value, list):
        return [put_everywhere(item) for item in value]
    return NASTY if isinstance(value, str) else value


def test_no_text_of_a_run_becomes_markup(make_run: Any) -> None:
    """Wherever a run can put text: names of metrics, findings, answers, settings, folders."""
    lines = [put_everywhere(line) | {"event": line["event"]} for line in journal_lines()]
    for line in lines:
        for found in line.get("findings", []):
            found["cause"] = NASTY
    lines.append({"event": NASTY, "step": 1, "message": NASTY})
    rows = [log_row(n, 1.0) | {NASTY: NASTY, f"rewards/{NASTY}/mean": 1.0} for n in (1, 2)]
    rows[1]["objective/kl"] = NASTY
    answers = [put_everywhere(row) for row in COMPLETIONS]
    folder = make_run(
        "<b>&run",
        log={"log_history": rows},
        journal=lines,
        summary={NASTY: NASTY, "reward_first": NASTY},
        record=put_everywhere(copy.deepcopy(RECORD)),
        completions=answers,
    )
    page = page_of(folder)
    assert "<script>alert(1)</script>" in page.text
    assert "Run report: <b>&run" in page.text
    # Two runs show the same in other places, such as legends and headings of tables.
    other = make_run("<i>", log={"log_history": rows}, record=put_everywhere(RECORD))
    assert "<script>alert(1)</script>" in page_of(folder, other).text


def test_characters_that_no_page_may_hold_are_replaced(make_run: Any) -> None:
    text = "a\x00b\x1b[31mc\u202ed\ud800e"
    answers = [{"query": text, "before": None, "after": {"model response": text, "score": 1.0}}]
    page = page_of(make_run(completions=answers))
    assert "a\ufffdb\ufffd[31mc\ufffdd?e" in page.text


@pytest.mark.parametrize(
    "what, text, complaint",
    [
        ("log", '{"log_history": [', "trainer_state.json: not JSON"),
        ("log", "[1, 2]", "expected a JSON object, found list"),
        ("log", '{"log_history": {"loss": 1}}', "log_history is not a list"),
        ("log", '{"log_history": [1]}', "log_history is not a list of objects"),
        ("log", "[" * 100_000, "trainer_state.json: nested too deeply"),
        ("summary", "null", "summary.json: expected a JSON object"),
        ("summary", f'{{"reward_last": 1{"0" * 5000}}}', "summary.json: Exceeds the limit"),
        ("record", '{"config": ', "run_record.json: not JSON"),
        ("completions", '{"a": 1}\n{}\n', "completions.jsonl, row 1: no 'query'"),
        ("completions", '{"query": 1, "before": 2}\n', "an answer has no 'model response'"),
        ("completions", "oops\n{}\n", "completions.jsonl, line 1: not JSON"),
        ("completions", "[1]\n{}\n", "completions.jsonl, line 1: expected a JSON object"),
        ("journal", '{"event": "audit", "step": "<b>"}\n', "step is str, not a whole number"),
        ("journal", '{"event": "audit", "step": -1}\n', "step is out of range"),
        ("journal", '{"event": "begin", "world_size": true}\n', "world_size is bool"),
        ("journal", '{"event": "desync", "step": 1, "findings": 3}\n', "findings is int, not a"),
        ("journal", '{"event": "desync", "step": 1, "findings": [3]}\n', "a finding is not an"),
        ("journal", "x\ny\n", "sync_audit.jsonl, line 1: not JSON"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_it(
    make_run: Any, what: str, text: str, complaint: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read_runs([make_run(**{what: text})])
    assert complaint in str(error.value)
    assert str(error.value).count("\n") == 0


def test_a_file_that_is_too_large_is_not_read(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_sync.report.files.LIMIT_BYTES", 100)
    with pytest.raises(ConfigError, match="a report reads files of at most 100"):
        read_runs([make_run()])


def test_last_lines_that_were_cut_short_are_left_out(make_run: Any) -> None:
    lines = '{"event": "audit", "step": 1, "equal": true}\n{"event": "desy'
    answers = '{"query": "q", "after": {"model response": "whole", "score": 1}}\n{"query": "'
    [run] = read_runs([make_run(journal=lines, completions=answers)])
    assert [attempt.audits for attempt in run.attempts] == [[(1, True)]]
    assert [completion.query for completion in run.completions] == ["q"]


def test_numbers_that_cannot_be_drawn_are_left_out_and_counted(make_run: Any) -> None:
    values: list[Any] = [1.0, float("nan"), float("inf"), "2", None, True, 10**400, 3.0]
    rows = [{"episode": n, "step": n, "loss": value} for n, value in enumerate(values)]
    page = page_of(make_run(log={"log_history": rows}))
    assert "6 values not finite, left out." in page.text


@pytest.mark.parametrize(
    "values", [[0.0], [2.0, 2.0], [1e-300, 2e-300], [1e149, -1e149], [0, 5e-324]]
)
def test_any_range_can_be_drawn(make_run: Any, values: list[float]) -> None:
    rows = [{"episode": value, "loss": value} for value in values]
    assert page_of(make_run(log={"log_history": rows})).count("figure", "chart") == 1


def test_what_is_missing_is_said(make_run: Any) -> None:
    rest = dict.fromkeys(["log", "summary", "record", "completions"])
    page = page_of(make_run(**rest))
    for text in ("no curves", "no summary", "no configuration", "no completions"):
        assert f"Not there: {text}" in page.text
    assert "Not there: no audit" not in page.text


def test_the_log_of_the_last_checkpoint_will_do(make_run: Any) -> None:
    folder = make_run(log=None)
    for step in (2, 10):
        (folder / f"checkpoint-{step}").mkdir()
        state = folder / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
    [run] = read_runs([folder])
    assert run.log_file == "checkpoint-10/trainer_state.json"
    assert run.log[0]["step"] == 10


def test_a_folder_with_nothing_of_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds nothing of a run"):
        read_runs([tmp_path])


def test_a_link_in_the_folder_is_replaced_and_not_written_through(
    make_run: Any, tmp_path: Path
) -> None:
    folder, precious = make_run(), tmp_path / "precious"
    precious.write_text("mine")
    for name in ("report.html", "report-reward.png"):
        (folder / name).symlink_to(precious)
    page_of(folder)
    assert precious.read_text() == "mine"
    assert not (folder / "report.html").is_symlink()


def test_two_runs_are_compared(make_run: Any) -> None:
    config = {"learning_rate": 2e-3, "seed": 42, "output_dir": "runs/b", "extra": None}
    rows = [log_row(n, reward=-1.0 * n) for n in range(1, 4)]
    first = make_run("first")
    second = make_run(
        "second",
        log={"log_history": rows},
        summary={"reward_last": -3.0},
        record=RECORD | {"config": config},
        journal=None,
    )
    page = page_of(first, second)
    # Clip fractions and times have two names each, so two charts each.
    assert page.count("figure", "chart") == 12
    assert page.count("path", "c1") == page.count("path", "c2") == 12
    assert "Reward mean of episodes first 1.5 second -3" in page.text
    rows_text = page.text.rpartition("Settings that differ")[2].partition("Curves")[0]
    assert "learning_rate 0.001 0.002" in rows_text
    assert "seed" not in rows_text
    assert "output_dir" not in rows_text
    assert "reward_last 1.5 -3" in page.text
    assert "audit: desyncs 2 -" in page.text


def test_runs_of_one_name_are_told_apart(make_run: Any, tmp_path: Path) -> None:
    folders = []
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        folders.append(make_run(f"{parent}/out"))
    names = [run.name for run in read_runs(folders)]
    assert names == [f"1: {folders[0]}", f"2: {folders[1]}"]


def test_another_trainers_curves_go_by_steps(make_run: Any) -> None:
    rows = [
        {"step": n, "loss": 1.0 / n, "reward": n, "rewards/f/mean": n, "rewards/f/std": 0.0}
        for n in (1, 2)
    ]
    page = page_of(make_run(log={"log_history": [*rows, {"step": 2, "eval_loss": 0.3}]}))
    assert "optimizer steps" in page.text
    assert "Loss training 0.5 evaluation 0.3" in page.text
    assert "Rewards by source mean last 2" in page.text
    assert page.count("figure", "chart") == 3


# completions.jsonl


def columns(queries: list[str], scores: list[Any]) -> dict[str, list[Any]]:
    texts = [f"answer to {query}" for query in queries]
    return {"query": queries, "model response": texts, "score": scores}


def test_completions_of_the_same_prompts_share_a_line(tmp_path: Path) -> None:
    after = columns(["a", "a"], [2, float("nan")])
    write_completions(tmp_path, columns(["a", "a"], [0, 1.5]), after)
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [line["query"] for line in lines] == ["a", "a"]
    assert lines[0]["before"] == {"model response": "answer to a", "score": 0.0}
    assert [line["after"]["score"] for line in lines] == [2.0, None]


def test_completions_of_other_prompts_have_lines_of_their_own(tmp_path: Path) -> None:
    write_completions(tmp_path, columns(["a"], [0]), columns(["b", "c"], [1, 3]))
    [run] = read_runs([tmp_path])
    assert [(c.query, c.before is None, c.after is None) for c in run.completions] == [
        ("a", False, True),
        ("b", True, False),
        ("c", True, False),
    ]


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"score": None}, "before training have no column 'score'"),
        ({"score": [1.0]}, "before training differ in length"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    good = columns(["a", "b"], [1, 2])
    bad = {name: value for name, value in (good | change).items() if value is not None}
    with pytest.raises(ConfigError, match=complaint):
        write_completions(tmp_path, bad, good)
    assert not list(tmp_path.iterdir())
