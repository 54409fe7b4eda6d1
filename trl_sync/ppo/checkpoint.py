"""The private methods of `transformers.Trainer` that PPO must override, all in one place.

Checked on transformers 5.23.0; tests/ppo/test_checkpoint.py fails when one of them moves.

| method | why the stock one does not do |
|---|---|
| `_maybe_log_save_evaluate` | a checkpoint inside an iteration could not be resumed |
| `_save_checkpoint` | it writes under the final name: a kill leaves half a checkpoint there |
| `_get_output_dir` | it tells `_save_checkpoint` where to write |
| `_push_from_checkpoint` | the upload waits for the final name |
| `_save` | it would write frozen models, and nothing of the value model by itself |
| `_load_from_checkpoint` | it looks for one whole model or one PEFT adapter |
| `_load_best_model` | likewise |
| `_load_rng_state` | other processes than saved would share random numbers, or have none |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy
from transformers.utils import logging

from trl_sync.backbone.export import collect_models, load_models
from trl_sync.backbone.fingerprint import fingerprint_of
from trl_sync.errors import CheckpointError, RewardError
from trl_sync.ppo.collectives import together
from trl_sync.ppo.config import BatchPlan, PPOConfig
from trl_sync.ppo.engine_state import EngineStateMixin
from trl_sync.ppo.resume_checks import (
    STATE_FILE,
    check_readable,
    check_same_run,
    check_whole,
    last_whole_checkpoint,
    read_json,
    record_sizes,
    rng_files,
)
from trl_sync.ppo.rollout import Sampling
from trl_sync.ppo.staged_save import StagedFolder, restore_replaced, rotate

logger = logging.get_logger(__name__)

# Beside the seed, so that what is drawn after a resume is not drawn elsewhere; see experience.py.
_RESUMED = 4


class CheckpointMixin(EngineStateMixin):
    """Checkpoints of what trains and of the position; never of a frozen base or reference.

    A checkpoint lies at the end of an iteration: a save that falls inside one happens at its last
    update. What it holds continues a run bit for bit. Its folder appears in one step, when all
    processes have written what belongs in it.
    """

    plan: BatchPlan
    backbone: Any
    sampling: Sampling
    _deferred_save = False
    _deferred_evaluation = False
    _deferred_stop = False
    _fingerprints: dict[str, Any] | None = None
    _staged: StagedFolder | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains; with `resume_from_checkpoint=True` from the last whole checkpoint.

        Or from the folder of one. Returns transformers' `TrainOutput`.

        Raises:
            CheckpointError: there is none, it is not whole, cannot be read, or belongs to another
                base or configuration; or one could not be saved.
            RewardError: a score is missing or not finite, or another process failed.
        """
        self._deferred_save = self._deferred_evaluation = self._deferred_stop = False
        if resume_from_checkpoint:
            resume_from_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            folder = Path(resume_from_checkpoint)
            self._on_all(lambda: self._load_own_state(folder))
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _checkpoint_to_resume(self, path: str | bool) -> str:
        def restore() -> None:
            if self.args.should_save:
                restore_replaced(Path(self.args.output_dir))

        self._on_all(restore)
        folder = last_whole_checkpoint(self.args) if path is True else str(path)
        self._on_all(lambda: self._check_checkpoint(Path(folder)))
        return folder

    def _on_all(self, work: Callable[[], Any]) -> None:
        """Does `work` on every process; if it fails on one, all raise. A collective."""
        try:
            together(self.accelerator, work)
        except RewardError as error:
            raise CheckpointError(
                "Another process cannot read or write the checkpoint; its output says why."
            ) from error

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final = (
            Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        )
        staged = StagedFolder(final)
        main = self.args.should_save
        try:
            self._on_all(staged.open if main else lambda: None)
            self._write_staged(staged, model, trial)
            self._note_best_checkpoint(final)
            self._on_all((lambda: self._publish(staged)) if main else lambda: None)
        except (OSError, RuntimeError, SafetensorError) as error:
            # What a full disk looks like: to Python, to torch's writer, to that of safetensors.
            raise CheckpointError(
                f"{final} could not be saved: {type(error).__name__}: {error}. Older checkpoints "
                "are as they were. Free space or make the folder writable, then resume."
            ) from error
        finally:
            if main:
                staged.discard()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _write_staged(self, staged: StagedFolder, model: Any, trial: Any) -> None:
        self._staged = staged
        # Without a best step the stock method neither waits for the others, who may have failed,
        # nor looks for a best checkpoint, which it would take for one in the staging folder.
        best, self.state.best_global_step = self.state.best_global_step, None
        try:
            self._on_all(lambda: super(CheckpointMixin, self)._save_checkpoint(model, trial))
        finally:
            self._staged, self.state.best_global_step = None, best

    def _note_best_checkpoint(self, final: Path) -> None:
        best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best == final or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _publish(self, staged: StagedFolder) -> None:
        self.state.save_to_json(str(staged.folder / TRAINER_STATE_NAME))
        self._warn_of_other_disks(staged.folder)
        record_sizes(staged.folder)
        staged.publish()
        kept = {staged.final, Path(self.state.best_model_checkpoint or staged.final)}
        try:
            rotate(staged.final.parent, self.args.save_total_limit, kept)
        except OSError as error:
            logger.warning(f"An old checkpoint could not be deleted: {error}.")

    def _warn_of_other_disks(self, folder: Path) -> None:
        expected = [] if self.args.save_on_each_node else rng_files(self.args.world_size)
        missing = [name for name in expected if not (folder / name).is_file()]
        if missing and not self.args.save_only_model:
            logger.warning(
                f"{folder.name} lacks {', '.join(missing)}: the processes do not share the disk of "
                f"output_dir {self.args.output_dir}, so those on other machines cannot resume. Put "
                "it on shared storage, or set save_on_each_node=True."
            )

    def _get_output_dir(self, trial: Any) -> str:
        if self._staged is not None:
            return str(self._staged.parent)
        folder: str = super()._get_output_dir(trial)
        return folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staged is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        write_models = collect_models(self.backbone, keep=self.args.should_save)

        def write() -> None:
            if not self.args.should_save:
                return
            folder.mkdir(parents=True, exist_ok=True)
            files = write_models(folder)
            state = self._identity() | {"files": files, "state": self._own_state()}
            (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

        if self.engine.places_model:
            self._on_all(write)  # collectives of the engine come next: all go on, or none
        else:
            write()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_models(self.backbone, Path(resume_from_checkpoint))
        self._on_all(lambda: self._check_finite(resume_from_checkpoint))

    def _check_finite(self, folder: str) -> None:
        for name, parameter in self.backbone.named_parameters():
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.requires_grad and not bool(own.detach().isfinite().all()):
                raise CheckpointError(
                    f"{folder} holds NaN or infinity in {name}: nothing can be generated with it. "
                    "Resume from an earlier checkpoint."
                )

    def _load_own_state(self, folder: Path) -> None:
        saved = read_json(folder / STATE_FILE).get("state", {})
        for name, part in self._stateful().items():
            # What was not in use then begins anew.
            try:
                part.load_state_dict(saved.get(name, {}))
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{folder / STATE_FILE} holds no {name} that can be continued "
                    f"({type(error).__name__}: {error}). Resume from an earlier checkpoint."
                ) from error

    def _load_best_model(self) -> None:
        if self.engine.is_deepspeed:
            self._load_best_partitioned()
        else:
            load_models(self.backbone, Path(self.state.best_model_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        own = self.plan.world_size
        if checkpoint and read_json(Path(checkpoint) / STATE_FILE).get("world_size", own) != own:
            # Nothing fits: more processes than files, or streams that ran for other sequences.
            entropy = (self.args.seed, _RESUMED, self.state.global_step, self.args.process_index)
            set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        else:
            super()._load_rng_state(checkpoint)

    def _stateful(self) -> dict[str, Any]:
        """What else a run carries from one iteration to the next, by its name in a checkpoint."""
        return {}

    def _own_state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def _frozen_identity(self) -> dict[str, Any]:
        """Checksums of what no checkpoint holds and must be the same; taken while it is whole."""
        if self._fingerprints is None:
            self._fingerprints = {
                "base_fingerprint": fingerprint_of(self.backbone.frozen_tensors()),
                "reward_adapter": self.backbone.reward_fingerprint(),
            }
        return self._fingerprints

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to continue from a checkpoint."""
        args: PPOConfig = self.args
        return self._frozen_identity() | {
            "optimizer_state": self.engine.optimizer_state,
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
            "stop_token_ids": list(self.sampling.stop_token_ids),
            "seed": args.seed,
        }

    def _check_checkpoint(self, folder: Path) -> None:
        check_whole(folder, self.plan.updates_per_iteration)
        rng_names = rng_files(self.plan.world_size)
        check_readable(folder, rng_names[self.args.process_index])
        saved, own = read_json(folder / STATE_FILE), self._identity()
        check_same_run(folder, saved, own, self.args.per_device_train_batch_size)
        self._check_world_size(saved.get("world_size", own["world_size"]), own["world_size"])

    def _check_world_size(self, saved: int, own: int) -> None:
        """Nothing, if `own` processes can continue what `saved` ones began.

        Raises:
            CheckpointError: they cannot: ZeRO keeps a part of the optimizer for each of them.
        """
        if saved != own and self.engine.is_deepspeed:
            raise CheckpointError(
                f"{saved} process(es) began this run under {self.engine.value}, whose optimizer "
                f"state is cut for as many; {own} cannot continue it. Start {saved}. FSDP2 and DDP "
                "continue on another number."
            )
        if saved != own and self.is_world_process_zero():
            logger.warning(
                f"{saved} process(es) began this run, {own} continue it: with the same prompts in "
                "every iteration, but other responses, mini-batches and dropout, which each "
                "process draws by itself."
            )
