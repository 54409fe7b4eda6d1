"""The step API on the embedded task: a loop of the user's own, whose reward rises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import tiny
from embedded_default import embedded_default
from recipe_launch import launch
from trl_sync.legacy import AutoModelForCausalLMWithValueHead

RECIPE = "ppo_legacy_step.py"


def printed_by(folder: Path, *flags: str, ranks: int) -> str:
    done = launch(RECIPE, *flags, ranks=ranks, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_reward_rises(tmp_path: Path) -> None:
    printed = printed_by(tmp_path, ranks=1)
    scores = [float(text) for text in re.findall(r"^step \d+: score (\S+),", printed, re.M)]
    assert len(scores) == 20
    # The scores of single answers have a standard deviation of 1; a batch has 128.
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.5
    saved = AutoModelForCausalLMWithValueHead.from_pretrained(
        str(tmp_path / "runs/ppo-legacy-step")
    )
    fresh = AutoModelForCausalLMWithValueHead.from_pretrained(str(embedded_default().model_path))
    assert not torch.equal(saved.v_head.summary.weight, fresh.v_head.summary.weight)
    moved = dict(fresh.pretrained_model.named_parameters())
    assert all(
        not parameter.equal(moved[name])
        for name, parameter in saved.pretrained_model.named_parameters()
    )


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_keep_one_model(tmp_path: Path) -> None:
    printed = printed_by(tmp_path, "--steps", "256", ranks=2)
    # Two batches of 128 on each rank; rank 0 speaks for both.
    assert re.findall(r"^step (\d+): score", printed, re.M) == ["1", "2"]
    assert printed.count("model and value head in") == 1
    AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "runs/ppo-legacy-step"))


@pytest.mark.slow
def test_models_and_prompts_of_ones_own(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.reward_llama().save_pretrained(tmp_path / "reward")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"a b {letter}", "source": "mine"} for letter in "cdefghij"]
    Dataset.from_list(rows).to_json(tmp_path / "prompts.jsonl")
    own = ["--model_name", "model", "--reward_model", "reward"]
    sizes = ["--steps", "8", "--batch_size", "4", "--mini_batch_size", "2"]
    data = ["--query_dataset", "prompts.jsonl"]
    printed = printed_by(tmp_path, *own, *data, *sizes, ranks=1)
    assert re.findall(r"^step (\d+): score", printed, re.M) == ["1", "2"]
    saved = AutoModelForCausalLMWithValueHead.from_pretrained(
        str(tmp_path / "runs/ppo-legacy-step")
    )
    assert saved.pretrained_model.config.hidden_size == tiny.llama().config.hidden_size
    refused = launch(RECIPE, *own, *sizes, cwd=tmp_path)
    assert refused.returncode != 0
    assert "error: Give --model_name, --reward_model and --query_dataset, or" in refused.stderr
