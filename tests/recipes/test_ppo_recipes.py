"""The PPO recipes other than ppo.py, as users start them, and what they reward."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest
from datasets import Dataset

import ppo_math
import ppo_multi_reward
import ppo_tldr
import tiny
from recipe_launch import launch

# An iteration of the settings that the recipes share, and a second one.
SHORT = ("--total_episodes", "256", "--num_ppo_epochs", "1")


def outcome(done: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert figures["desyncs"] == 0
    assert figures["audits"] > 2
    assert (folder / "learning_curve.png").is_file()
    return figures


def in_its_default(recipe: str, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the log of a run without arguments, in a folder of its own."""
    done = launch(recipe, "--output_dir", str(folder), ranks=1, timeout_s=600)
    state = json.loads((folder / "trainer_state.json").read_text())
    return outcome(done, folder), state["log_history"]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_sums_are_learned(tmp_path: Path) -> None:
    figures, log = in_its_default("ppo_math.py", tmp_path)
    assert figures["accuracy_after"] > figures["accuracy_before"] + 0.05
    # The curve: the share of right answers at every rollout.
    curve = [row["objective/scores"] for row in log if "objective/scores" in row]
    assert len(curve) > 5
    assert all(0.0 <= share <= 1.0 for share in curve)
    assert sum(curve[-5:]) > sum(curve[:5])


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_summaries_are_learned(tmp_path: Path) -> None:
    figures, _ = in_its_default("ppo_tldr.py", tmp_path)
    assert figures["right_after"] > figures["right_before"] + 0.2


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_sum_of_two_rewards_rises(tmp_path: Path) -> None:
    figures, _ = in_its_default("ppo_multi_reward.py", tmp_path)
    assert figures["reward_last"] > figures["reward_first"] + 1.0


@pytest.mark.slow
@pytest.mark.ranks
def test_sums_on_two_ranks(tmp_path: Path) -> None:
    done = launch("ppo_math.py", *SHORT, "--output_dir", str(tmp_path), ranks=2)
    figures = outcome(done, tmp_path)
    # Taught by examples of which six in ten are wrong: it knows some, not all.
    assert 0.1 < figures["accuracy_before"] < 1.0
    assert figures["world_size"] == 2


@pytest.mark.slow
def test_the_users_own_questions(tmp_path: Path) -> None:
    """A dataset like GSM8K, and a model that knows nothing."""
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"abc {a}?", "answer": f"so\n#### {a}"} for a in range(40)]
    Dataset.from_list(rows).to_json(tmp_path / "questions.jsonl")
    arguments = {
        "model_name_or_path": tmp_path / "model",
        "dataset_path": tmp_path / "questions.jsonl",
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "total_episodes": 16,
        "response_length": 4,
        "logging_steps": 1,
        "report_to": "none",
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    figures = outcome(launch("ppo_math.py", *flags, ranks=1), tmp_path / "out")
    assert figures["accuracy_after"] < 0.5


@pytest.mark.slow
@pytest.mark.ranks
def test_summaries_on_two_ranks(tmp_path: Path) -> None:
    done = launch("ppo_tldr.py", *SHORT, "--output_dir", str(tmp_path), ranks=2)
    figures = outcome(done, tmp_path)
    assert 0.1 < figures["right_before"] < 0.9
    assert (tmp_path / "reward" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.ranks
def test_two_rewards_on_two_ranks(tmp_path: Path) -> None:
    done = launch("ppo_multi_reward.py", *SHORT, "--output_dir", str(tmp_path), ranks=2)
    figures = outcome(done, tmp_path)
    assert figures["words_before"] > 0
    # One base: the reward is an adapter, and no second model is in memory.
    assert figures["model_state_bytes"]["reward"] < figures["model_state_bytes"]["base"]
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    logged = {name for row in state["log_history"] for name in row}
    assert any("close_to_length" in name for name in logged)


@pytest.mark.parametrize(
    "text, number",
    [
        (" 17", 17.0),
        ("first 3, then 4\n#### 1,234", 1234.0),
        ("it costs $-2.50.", -2.5),
        ("no number", None),
    ],
)
def test_the_last_number_is_the_answer(text: str, number: float | None) -> None:
    assert ppo_math.last_number(text) == number


def test_only_the_right_number_is_rewarded() -> None:
    completions = [" 17", " 17.0 or so", " 18", "none"]
    assert ppo_math.is_right(completions, answer=["17"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert ppo_math.is_right(["no number"], answer=["none either"]) == [0.0]


def test_every_sum_is_asked_and_has_its_answer() -> None:
    train, test = ppo_math.sums(seed=3)
    assert set(train["prompt"]) == set(test["prompt"])
    assert len(test) == 100
    assert len(train) == 1000
    answers = dict(zip(test["prompt"], test["answer"], strict=True))
    assert answers["7 + 5 ="] == "12"


def test_a_summary_is_right_or_bad() -> None:
    post = "To me the soup at the harbour cafe was splendid. Everyone left delighted."
    assert ppo_tldr.right_summary(post) == " They liked it."
    bad = {ppo_tldr.bad_summary(post, Random(seed)) for seed in range(20)}
    assert bad == {" They disliked it.", " They were undecided.", " " + post}


def test_the_wanted_length_is_the_best() -> None:
    texts = [" ".join(["word"] * count) for count in (6, 12, 18)]
    assert ppo_multi_reward.close_to_length(texts) == [-0.5, 0.0, -0.5]
