"""`recipes/ppo.py` as users start it: a process of its own, on one and on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
from recipe_launch import launch

ROOT = Path(__file__).parents[2]
RECIPE = "ppo.py"
FIGURES = (
    *("reward_first", "reward_last", "distinct_completions", "kl_last", "episodes", "wall_s"),
    *("episodes_per_s", "peak_rss_bytes", "quantization", "trainable_parameters"),
    *("base_parameters", "model_state_bytes"),
)
SMALL = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "total_episodes": 32,
    "response_length": 6,
    "num_sample_generations": 0,
    "logging_steps": 4,
    "save_strategy": "no",
    "report_to": "none",
}


def flags(**values: Any) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def summary(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert set(FIGURES) <= set(figures)
    return figures


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a reward model, prompts, conversations and a reward function on disk."""
    folder = tmp_path_factory.mktemp("local")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny.reward_llama().save_pretrained(folder / "reward")
    prompts = tiny.prompts(40)
    prompts.to_json(folder / "prompts.jsonl")
    chats = [{"prompt": [{"role": "user", "content": p}]} for p in prompts["prompt"]]
    Dataset.from_list(chats).to_json(folder / "chats.jsonl")
    (folder / "rewards.py").write_text(
        "def length(prompts, completions):\n"
        "    assert prompts[0][-1]['role'] == 'user'\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_embedded_task_is_learned(seed: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = launch(RECIPE, *flags(output_dir=out, seed=seed, total_episodes=1280))
    assert done.returncode == 0, done.stderr
    figures = summary(out)
    assert figures["quantization"] == "nf4"
    assert figures["reward_last"] - figures["reward_first"] >= figures["reward_first_std"]
    assert figures["positive_share_after"] - figures["positive_share_before"] >= 0.20
    assert figures["distinct_completions"] >= 0.5
    assert figures["kl_last"] < 15
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "Before and after" in done.stdout
    assert "reward=" in done.stderr  # the progress bar
    assert "KL=" in done.stderr
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert sum("objective/scores" in row for row in history) == 10
    assert (out / "adapter_model.safetensors").is_file()
    assert (out / "value" / "value_head.safetensors").is_file()
    # One audit an update, one at the start and one at the end.
    assert figures["audits"] == 10 * 8 + 2
    assert figures["desyncs"] == 0
    assert (
        0 < figures["audit_share_of_step"] < 0.05
    )  # loose: the machine is busy; see recipes/bench
    assert "sync audit: 82 audits, no desync" in done.stdout
    first = json.loads((out / "sync_audit.jsonl").read_text().splitlines()[0])
    assert set(first["roles"]) == {"policy", "value", "reference", "reward"}


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_a_local_model_conversations_a_function_and_a_config_file(
    local: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = tmp_path / "settings.yaml"
    settings = SMALL | {"learning_rate": 1e-3, "dataset_path": str(local / "chats.jsonl")}
    config.write_text(yaml.safe_dump(settings))
    named = flags(
        config=config,
        model_name_or_path=local / "model",
        reward_function=f"{local / 'rewards.py'}:length",
        output_dir=out,
    )
    done = launch(RECIPE, *named, ranks=2)
    assert done.returncode == 0, done.stderr
    figures = summary(out)
    assert figures["world_size"] == 2
    assert figures["episodes"] == 32
    assert figures["audits"] > 2
    assert figures["desyncs"] == 0
    assert figures["quantization"] == "nf4"
    assert "positive_share_after" not in figures
    assert done.stdout.count("Before and after") == 1


@pytest.mark.slow
def test_a_local_model_and_reward_model_without_quantization(local: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    named = flags(
        model_name_or_path=local / "model",
        reward_model_path=local / "reward",
        dataset_path=local / "prompts.jsonl",
        output_dir=out,
        stop_token="eos",
        eval_strategy="steps",
        eval_steps=4,
        **SMALL,
    )
    done = launch(RECIPE, *named, "--no_quantization", "--no_audit")
    assert done.returncode == 0, done.stderr
    assert not (out / "sync_audit.jsonl").exists()
    assert "audits" not in summary(out)
    assert summary(out)["quantization"] == "none"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_objective/scores" in row for row in history) == 4
    base = AutoModelForCausalLM.from_pretrained(local / "model")
    PeftModel.from_pretrained(base, str(out))


@pytest.mark.slow
def test_a_flag_that_only_fits_the_embedded_settings(tmp_path: Path) -> None:
    # Three does not divide the rollout batch of the embedded settings; TRL's default is one.
    done = launch(RECIPE, *flags(num_mini_batches=3, output_dir=tmp_path / "run"))
    assert "gradient_accumulation_steps=4" in done.stderr


@pytest.mark.slow
def test_a_mistake_is_one_line_and_leaves_no_folder(local: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    named = flags(
        model_name_or_path=local / "model", dataset_path=local / "prompts.jsonl", output_dir=out
    )
    done = launch(RECIPE, *named)
    assert done.returncode != 0
    assert "error: No reward source" in done.stderr
    assert 'ppo.py", line' not in done.stderr  # no traceback of the recipe
    assert not out.exists()


@pytest.mark.slow
def test_help_names_every_group_of_flags() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / RECIPE), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    groups = [
        *("data, reward and precision:", "--dataset_path", "PPO:", "--num_ppo_epochs"),
        *("model, LoRA and quantization:", "--lora_r", "as in every Trainer:", "--max_grad_norm"),
    ]
    assert [shown.index(text) for text in groups] == sorted(shown.index(text) for text in groups)
    # One line of usage, not two hundred flags.
    assert shown.index("PPO on one shared 4-bit base") < 200
