"""The PPO recipes other than ppo.py, as users start them, and what they reward."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest
from datasets import Dataset
from safetensors.torch import load_file

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


def own_model(folder: Path) -> Path:
    """A causal LM that knows nothing, with its tokenizer."""
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def own_data(file: Path, rows: list[dict[str, str]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    Dataset.from_list(rows).to_json(file)
    return file


def short_run(recipe: str, folder: Path, **paths: Any) -> dict[str, Any]:
    """The summary of 16 episodes with the user's own model and data."""
    arguments = {
        "output_dir": folder / "out",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "total_episodes": 16,
        "response_length": 4,
        "logging_steps": 1,
        "report_to": "none",
    }
    flags = [
        str(text) for name, value in (arguments | paths).items() for text in (f"--{name}", value)
    ]
    return outcome(launch(recipe, *flags, ranks=1), folder / "out")


@pytest.mark.slow
def test_the_users_own_questions(tmp_path: Path) -> None:
    """A dataset like GSM8K, and a model that knows nothing."""
    rows = [{"question": f"abc {a}?", "answer": f"so\n#### {a}"} for a in range(40)]
    figures = short_run(
        "ppo_math.py",
        tmp_path,
        model_name_or_path=own_model(tmp_path),
        dataset_path=own_data(tmp_path / "questions.jsonl", rows),
    )
    assert figures["accuracy_after"] < 0.5


@pytest.mark.slow
def test_the_users_own_posts(tmp_path: Path) -> None:
    """With a reward model that was trained before: a sequence classifier."""
    tiny.reward_llama().save_pretrained(tmp_path / "reward")
    tiny.tokenizer().save_pretrained(tmp_path / "reward")
    rows = [{"prompt": f"a b {letter}"} for letter in "cdefghij" * 5]
    figures = short_run(
        "ppo_tldr.py",
        tmp_path,
        model_name_or_path=own_model(tmp_path),
        reward_model_path=tmp_path / "reward",
        dataset_name=own_data(tmp_path / "posts" / "train.jsonl", rows).parent,
    )
    assert "right_after" not in figures  # there is no judge of one's own posts
    assert figures["model_state_bytes"]["reward"] > 0


@pytest.mark.slow
def test_the_users_own_reward_adapter(tmp_path: Path) -> None:
    """The two commands of the recipe: train the adapter on the model, then share its base."""
    model = own_model(tmp_path)
    texts = [f"a b {letter}" for letter in "cdefghij" * 5]
    pairs = [{"prompt": text, "chosen": text[::-1], "rejected": text} for text in texts]
    arguments = {
        "model_name_or_path": model,
        "lora_task_type": "SEQ_CLS",
        "lora_target_modules": "all-linear",
        "dataset_name": own_data(tmp_path / "pairs" / "train.jsonl", pairs).parent,
        "output_dir": tmp_path / "my-reward",
        "max_steps": 2,
        "report_to": "none",
    }
    flags = [str(text) for name, value in arguments.items() for text in (f"--{name}", value)]
    done = launch("reward_audited.py", *flags, "--use_peft", ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [{"prompt": text} for text in texts]
    figures = short_run(
        "ppo_multi_reward.py",
        tmp_path,
        model_name_or_path=model,
        reward_model_path=tmp_path / "my-reward",
        dataset_name=own_data(tmp_path / "prompts" / "train.jsonl", rows).parent,
    )
    adapter = load_file(tmp_path / "my-reward" / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.any() for name, tensor in adapter.items())
    # It is in memory with its score head, and no second model is.
    held = sum(tensor.nbytes for tensor in adapter.values())
    assert figures["model_state_bytes"]["reward"] == held


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
