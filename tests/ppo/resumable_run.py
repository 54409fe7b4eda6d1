"""A PPO run that can be killed and resumed, for test_resume.py; started by `accelerate launch`.

    resumable_run.py full FOLDER        runs to the end
    resumable_run.py update FOLDER      kills rank 0 with SIGKILL inside an update, mid-epoch
    resumable_run.py rollout FOLDER     kills rank 0 with SIGKILL while it generates
    resumable_run.py resume FOLDER      continues from the last checkpoint

Several pairs may follow each other. Each finished run leaves `outcome_<rank>.pt`; the prompts that
were rewarded are appended to `prompts_<rank>.txt` as they come.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback, set_seed

import tiny
from trl_sync import PPOTrainer
from trl_sync.backbone import load_shared_backbone
from trl_sync.backbone.quantization import nf4_config

# 64 prompts, 16 a batch: 4 iterations an epoch, 4 updates an iteration. Saves are due every third
# update, so they are deferred to 4, 8, 12, ... The run has one epoch and a half.
UPDATE_OF_DEATH = 14
ROLLOUT_OF_DEATH = 6


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieInUpdate(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == UPDATE_OF_DEATH and args.process_index == 0:
            die()


def run(mode: str, folder: Path, base: Path) -> None:
    rank = int(os.environ.get("RANK", "0"))
    folder.mkdir(parents=True, exist_ok=True)
    seen = folder / f"prompts_{rank}.txt"

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        with seen.open("a") as file:
            file.write("\n".join(prompts) + "\n")
        return [text.count("e") - 0.1 * text.count("a") for text in completions]

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = tiny.config(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8 // world_size,
        total_episodes=96,
        save_strategy="steps",
        save_steps=3,
        logging_steps=3,
        gradient_checkpointing=True,
    )
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    set_seed(config.seed)  # the adapters are drawn before the trainer is made
    trainer = PPOTrainer(
        config,
        tiny.tokenizer(),
        load_shared_backbone(str(base), lora, quantization_config=nf4_config()),
        reward_model=reward,
        train_dataset=tiny.prompts(64),
        callbacks=[DieInUpdate()] if mode == "update" else None,
    )
    if mode == "rollout" and rank == 0:
        die_while_generating(trainer)
    trainer.train(resume_from_checkpoint=mode == "resume")
    torch.save(outcome(trainer), folder / f"outcome_{rank}.pt")


def die_while_generating(trainer: PPOTrainer) -> None:
    generate, calls = trainer.backbone.causal_model.generate, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == ROLLOUT_OF_DEATH:
            # After a few tokens, from within the model's own forward pass.
            steps = iter(range(3))
            trainer.backbone.causal_model.register_forward_pre_hook(
                lambda *_: None if next(steps, None) is not None else die()
            )
        return generate(*args, **kwargs)

    trainer.backbone.causal_model.generate = counted


def outcome(trainer: PPOTrainer) -> dict[str, Any]:
    trained = {n: p.detach() for n, p in trainer.backbone.named_parameters() if p.requires_grad}
    return {
        "parameters": trained,
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "epoch": trainer.state.epoch,
        "global_step": trainer.state.global_step,
        "log_history": trainer.state.log_history,
        "random_state": torch.random.get_rng_state(),
    }


if __name__ == "__main__":
    base_folder, *pairs = sys.argv[1:]
    for chosen, path in zip(pairs[::2], pairs[1::2], strict=True):
        run(chosen, Path(path), Path(base_folder))
