"""docs/metrics.md names what runs log: nothing less, nothing else, and when."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import tiny
from trl_sync import PPOTrainer, SyncAuditCallback
from trl_sync.audit.journal import JOURNAL_NAME, read_journal

PAGE = Path(__file__).parents[2] / "docs/metrics.md"
EPISODES = 16  # of an iteration
UPDATES = 4  # of an iteration: tiny.config has 2 PPO epochs of 2 mini-batches
COLUMNS = ["name", "what it is", "unit", "logged", "healthy; else"]
# Whatever logs a name of its own.
EVERYTHING: dict[str, Any] = {
    "kl_target": 0.05,
    "kl_horizon": 64.0,
    "target_kl": 1e-10,  # far below what one update does
    "ratio_threshold": 1e9,
    "value_learning_rate": 5e-3,
    "use_score_scaling": True,
    "eval_strategy": "steps",
    "eval_steps": UPDATES,
    "save_strategy": "steps",
    "save_steps": UPDATES,
    "include_num_input_tokens_seen": "non_padding",
}


def count_e(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(text.count("e")) for text in completions]


def length(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def make(folder: Path, *, reward: Any = count_e, **options: Any) -> Any:
    """A trainer whose run has 2 iterations and a log line for each update."""
    arguments = {n: options.pop(n) for n in ("eval_dataset", "callbacks") if n in options}
    return PPOTrainer(
        tiny.config(folder, total_episodes=2 * EPISODES, **options),
        tiny.tokenizer(),
        tiny.llama(),
        reward_model=reward,
        train_dataset=tiny.prompts(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        **arguments,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run without options."""
    trainer = make(tmp_path_factory.mktemp("plain"))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An audited run with all that logs more."""
    trainer = make(
        tmp_path_factory.mktemp("full"),
        reward=[count_e, length],
        eval_dataset=tiny.prompts(3),
        callbacks=[SyncAuditCallback()],
        **EVERYTHING,
    )
    trainer._gathered_bytes = 1  # what the first gather under ZeRO-3 or FSDP2 sets
    trainer.train()
    return trainer


def tables(first_column: str) -> list[list[str]]:
    """The cells of all rows below that head; a table ends with the first line that has no cells."""
    found: list[list[str]] = []
    inside = False
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[0] == first_column:
            inside = True
        elif inside and set(line) != {"|", "-"}:
            found.append(cells)
    return found


def named(first_column: str) -> list[str]:
    """What stands in backticks in the first column of those tables."""
    return [name for cells in tables(first_column) for name in re.findall("`(.+?)`", cells[0])]


def documented() -> dict[str, str]:
    """When each name is logged, as the page says."""
    rows = tables("name")
    assert all(len(cells) == len(COLUMNS) for cells in rows)
    names = [cells[0].strip("`") for cells in rows]
    assert len(set(names)) == len(names), "a name stands there twice"
    return dict(zip(names, [cells[COLUMNS.index("logged")] for cells in rows], strict=True))


def generic(name: str) -> str:
    """The name with NAME for that of a reward source."""
    return re.sub(r"rewards/\w+/", "rewards/NAME/", name)


def lines(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def test_the_page_names_what_a_run_with_every_option_logs(full: Any) -> None:
    logged = {generic(name) for row in full.state.log_history for name in row}
    assert logged == set(documented())


def test_names_are_in_those_lines_that_the_page_says(plain: Any) -> None:
    history = plain.state.log_history
    assert len(lines(plain)) == 2 * UPDATES
    expected = {"rollout": lines(plain)[::UPDATES], "end": history[-1:]}
    for name, logged in documented().items():
        found = [row for row in history if name in row]
        kind = logged.partition(",")[0]
        if logged.startswith("with "):
            assert found == [], name
        elif kind == "each line":
            assert all(name in row for row in lines(plain)), name
        else:
            assert found == expected[kind], name


def test_numbers_are_those_sums_of_others_that_the_page_says(plain: Any) -> None:
    close = {"rel": 1e-5, "abs": 1e-6}  # fp32, sums of at most a few hundred terms
    for row in lines(plain):
        losses = row["loss/policy_avg"] + plain.args.vf_coef * row["loss/value_avg"]
        assert row["loss"] == pytest.approx(losses, **close)
        assert row["lr"] == row["learning_rate"]
    for row in lines(plain)[::UPDATES]:
        penalty = row["objective/non_score_reward"]
        assert penalty == pytest.approx(-plain.args.kl_coef * row["objective/kl"], **close)
        reward = row["objective/scores"] + penalty
        assert row["objective/rlhf_reward"] == pytest.approx(reward, **close)
        stopped = EPISODES * row["objective/stopped"]
        assert row["val/num_eos_tokens"] == pytest.approx(stopped, **close)


def test_other_tables_have_names_that_exist() -> None:
    for first_column in ("after update", "name in TRL 1.12"):
        names = named(first_column)
        assert names
        assert set(names) <= set(documented())


def test_the_audits_fields_are_those_of_a_healthy_journal(full: Any) -> None:
    events = list(read_journal(Path(full.args.output_dir) / JOURNAL_NAME))
    fields = named("field")
    assert fields
    assert set(fields) <= {f"{event['event']}.{name}" for event in events for name in event}
    assert {event["event"] for event in events} == {"begin", "audit", "save", "end"}
    assert all(event["equal"] for event in events if event["event"] == "audit")
    assert all(event["verified"] for event in events if event["event"] == "save")
    assert events[-1]["desyncs"] == 0
