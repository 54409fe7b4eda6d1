"""The commands in all pages and recipes name what is there: recipes, configs, targets, flags.

Those of README are run as well: test_readme_commands.py.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import typer.main

from test_readme_commands import commands
from trl_sync.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = [*sorted((ROOT / "recipes").glob("*.py")), *sorted((ROOT / "recipes/bench").glob("*.py"))]
# What stands for a name of the reader's choice.
PLACEHOLDERS = ("recipes/NAME.py", "recipes/accelerate_configs/CONFIG.yaml")
# Written by the reader, not kept here.
OTHERS_SCRIPTS = ("my_ppo_script.py", "script.py", "train.py")
# A benchmark that hands the flags it does not know to a recipe.
PASSES_ON = {"recipes/bench/audit_overhead.py": "recipes/ppo.py"}


def documented(*programs: str) -> list[list[str]]:
    """The words of every command that starts with one of these, from pages and docstrings."""
    lines = [line for page in PAGES for line in commands(page)]
    for recipe in RECIPES:
        text = ast.get_docstring(ast.parse(recipe.read_text())) or ""
        joined = text.replace("\\\n", " ")
        lines += [line.strip() for line in joined.splitlines() if line.startswith("    ")]
    words = [shlex.split(line, comments=True) for line in lines]
    return [found for found in words if found and found[0] in programs]


def flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def test_make_has_the_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {words[1] for words in documented("make")}
    assert len(asked) > 5
    assert asked <= targets


def test_the_command_line_has_the_flags() -> None:
    subcommands = typer.main.get_group(app).commands
    asked = [words for words in documented("trl-sync") if len(words) > 1]
    assert {words[1] for words in asked} >= set(subcommands)
    for words in asked:
        if words[1].startswith("--"):
            assert words[1] in ("--install-completion", "--show-completion", "--help")
            continue
        known = {name for option in subcommands[words[1]].params for name in option.opts}
        assert flags(words) <= known, words


def launched_recipes() -> list[tuple[str, list[str]]]:
    """Each recipe with what its commands say after it."""
    found = []
    for words in documented("accelerate", "python"):
        scripts = [word for word in words if word.startswith("recipes/") and word.endswith(".py")]
        for script in scripts:
            if script not in PLACEHOLDERS:
                found.append((script, words[words.index(script) + 1 :]))
    return found


def test_launchers_find_configs_and_scripts() -> None:
    launches = documented("accelerate")
    assert len(launches) > 20
    for words in launches:
        paths = [word for word in words if word.startswith("recipes/")]
        assert paths or any(script in words for script in OTHERS_SCRIPTS), words
        for path in paths:
            assert path in PLACEHOLDERS or (ROOT / path).is_file(), words


@pytest.mark.parametrize("recipe", sorted({script for script, _ in launched_recipes()}))
def test_recipes_know_the_flags(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"--config"}
    for script in (recipe, *filter(None, [PASSES_ON.get(recipe)])):
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        monkeypatch.syspath_prepend(str((ROOT / script).parent))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert ended.value.code == 0
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for script, words in launched_recipes():
        if script == recipe:
            assert flags(words) <= known, words
