"""The Python in README and docs runs, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import tiny

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def blocks() -> list[Any]:
    found = [
        pytest.param(page, code, id=f"{page.name}-{number}")
        for page in PAGES
        for number, code in enumerate(BLOCK.findall(page.read_text()))
    ]
    assert found
    return found


def reader_has() -> dict[str, Any]:
    """What a block may use without defining it: the reader's own model, tokenizer and prompts."""
    return {
        "model": tiny.llama(),
        "reward_model": tiny.reward_llama(),
        "tokenizer": tiny.tokenizer(),
        "dataset": tiny.prompts(64),
    }


@pytest.mark.parametrize("page, code", blocks())
def test_python_blocks_run(
    page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page.name, "exec"), reader_has())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_left_to_be_filled_in(page: Path) -> None:
    assert not re.findall(r"DEMO_|TODO|FIXME|XXX", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            anchors = {_anchor(heading) for heading in HEADING.findall(file.read_text())}
            assert anchor in anchors, f"{page.name} links to {target}"


def test_every_issue_in_the_questions_is_linked() -> None:
    page = (ROOT / "docs" / "faq.md").read_text()
    text, _, _ = page.partition("\n[LLaMA-Factory#")
    named = set(re.findall(r"\b([A-Za-z-]+#\d+)", text)) - {"trl#1234"}
    linked = dict(re.findall(r"^\[([\w-]+#\d+)\]: (https://\S+)$", page, re.MULTILINE))
    assert len(named) > 60
    assert named == set(linked)
    assert named == set(re.findall(r"\[([A-Za-z-]+#\d+)\](?!:)", page))
    for name, target in linked.items():
        repository, number = name.split("#")
        assert re.fullmatch(rf"https://github\.com/[\w-]+/{repository}/issues/{number}", target)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
