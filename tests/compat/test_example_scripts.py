"""TRL's example scripts: unchanged through the shim, and with one import changed."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import example_models

SCRIPTS = Path(__file__).parent / "scripts"
TRL_IMPORT = "from trl.experimental.ppo import PPOConfig, PPOTrainer"
OWN_IMPORT = "from trl_sync import PPOConfig, PPOTrainer"
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_ppo_epochs": 2,
    "total_episodes": 16,
    "response_length": 6,
    "learning_rate": 1e-3,
    "missing_eos_penalty": 1.0,
    "stop_token": "eos",
    "logging_steps": 1,
    "num_sample_generations": 2,
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
FILES = {"tokenizer.json", "tokenizer_config.json", "training_args.bin"}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of both scripts: local models and prompts, and a run of a second."""
    return [*example_models.write(tmp_path_factory.mktemp("models")), *_settings()]


def _settings() -> list[str]:
    return [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def _check_full(output: str, folder: Path, options: list[str]) -> None:
    """The saved policy is a whole model that moved; completions were printed."""
    model = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in folder.iterdir()} >= FILES | model
    sft = Path(options[options.index("--sft_model_path") + 1])
    before, after = (load_file(place / "model.safetensors") for place in (sft, folder))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    _check_run(output, folder)


def _check_peft(output: str, folder: Path) -> None:
    """The saved adapter was trained; completions were printed."""
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {file.name for file in folder.iterdir()} >= FILES | adapter
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)
    _check_run(output, folder)


def _check_run(output: str, folder: Path) -> None:
    """Completions were printed, and both rollouts of the run were measured."""
    for column in ("query", "model response", "score"):
        assert column in output
    assert _steps_with("objective/rlhf_reward", folder) == [1, 3]


def _steps_with(metric: str, folder: Path) -> list[int]:
    """The steps of the last checkpoint's log that have that metric."""
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [line["step"] for line in state["log_history"] if metric in line]


def _run_with_shim(script: str, arguments: list[str], home: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "trl_sync.shim", str(SCRIPTS / script), *arguments],
        env=os.environ | {"HF_HOME": str(home), "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.newest
@pytest.mark.slow
def test_ppo_with_the_shim(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    output = _run_with_shim("ppo.py", [*options, "--output_dir", str(folder)], tmp_path)
    _check_full(output, folder, options)


@pytest.mark.newest
@pytest.mark.slow
def test_ppo_tldr_with_the_shim(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    arguments = [*options, "--output_dir", str(folder), "--use_peft", "--lora_r", "4"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "2"]
    output = _run_with_shim("ppo_tldr.py", arguments, tmp_path)
    _check_peft(output, folder)
    assert _steps_with("eval_objective/scores", folder) == [2, 4]


def _run_with_import_changed(
    script: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (SCRIPTS / script).read_text()
    assert source.count(TRL_IMPORT) == 1
    changed = tmp_path / script
    changed.write_text(source.replace(TRL_IMPORT, OWN_IMPORT))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(changed), run_name="__main__")


def test_ppo_with_the_import_changed(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "saved"
    arguments = [*options, "--output_dir", str(folder), "--use_peft", "--lora_r", "4"]
    _run_with_import_changed("ppo.py", arguments, tmp_path, monkeypatch)
    _check_peft(capsys.readouterr().out, folder)


def test_ppo_tldr_with_the_import_changed(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "saved"
    arguments = [*options, "--output_dir", str(folder), "--eval_strategy", "epoch"]
    _run_with_import_changed("ppo_tldr.py", arguments, tmp_path, monkeypatch)
    _check_full(capsys.readouterr().out, folder, options)


def test_ppo_tldr_quantized_with_the_import_changed(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "saved"
    arguments = [*options, "--output_dir", str(folder), "--use_peft", "--lora_r", "4"]
    arguments += ["--load_in_4bit", "--eval_strategy", "epoch"]
    _run_with_import_changed("ppo_tldr.py", arguments, tmp_path, monkeypatch)
    _check_peft(capsys.readouterr().out, folder)


def test_a_policy_without_a_row_for_the_added_padding_reloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Llama 3: the embeddings have a row for each token of its tokenizer and no more."""
    folder = tmp_path / "saved"
    tokens = len(example_models.tokenizer_without_padding())
    options = example_models.write(tmp_path, vocab_size=tokens)
    arguments = [*options, *_settings(), "--output_dir", str(folder)]
    _run_with_import_changed("ppo_tldr.py", arguments, tmp_path, monkeypatch)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == tokens
    policy = AutoModelForCausalLM.from_pretrained(folder)
    assert policy.get_input_embeddings().weight.shape[0] == tokens
