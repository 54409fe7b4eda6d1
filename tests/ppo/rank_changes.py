"""PPO runs that begin on some ranks and go on on others, for test_other_ranks.py."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import TrainerCallback

import runs
from trl_sync import SyncAuditCallback
from trl_sync.errors import CheckpointError
from trl_sync.ppo.staged_save import StagedFolder

BATCH, UPDATES, EPISODES, STOP = 16, 4, 96, 12


def digest(tensors: dict[str, Tensor]) -> str:
    """A checksum of names and bytes."""
    total = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def state_of(trainer: Any) -> dict[str, Any]:
    """All that a run carries on, in few bytes."""
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = {f"{i}.{n}": t for i, own in optimizer.items() for n, t in own.items()}
    return {
        "global_step": trainer.state.global_step,
        "parameters": digest(runs.trained(trainer)),
        "moments": digest(moments),
        "rates": trainer.lr_scheduler.get_last_lr(),
        "scheduler_step": trainer.lr_scheduler.state_dict()["last_epoch"],
        "kl_control": trainer.kl_control.state_dict(),
        "score_moments": trainer.score_moments.state_dict(),
    }


class Notes(TrainerCallback):
    """The state as training begins, and a stop after an update."""

    def __init__(self, stop: int | None) -> None:
        self.trainer: Any = None
        self._stop = stop
        self.at_begin: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.at_begin = state_of(self.trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self._stop


def train(
    folder: Path,
    *,
    stop: int | None = None,
    resume: bool = False,
    audit: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """A run on the ranks that there are, with a rollout batch of 16 on all of them together."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    prompts_seen: list[str] = []
    random_states: list[str] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        prompts_seen.extend(prompts)
        random_states.append(digest({"cpu": torch.random.get_rng_state()}))
        return runs.count_e(prompts, completions)

    notes = Notes(stop)
    callbacks: list[TrainerCallback] = [notes]
    if audit:
        callbacks.append(SyncAuditCallback())
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8 // ranks,
        "total_episodes": EPISODES,
        "save_strategy": "steps",
        "save_steps": 4,
        "kl_target": 1.0,
        "use_score_scaling": True,
    }
    trainer = runs.make(
        folder,
        reward=reward,
        callbacks=callbacks,
        peft_config=runs.lora(lora_dropout=0.1),
        **(options | changes),
    )
    notes.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return {
        "prompts": prompts_seen,
        "random_state": random_states[0] if random_states else None,
        "at_begin": notes.at_begin,
        "at_end": state_of(trainer),
    }


def save_with_an_error(folder: Path, rank: int, place: str) -> str:
    """What a save says when `place` fails on that rank, and what it leaves behind."""
    trainer = runs.make(folder)
    trainer.train()
    trainer.state.global_step = 16

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    if trainer.args.process_index == rank:
        if place == "publish":
            StagedFolder.publish, publish = fail, StagedFolder.publish
        else:
            setattr(trainer, place, fail)
    said = ""
    try:
        trainer._save_checkpoint(trainer.model, None)
    except CheckpointError as error:
        said = str(error)
    if trainer.args.process_index == rank and place == "publish":
        StagedFolder.publish = publish
    trainer.accelerator.wait_for_everyone()
    return f"{said} Left: {sorted(p.name for p in (folder / 'out').glob('*-*'))}"


class Said(logging.Handler):
    """What the checkpoints of this process say from now on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("trl_sync.ppo.checkpoint").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def on_two_machines(root: Path) -> dict[str, Any]:
    """Each of two ranks a machine with a disk of its own; the second one lost its last save."""
    rank = int(os.environ["RANK"])
    own, alone = root / f"machine_{rank}", root / f"alone_{rank}"
    said = Said()
    train(alone, total_episodes=16)
    os.environ["LOCAL_RANK"] = "0"  # read anew by every configuration
    options: dict[str, Any] = {"save_on_each_node": True}
    train(own, stop=8, **options)
    names = sorted(p.name for p in (own / "out" / "checkpoint-8").glob("rng*"))
    if rank == 1:
        shutil.rmtree(own / "out" / "checkpoint-8")
    resumed = train(own, resume=True, stop=8, **options)
    return {
        "said": said.texts,
        "alone": sorted(p.name for p in (alone / "out").glob("*-*")),
        "random_state_files": names,
        "resumed_at": resumed["at_begin"]["global_step"],
    }


def on_two_ranks(root: Path) -> dict[str, Any]:
    return {
        "two": train(root / "two", stop=STOP, audit=True),
        "one_to_two": resume(root / "one_to_two"),
        "errors": {
            f"{rank} {place}": save_with_an_error(root / f"error_{rank}_{place}", rank, place)
            for rank, place in ((0, "_save"), (1, "_save_rng_state"), (0, "publish"))
        },
        "machines": on_two_machines(root),
    }


def resume(folder: Path) -> dict[str, Any]:
    """The rest of the run in `folder`, audited; what it loads is compared with the manifest."""
    return train(folder, resume=True, audit=True)
