"""The private methods of `transformers.Trainer` that PPO must override, all in one place.

Checked on transformers 5.23.0; tests/ppo/test_checkpoint.py fails when one of them moves.

| method | why the stock one does not do |
|---|---|
| `_maybe_log_save_evaluate` | a checkpoint inside an iteration could not be resumed |
| `_save` | it would write the base, and nothing of the value model by itself |
| `_load_from_checkpoint` | it looks for a whole model or one PEFT adapter |
| `_load_best_model` | likewise |
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from trl_sync.backbone.export import load_adapters, save_adapters
from trl_sync.backbone.fingerprint import fingerprint
from trl_sync.errors import CheckpointError
from trl_sync.ppo.config import BatchPlan, PPOConfig

logger = logging.get_logger(__name__)

STATE_FILE = "ppo_state.json"


class CheckpointMixin(Trainer):
    """Checkpoints of adapters, value head and position; never of the base.

    A checkpoint lies at the end of an iteration: a save that falls inside one happens at its last
    update. What it holds continues a run bit for bit.
    """

    plan: BatchPlan
    backbone: Any
    _deferred_save = False
    _base_fingerprint: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains; with `resume_from_checkpoint=True` from the last whole checkpoint.

        Raises:
            CheckpointError: there is none, or it belongs to another base or configuration.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args)
        if resume_from_checkpoint:
            self._check_checkpoint(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        inside = self.state.global_step % self.plan.updates_per_iteration != 0
        if inside and self._saves_best():
            # The evaluation decides on saving, so both wait.
            self.control.should_evaluate = False
        if inside and self.control.should_save:
            self._defer_save()
        elif not inside and self._deferred_save:
            self._deferred_save, self.control.should_save = False, True
        if self.control.should_save:
            # What was measured since the last log is not in the checkpoint: log it now.
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _saves_best(self) -> bool:
        best = self.args.save_strategy == SaveStrategy.BEST
        return bool(best or self.args.load_best_model_at_end)

    def _defer_save(self) -> None:
        updates = self.plan.updates_per_iteration
        end = -(-self.state.global_step // updates) * updates
        logger.info(
            f"Step {self.state.global_step} lies inside an iteration of {updates} updates: the "
            f"checkpoint is written at step {end}."
        )
        self._deferred_save, self.control.should_save = True, False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapters(self.backbone, folder)
        (folder / STATE_FILE).write_text(json.dumps(self._identity(), indent=2) + "\n")
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapters(self.backbone, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_adapters(self.backbone, Path(self.state.best_model_checkpoint))

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to continue from a checkpoint."""
        if self._base_fingerprint is None:
            self._base_fingerprint = fingerprint(self.backbone.causal_model)
        args: PPOConfig = self.args
        return {
            "base_fingerprint": self._base_fingerprint,
            "batch_size": self.plan.batch_size,
            "num_mini_batches": self.plan.num_mini_batches,
            "num_ppo_epochs": self.plan.num_ppo_epochs,
            "world_size": self.plan.world_size,
            "num_prompts": len(self.train_dataset),
            "response_length": args.response_length,
            "seed": args.seed,
        }

    def _check_checkpoint(self, folder: Path) -> None:
        if not is_whole(folder, self.args.world_size):
            raise CheckpointError(
                f"{folder} is not a whole checkpoint: {TRAINER_STATE_NAME}, {STATE_FILE} or a "
                "random state is missing. Was the run killed while it saved?"
            )
        saved, own = json.loads((folder / STATE_FILE).read_text()), self._identity()
        different = [name for name in own if saved.get(name) != own[name]]
        if "base_fingerprint" in different:
            raise CheckpointError(
                f"{folder} was trained on another base: its checksum is "
                f"{saved.get('base_fingerprint')}, that of this model {own['base_fingerprint']}. "
                "Load the same model with the same quantization."
            )
        if different:
            changes = ", ".join(f"{n}: {saved.get(n)} then, {own[n]} now" for n in different)
            raise CheckpointError(
                f"{folder} comes from another configuration and cannot be continued ({changes}). "
                "Use the settings of that run, or start anew in another output_dir."
            )


def is_whole(folder: Path, world_size: int) -> bool:
    """Whether `folder` holds all that resuming needs; the training state is written last."""
    names = ["rng_state.pth"] if world_size <= 1 else []
    names += [f"rng_state_{rank}.pth" for rank in range(world_size)] if world_size > 1 else []
    if not all((folder / name).is_file() for name in (*names, STATE_FILE, TRAINER_STATE_NAME)):
        return False
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except json.JSONDecodeError:
        return False
    return True


def last_whole_checkpoint(args: PPOConfig) -> str:
    """The checkpoint of the highest step in `output_dir` that is whole.

    Raises:
        CheckpointError: there is none.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = {}
    for folder in Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = pattern.fullmatch(folder.name)
        if match and is_whole(folder, args.world_size):
            steps[int(match[1])] = folder
    if not steps:
        raise CheckpointError(
            f"No whole checkpoint in {args.output_dir}: nothing to resume from. Start without "
            "resume_from_checkpoint, or name the folder of a checkpoint."
        )
    return str(steps[max(steps)])
