"""The private methods of `transformers.Trainer` that PPO must override, all in one place.

Checked on transformers 5.23.0; tests/ppo/test_checkpoint.py fails when one of them moves.

| method | why the stock one does not do |
|---|---|
| `_maybe_log_save_evaluate` | a checkpoint inside an iteration could not be resumed |
| `_save` | it would write frozen models, and nothing of the value model by itself |
| `_load_from_checkpoint` | it looks for one whole model or one PEFT adapter |
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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy
from transformers.utils import logging

from trl_sync.backbone.export import load_models, save_models
from trl_sync.backbone.fingerprint import fingerprint_of
from trl_sync.errors import CheckpointError
from trl_sync.ppo.config import BatchPlan, PPOConfig
from trl_sync.ppo.rollout import Sampling

logger = logging.get_logger(__name__)

STATE_FILE = "ppo_state.json"


class CheckpointMixin(Trainer):
    """Checkpoints of what trains and of the position; never of a frozen base or reference.

    A checkpoint lies at the end of an iteration: a save that falls inside one happens at its last
    update. What it holds continues a run bit for bit.
    """

    plan: BatchPlan
    backbone: Any
    sampling: Sampling
    _deferred_save = False
    _deferred_evaluation = False
    _deferred_stop = False
    _base_fingerprint: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains; with `resume_from_checkpoint=True` from the last whole checkpoint.

        Raises:
            CheckpointError: there is none, or it belongs to another base or configuration.
        """
        self._deferred_save = self._deferred_evaluation = self._deferred_stop = False
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args)
        if resume_from_checkpoint:
            self._check_checkpoint(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        inside = self.state.global_step % self.plan.updates_per_iteration != 0
        if inside:
            self._defer_to_end_of_iteration()
        else:
            self.control.should_evaluate |= self._deferred_evaluation
            self.control.should_save |= self._deferred_save
            self.control.should_training_stop |= self._deferred_stop
            self._deferred_evaluation = self._deferred_save = self._deferred_stop = False
        may_save = self.control.should_save or (self.control.should_evaluate and self._saves_best())
        if may_save:
            # What was measured since the last log is not in the checkpoint: log it now.
            self.control.should_log = True
        if self.state.global_step >= self.state.max_steps:
            self.control.should_log = self.args.logging_strategy != IntervalStrategy.NO
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _saves_best(self) -> bool:
        best = self.args.save_strategy == SaveStrategy.BEST
        return bool(best or self.args.load_best_model_at_end)

    def _defer_to_end_of_iteration(self) -> None:
        if self.control.should_evaluate and self._saves_best():
            # The evaluation decides on saving, so both wait.
            self._deferred_evaluation, self.control.should_evaluate = True, False
        if self.control.should_save:
            updates = self.plan.updates_per_iteration
            end = -(-self.state.global_step // updates) * updates
            logger.info(
                f"Step {self.state.global_step} lies inside an iteration of {updates} updates: the "
                f"checkpoint is written at step {end}."
            )
            self._deferred_save, self.control.should_save = True, False
        if self._deferred_save and self.control.should_training_stop:
            # Whoever asked for a checkpoint and a stop, short of time perhaps, gets both.
            self._deferred_stop, self.control.should_training_stop = True, False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        files = save_models(self.backbone, folder)
        state = self._identity() | {"files": files, "state": self._own_state()}
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_models(self.backbone, folder)
        saved = _read_json(folder / STATE_FILE).get("state", {})
        for name, part in self._stateful().items():
            # What was not in use then begins anew.
            part.load_state_dict(saved.get(name, {}))

    def _load_best_model(self) -> None:
        load_models(self.backbone, Path(self.state.best_model_checkpoint))

    def _stateful(self) -> dict[str, Any]:
        """What else a run carries from one iteration to the next, by its name in a checkpoint."""
        return {}

    def _own_state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to continue from a checkpoint."""
        if self._base_fingerprint is None:
            self._base_fingerprint = fingerprint_of(self.backbone.frozen_tensors())
        args: PPOConfig = self.args
        return {
            "base_fingerprint": self._base_fingerprint,
            "batch_size": self.plan.batch_size,
            "num_mini_batches": self.plan.num_mini_batches,
            "num_ppo_epochs": self.plan.num_ppo_epochs,
            "world_size": self.plan.world_size,
            "num_prompts": len(self.train_dataset),
            "prompts": self.train_dataset.fingerprint(),
            "response_length": args.response_length,
            "temperature": args.temperature,
            "num_generations": args.num_generations,
            "generation_options": {n: str(v) for n, v in self.sampling.options.items()},
            "value_learning_rate": args.value_learning_rate is not None,
            "reward_adapter": self.backbone.reward_fingerprint(),
            "stop_token_ids": list(self.sampling.stop_token_ids),
            "seed": args.seed,
        }

    def _check_checkpoint(self, folder: Path) -> None:
        missing = missing_files(folder)
        if missing:
            raise CheckpointError(
                f"{folder} is not a whole checkpoint: {', '.join(missing)} missing or cut short. "
                "Was the run killed while it saved?"
            )
        step = json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"]
        if step % self.plan.updates_per_iteration:
            raise CheckpointError(
                f"{folder} was saved at step {step}, inside an iteration of "
                f"{self.plan.updates_per_iteration} updates, and cannot be continued."
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


def missing_files(folder: Path) -> list[str]:
    """What `folder` lacks of all that resuming needs; the training state is written last."""
    saved = _read_json(folder / STATE_FILE)
    ranks = int(saved.get("world_size", 1))
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    names += saved.get("files", [])
    missing = [name for name in names if not (folder / name).is_file()]
    # Without a file the stock loop would begin with a fresh optimizer, in silence. DeepSpeed keeps
    # optimizer and scheduler in a folder that it names in `latest`.
    if not (folder / "latest").is_file():
        missing += [n for n in ("optimizer", "scheduler") if not list(folder.glob(f"{n}*"))]
    states = {STATE_FILE: saved, TRAINER_STATE_NAME: _read_json(folder / TRAINER_STATE_NAME)}
    return missing + [name for name, content in states.items() if not content]


def _read_json(file: Path) -> dict[str, Any]:
    """The content of `file`; nothing if it does not exist or is cut short."""
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return content


def last_whole_checkpoint(args: PPOConfig) -> str:
    """The checkpoint of the highest step in `output_dir` that is whole.

    Raises:
        CheckpointError: there is none.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = {}
    for folder in Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = pattern.fullmatch(folder.name)
        if match and not missing_files(folder):
            steps[int(match[1])] = folder
    if not steps:
        raise CheckpointError(
            f"No whole checkpoint in {args.output_dir}: nothing to resume from. Start without "
            "resume_from_checkpoint, or name the folder of a checkpoint."
        )
    return str(steps[max(steps)])
