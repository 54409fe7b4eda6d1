"""The audited recipes as they are started: SFT, DPO with and without adapters, and the drill."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from safetensors.torch import load_file

import tiny
from recipe_launch import launch
from trl_sync.audit.journal import JOURNAL_NAME, read_journal

pytestmark = pytest.mark.slow

REWARD = (
    "def short(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"
)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_journal(folder / JOURNAL_NAME) if event["event"] == kind]


def assert_silent(folder: Path, done: subprocess.CompletedProcess[str], ranks: int) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sync audit: ") == 1
    assert "no desync" in done.stdout
    (begin,) = events(folder, "begin")
    assert begin["world_size"] == ranks
    (end,) = events(folder, "end")
    assert end["desyncs"] == 0
    assert {event["step"] for event in events(folder, "audit")} >= {1, 2, 3, 4}


def test_sft_on_one_process(tmp_path: Path) -> None:
    # Saves, so that the checkpoint has a manifest.
    arguments = ["--max_steps", "4", "--save_steps", "4", "--output_dir", str(tmp_path)]
    assert_silent(tmp_path, launch("sft_audited.py", *arguments, ranks=1), ranks=1)
    assert (tmp_path / "model.safetensors").is_file()
    (save,) = events(tmp_path, "save")
    assert save["verified"] is True
    assert (tmp_path / "checkpoint-4" / "sync_manifest.json").is_file()


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_sft_without_flags(ranks: int, tmp_path: Path) -> None:
    done = launch("sft_audited.py", "--output_dir", str(tmp_path), ranks=ranks)
    assert_silent(tmp_path, done, ranks=ranks)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_dpo_with_adapters(ranks: int, tmp_path: Path) -> None:
    done = launch("dpo_audited.py", "--output_dir", str(tmp_path), ranks=ranks)
    assert_silent(tmp_path, done, ranks=ranks)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    (begin,) = events(tmp_path, "begin")
    # The base of the embedded default has 30 tensors.
    assert begin["scopes"]["frozen"]["tensors"] == 30


@pytest.mark.ranks
def test_dpo_without_adapters_audits_the_reference_model(tmp_path: Path) -> None:
    arguments = ["--use_peft", "false", "--output_dir", str(tmp_path)]
    assert_silent(tmp_path, launch("dpo_audited.py", *arguments, ranks=2), ranks=2)
    (begin,) = events(tmp_path, "begin")
    assert begin["roles"]["reference"] == {"trainable": False, "parameters": 30}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "fault, cause, step",
    [("forward_unwrapped", "gradient_not_reduced", 2), ("step_skipped", "stale_replica", 3)],
)
def test_the_drill_names_the_fault(fault: str, cause: str, step: int, tmp_path: Path) -> None:
    arguments = ["--fault", fault, "--step", str(step), "--output_dir", str(tmp_path)]
    done = launch("audit_demo.py", *arguments, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Planted {fault} in step {step}. The audit says:\n\nstep {step}, " in done.stdout
    assert f"See docs/errors.md#{cause}" in done.stdout
    assert done.stdout.count("The audit says") == 1


@pytest.mark.ranks
@pytest.mark.parametrize("ranks, cause", [(1, "frozen_changed"), (2, "gradient_not_reduced")])
def test_the_drill_without_arguments(ranks: int, cause: str, tmp_path: Path) -> None:
    done = launch("audit_demo.py", cwd=tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"See docs/errors.md#{cause}" in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


@pytest.mark.parametrize(
    "fault, complaint",
    [
        ("nonsense", "no fault or cause is called 'nonsense'"),
        ("byte_flipped", "byte_flipped strikes no model in training"),
        ("forward_unwrapped", "the fault for update 3 did not strike rank 0"),
    ],
)
def test_a_fault_that_cannot_be_drilled_is_one_line(
    fault: str, complaint: str, tmp_path: Path
) -> None:
    done = launch("audit_demo.py", "--fault", fault, "--output_dir", str(tmp_path), ranks=1)
    assert done.returncode != 0
    assert f"error: {complaint}" in done.stderr
    assert 'audit_demo.py", line' not in done.stderr  # no traceback of the recipe


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["reward", "grpo", "rloo"])
def test_trainers_with_adapters(kind: str, ranks: int, tmp_path: Path) -> None:
    done = launch(f"{kind}_audited.py", "--output_dir", str(tmp_path), ranks=ranks)
    assert_silent(tmp_path, done, ranks=ranks)
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "grpo", "rloo"])
def test_the_users_own_model_and_data(kind: str, tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    texts = [f"a b {letter}" for letter in "cdefghij"] * 2
    columns = {"text": texts}
    if kind in ("grpo", "rloo"):
        columns = {"prompt": texts}
    elif kind != "sft":
        columns = {"prompt": texts, "chosen": texts[::-1], "rejected": texts}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns).to_json(tmp_path / "data" / "train.jsonl")
    arguments: dict[str, Any] = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "report_to": "none",
    }
    if kind in ("grpo", "rloo"):
        (tmp_path / "rewards.py").write_text(REWARD)
        arguments["reward_function"] = f"{tmp_path / 'rewards.py'}:short"
        arguments |= {"num_generations": 2, "max_completion_length": 4}
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    done = launch(f"{kind}_audited.py", *flags, "--use_peft", ranks=1)
    assert_silent(tmp_path / "out", done, ranks=1)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in saved)
    # The head of a reward model is trained and saved beside its adapter.
    assert any("score" in name for name in saved) == (kind == "reward")


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loop_of_ones_own(ranks: int, tmp_path: Path) -> None:
    done = launch("accelerate_loop_audited.py", "--output_dir", str(tmp_path), ranks=ranks)
    assert_silent(tmp_path, done, ranks=ranks)
    assert done.stdout.count("step 5: loss ") == 1
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_frozen_base_that_drifts_is_named(ranks: int, tmp_path: Path) -> None:
    done = launch("frozen_drift.py", "--output_dir", str(tmp_path), ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "See docs/errors.md#frozen_changed" in done.stdout
    # The first audit after the merge, which followed step 3.
    assert "\nstep 4, base_model.model.model.layers.0." in done.stdout
    moved = re.search(r"moved by (\S+) nats on average", done.stdout)
    assert moved is not None
    assert float(moved[1]) > 0.001


def test_a_declared_merge_is_a_warning(tmp_path: Path) -> None:
    done = launch("frozen_drift.py", "--declared", "--output_dir", str(tmp_path), ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no desync" in done.stdout
    assert "Declared: adapters are merged for an inference engine." in done.stderr
