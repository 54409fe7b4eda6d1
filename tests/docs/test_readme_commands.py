"""Every command in README runs as it stands there, in a clone with an environment of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("accelerate", "git", "make", "pip", "python", "trl-sync")
CLONE = "git clone <this repository> && cd trl_sync && make demo"

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.timeout(900)]

# A script for TRL 1.12, which has no import of this package and flags of its own.
SCRIPT = """
import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSequenceClassification as Classifier
from trl.experimental.ppo import PPOConfig, PPOTrainer

parser = argparse.ArgumentParser()
for flag in ("--its", "--own", "--flags"):
    parser.add_argument(flag, action="store_true", required=True)
parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained("my/sft-model", padding_side="left")
rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in ["a b", "c d e"] * 8]
model = AutoModelForCausalLM.from_pretrained("my/sft-model")
trainer = PPOTrainer(
    args=PPOConfig(
        output_dir="runs/shim", total_episodes=16, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, response_length=4, report_to="none",
    ),
    processing_class=tokenizer,
    model=model,
    ref_model=AutoModelForCausalLM.from_pretrained("my/sft-model"),
    reward_model=Classifier.from_pretrained("my/reward-model", num_labels=1),
    value_model=Classifier.from_pretrained("my/reward-model", num_labels=1),
    train_dataset=Dataset.from_list(rows),
    eval_dataset=Dataset.from_list(rows),
)
trainer.train()
print("the script has ended, policy in", trainer.args.output_dir)
"""


def commands(page: Path) -> list[str]:
    """The commands in the text blocks of a page, one for each line that is not continued."""
    found = []
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            command = " ".join(line.partition("#")[0].split())
            if command.split(" ")[0] in PROGRAMS:
                found.append(command)
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `make demo` was run, and with what the other commands name."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "published").mkdir()
    (folder / "published" / "trl_sync").symlink_to(ROOT)
    command = CLONE.replace("<this repository>", str(folder / "published" / "trl_sync"))
    printed = bash(command, folder)
    clone = folder / "trl_sync"
    (clone / "demo.txt").write_text(printed)
    for kind, model in {"sft-model": tiny.llama(), "reward-model": tiny.reward_llama()}.items():
        model.save_pretrained(clone / "my" / kind)
        tiny.tokenizer().save_pretrained(clone / "my" / kind)
    (clone / "my" / "prompts").mkdir()
    tiny.prompts(64).to_json(clone / "my" / "prompts" / "train.jsonl")
    (clone / "my_ppo_script.py").write_text(SCRIPT)
    return clone


def bash(command: str, folder: Path) -> str:
    """What it printed; with the environment of the clone first on the path, if there is one."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")
    }
    clean["PATH"] = f"{folder / '.venv/bin'}{os.pathsep}{clean['PATH']}"
    clean["XDG_CACHE_HOME"] = str(folder / "cache")  # the small task is built anew
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=clean, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def demo(clone: Path) -> None:
    printed = (clone / "demo.txt").read_text()
    assert "Before and after" in printed
    figures = json.loads(re.findall(r"^\{$.*?^\}$", printed, re.MULTILINE | re.DOTALL)[-1])
    assert figures["reward_last"] > figures["reward_first"] + figures["reward_first_std"]
    assert figures["desyncs"] == 0
    assert (clone / "runs" / "ppo-tiny" / "learning_curve.png").is_file()


def install(clone: Path) -> None:
    bash("pip install -c constraints.txt .", clone)


def desync(clone: Path) -> None:
    printed = bash("trl-sync demo", clone)
    assert "Cause: gradient_not_reduced" in printed
    assert "named right" in printed


OWN_MODEL = (
    "accelerate launch recipes/ppo.py --model_name_or_path my/sft-model --reward_model_path "
    "my/reward-model --dataset_name my/prompts --stop_token eos --output_dir runs/mine"
)


def own_model(clone: Path) -> None:
    bash(OWN_MODEL, clone)
    assert (clone / "runs" / "mine" / "adapter_model.safetensors").is_file()
    assert (clone / "runs" / "mine" / "sync_audit.jsonl").is_file()


SHIM = "python -m trl_sync.shim my_ppo_script.py --its --own --flags"


def shim(clone: Path) -> None:
    assert "the script has ended, policy in runs/shim" in bash(SHIM, clone)


PLAN = "trl-sync env --plan --model my/sft-model --engine ddp --gpus 8 --gpu-memory 24"


def plan(clone: Path) -> None:
    assert "fits" in bash(PLAN, clone)


REPORT = "trl-sync report runs/ppo-tiny"


def report(clone: Path) -> None:
    bash(REPORT, clone)
    assert "<html" in (clone / "runs" / "ppo-tiny" / "report.html").read_text()


RUNS: dict[str, Callable[[Path], None]] = {
    CLONE: demo,
    "trl-sync demo": desync,
    OWN_MODEL: own_model,
    SHIM: shim,
    PLAN: plan,
    REPORT: report,
    "pip install -c constraints.txt .": install,
}


def test_every_command_of_the_page_is_run_here() -> None:
    assert sorted(commands(README)) == sorted(RUNS)


@pytest.mark.parametrize("command", RUNS)
def test_command(command: str, clone: Path) -> None:
    RUNS[command](clone)
