"""What docs/migration.md names exists, and what it must name is there."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import oracle
import runs
import tiny
from trl_sync import PPOConfig, PPOTrainer, renames
from trl_sync.legacy import AutoModelForCausalLMWithValueHead
from trl_sync.legacy import PPOConfig as StepConfig
from trl_sync.legacy import PPOTrainer as StepTrainer
from trl_sync.ppo import compat

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text()
NAME = re.compile(r"`([^`]+)`")

# Issues and pull requests of huggingface/trl about PPO that asked for something.
ISSUES = {
    *(3250, 3270, 3410, 2613, 2340, 2718, 4024, 2518, 2363, 2451, 3093, 1977, 6040, 3528, 3595),
    *(1979, 1674, 1702, 2577, 1395, 1302, 1916, 2344, 2353, 373, 769, 1063, 3293, 536, 1833, 1444),
    *(402, 1423, 2375, 3998, 5151, 5150, 2025, 1726, 1051, 2784, 827, 1643, 2444, 2657, 2808, 5645),
    *(583, 648, 321, 2596, 2022, 2496, 2281, 6121, 2023, 5289, 3750, 5338, 5303, 2641, 454, 3579),
    *(2071, 3332, 1784, 1900, 1540, 3071, 6414, 1650, 2095, 1379),
}
ISSUES_ELSEWHERE = {
    "modelscope/ms-swift/issues/2289",
    "modelscope/ms-swift/issues/5287",
    "unslothai/unsloth/issues/884",
    "hiyouga/LlamaFactory/issues/3186",
}


def table(first_column: str) -> list[list[str]]:
    """The rows of the table that begins with that heading, as cells."""
    lines = PAGE.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    assert rows
    return rows


def literals(cell: str) -> list[Any]:
    """The Python value in a cell, in a list; an empty list if there is none."""
    return [ast.literal_eval(text) for text in NAME.findall(cell)]


def pairs(first_column: str) -> dict[str, str]:
    rows = table(first_column)
    assert all(len(row) == 2 for row in rows)
    return {NAME.findall(left)[0]: right for left, right in rows}


def default_of(config: type, name: str) -> Any:
    (field,) = (field for field in dataclasses.fields(config) if field.name == name)
    return field.default


# --- Tests that are named


def existing_tests() -> set[str]:
    return {
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("first_column", ["number", "issue"])
def test_every_row_names_tests_that_exist_or_says_why_there_is_none(first_column: str) -> None:
    existing = existing_tests()
    for row in table(first_column):
        assert len(row) == 4, row
        named = NAME.findall(row[3])
        assert set(named) <= existing, f"{row[0]}: {set(named) - existing}"
        reason = re.match(r"out of scope: \w+ \w+ \w+", row[3])
        assert reason or named, f"{row[0]} has neither a test nor a reason"


def test_all_defects_are_listed_in_order() -> None:
    assert [row[0] for row in table("number")] == [str(number) for number in range(1, 19)]


def test_all_user_issues_are_listed() -> None:
    links = " ".join(row[0] for row in table("issue"))
    trl = re.findall(r"\[(\d+)\]\(https://github\.com/huggingface/trl/issues/(\d+)\)", links)
    assert all(text == number for text, number in trl)
    assert {int(number) for _, number in trl} == ISSUES
    others = re.findall(r"https://github\.com/((?!huggingface/trl)[^)]+)", links)
    assert set(others) == ISSUES_ELSEWHERE
    assert len(others) == len(ISSUES_ELSEWHERE)


# --- Settings, arguments, methods


def test_old_settings_are_those_of_renames() -> None:
    rows = table("old name | default then")
    new_names = {NAME.findall(row[0])[0]: NAME.findall(row[2])[0] for row in rows}
    assert new_names.pop("kl_penalty") == "kl_estimator"
    changed = {old: new for old, new in new_names.items() if old != new}
    assert changed == renames.CONFIG_RENAMES
    assert pairs("old name | what to do") == renames.CONFIG_ALTERNATIVES
    step_api = {field.name for field in dataclasses.fields(StepConfig)} - {"kl_penalty"}
    assert step_api <= new_names.keys() | renames.CONFIG_ALTERNATIVES.keys()


def test_defaults_of_old_settings() -> None:
    step_api = {field.name for field in dataclasses.fields(StepConfig)}
    for old, then, new, now, _ in table("old name | default then"):
        (old_name,), (new_name,) = NAME.findall(old), NAME.findall(new)
        if old_name == "exp_name":
            assert then == "the script's name"
        elif old_name in step_api:
            assert literals(then) == [default_of(StepConfig, old_name)], old_name
        else:
            assert not then
        assert literals(now) == [default_of(PPOConfig, new_name)], new_name


@pytest.mark.oracle
def test_settings_of_trl_and_their_defaults() -> None:
    found = {NAME.findall(row[0])[0]: literals(row[1])[0] for row in table("name | default")}
    assert found == oracle.field_defaults("experimental/ppo/ppo_config.py", "PPOConfig")
    assert found == {name: default_of(PPOConfig, name) for name in found}


def test_arguments_and_methods_are_those_of_renames() -> None:
    found = {old: NAME.findall(new)[0] for old, new in pairs("old name | name here").items()}
    assert found == renames.TRAINER_RENAMES
    assert pairs("argument of the step API") == renames.STEP_API_ARGUMENTS
    assert pairs("method of the step API") == renames.REMOVED_METHODS


def bullet(beginning: str) -> list[str]:
    """The names in the bullet of "What is the same" that begins so, after the first colon."""
    (section,) = re.findall(r"^## What is the same\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)
    bullets = re.split(r"^- ", section, flags=re.MULTILINE)
    (found,) = (text for text in bullets if text.startswith(beginning))
    names = NAME.findall(found.partition(": ")[2] or found.partition(":\n")[2])
    assert len(names) > 6
    return names


def test_what_is_called_the_same_exists(tmp_path: Path) -> None:
    trainer = runs.make(tmp_path, eval_prompts=tiny.prompts(4))
    assert set(bullet("Helpers")) == set(compat.__all__)
    assert all(callable(getattr(trainer, name)) for name in bullet("Methods"))
    for name in bullet("Attributes"):
        if name.isidentifier():
            getattr(trainer, name)
    assert all(getattr(trainer.args, name) is not None for name in bullet("The fields"))


# --- Metrics


def logged_names(folder: Path) -> set[str]:
    options: dict[str, Any] = {"kl_target": 6.0, "score_clip": 5.0, "total_episodes": 16}
    trainer: PPOTrainer = runs.train(folder, **options)
    return {name for row in trainer.state.log_history for name in row}


def step_statistics() -> set[str]:
    """What `step` returns and `log_stats` adds, without times."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny.llama())
    tokenizer = tiny.tokenizer()
    trainer = StepTrainer(StepConfig(batch_size=2, mini_batch_size=2), model, None, tokenizer)
    texts = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in ("ab", "cde")]
    logged: dict[str, Any] = {}
    trainer.accelerator.log = lambda values, **_: logged.update(values)
    stats = trainer.step(texts, texts, [text.float().mean() for text in texts])
    trainer.log_stats(stats, {}, [1.0, 2.0])
    return {name for name in logged if not name.startswith("time/")}


def test_metrics_of_both_generations_exist(tmp_path: Path) -> None:
    rows = table("statistic of `step`")
    assert {NAME.findall(row[0])[0] for row in rows} == step_statistics()
    here = {name for row in rows for name in NAME.findall(row[1])}
    assert len(here) > 10
    assert here <= logged_names(tmp_path)
