"""recipes/ppo.py under the accelerate configs, started by the launcher itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from ranks import free_port

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes/accelerate_configs"
# What brings DeepSpeed and FSDP up without a GPU, with tests/recipes/on_cpu_ranks.py.
ON_CPU = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
TWO_BY_TWO = ("--num_processes", "4", "--parallelism_config_dp_shard_size", "2")

pytestmark = [pytest.mark.slow, pytest.mark.ranks]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts and a reward function on disk."""
    folder = tmp_path_factory.mktemp("local")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny.prompts(40).to_json(folder / "prompts.jsonl")
    (folder / "rewards.py").write_text(
        "def length(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    return folder


def run(
    local: Path,
    out: Path,
    config: str,
    *launcher: str,
    script: tuple[str, ...] = ("recipes/ppo.py",),
    **more: str,
) -> dict[str, Any]:
    """The summary that a short run leaves."""
    flags = {
        "model_name_or_path": local / "model",
        "dataset_path": local / "prompts.jsonl",
        "reward_function": f"{local / 'rewards.py'}:length",
        "output_dir": out,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 1,
        "total_episodes": 32,
        "response_length": 4,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": "none",
    }
    named = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    start += ["--config_file", str(CONFIGS / f"{config}.yaml")]
    start += ["--main_process_port", str(free_port()), *launcher]
    done = subprocess.run(
        [*start, *script, *named],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def test_four_cpu_ranks(local: Path, tmp_path: Path) -> None:
    summary = run(local, tmp_path / "run", "cpu_4")
    assert (summary["world_size"], summary["episodes"], summary["desyncs"]) == (4, 32, 0)


@pytest.mark.parametrize(
    "config, engine, launcher",
    [
        pytest.param("zero2", "zero2", ("--num_processes", "2"), marks=pytest.mark.deepspeed),
        pytest.param("zero3", "zero3", ("--num_processes", "2"), marks=pytest.mark.deepspeed),
        ("fsdp2_qlora", "fsdp2", ("--num_processes", "2")),
        ("hsdp", "hsdp", TWO_BY_TWO),
    ],
)
def test_the_configs_of_gpus_on_cpu_ranks(
    local: Path, tmp_path: Path, config: str, engine: str, launcher: tuple[str, ...]
) -> None:
    script = ("tests/recipes/on_cpu_ranks.py", engine)
    summary = run(local, tmp_path / "run", config, *launcher, script=script, **ON_CPU)
    assert summary["world_size"] == int(launcher[1])
    assert (summary["episodes"], summary["desyncs"]) == (32, 0)
    assert summary["quantization"] == "nf4"
    # Not DDP, which accelerate falls back to in silence.
    begin = json.loads((tmp_path / "run/sync_audit.jsonl").read_text().splitlines()[0])
    assert begin["engine"] == ("DEEPSPEED" if config.startswith("zero") else "FSDP")
