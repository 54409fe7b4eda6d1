"""A reward model that differs between ranks: what TRL never noticed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from ranks import run_on_ranks
from trl_sync import DesyncError, PPOTrainer, SyncAuditCallback


def with_another_reward_model_on_rank_1(folder: Path) -> str:
    """What the audit says about it, before the first update."""
    reward_model = tiny.reward_llama(seed=100)
    trainer = PPOTrainer(
        tiny.config(folder / "out", gradient_accumulation_steps=2),
        tiny.tokenizer(),
        tiny.llama(),
        reward_model=reward_model,
        train_dataset=tiny.prompts(),
        peft_config=runs.lora(),
        callbacks=[SyncAuditCallback(modules={"reward": reward_model})],
    )
    reward_model.score.weight.data.add_(int(os.environ["RANK"]))
    with pytest.raises(DesyncError) as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    return str(caught.value)


@pytest.mark.ranks
@pytest.mark.slow
def test_defect_12_a_reward_model_that_differs_between_ranks_is_named(tmp_path: Path) -> None:
    """A head that each rank draws anew does: TRL neither sent it to the others nor compared it."""
    said: list[Any] = run_on_ranks(with_another_reward_model_on_rank_1, tmp_path)
    for text in said:
        assert "reward" in text
        assert "score.weight" in text
        assert "rank 0 holds" in text
        assert "rank 1 holds" in text
