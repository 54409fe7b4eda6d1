"""Model and optimizer under engines that hold them in parts: saved whole or by shard, and loaded.

Checked on transformers 5.23, accelerate 1.15 and deepspeed 0.19.8.

| method of `Trainer` | why the stock one does not do |
|---|---|
| `save_model` | it collects the whole model, its frozen base included, on every process |
| `_save_optimizer_and_scheduler` | likewise; and the quantization state of the base with it |
| `_prepare_inputs` | under DeepSpeed it makes 16-bit numbers of old log-probabilities and returns |

DeepSpeed and torch's distributed checkpoints write and read what is in parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.fsdp_utils import save_fsdp_optimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import logging

from trl_sync.ppo.engines import Engine, full_size_bytes, gathered

logger = logging.get_logger(__name__)


class EngineStateMixin(Trainer):
    """Saves and loads what trains, whichever engine holds it."""

    engine: Engine
    backbone: Any
    _gathered_bytes: int | None = None
    _gathers = False

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Within the block every parameter is whole on this process. Every process must enter it.

        Under ZeRO-3 and FSDP2 that is a gather of all parameters; elsewhere nothing happens. What
        generates or reads weights by hand belongs inside; what is written to parameters there is
        lost under these engines.
        """
        if self._gathers:  # they are whole already
            yield
            return
        if self.engine.shards_parameters:
            self._announce_gather()
        with gathered(self.backbone, self.model_wrapped, self.engine):
            self._gathers = True
            try:
                yield
            finally:
                self._gathers = False

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Micro-batches as they are: the loader makes them on the device, in fp32."""
        return inputs

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes policy and value model, each whole. Under ZeRO-3 and FSDP2 a collective."""
        if not self.engine.places_model:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or self.args.output_dir
        if self.engine is Engine.ZERO3:
            with self.gathered():
                self._save(folder)
        else:
            self._save(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.engine.is_deepspeed:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.engine is Engine.FSDP2:
            plugin = self.accelerator.state.fsdp_plugin
            try:
                save_fsdp_optimizer(
                    plugin, self.accelerator, self.optimizer, self.model, output_dir
                )
            except CheckpointException as error:  # no Exception; of all ranks, on all ranks
                raise OSError(str(error)) from error
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save and not self._engine_saves_scheduler():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _announce_gather(self) -> None:
        """Says once how much memory a gather takes."""
        if self._gathered_bytes is None:
            self._gathered_bytes = full_size_bytes(self.accelerator, self.backbone)
            logger.info(
                f"{self.engine.value} gathers all parameters, {self._gathered_bytes:,} bytes on "
                "each process, once for every rollout, evaluation and save."
            )

    def _engine_saves_scheduler(self) -> bool:
        """Whether DeepSpeed has a scheduler of its own, which it saves together with the rest."""
        if not self.engine.is_deepspeed:
            return False
        # accelerate has this name only where DeepSpeed is installed.
        from accelerate.utils import DeepSpeedSchedulerWrapper

        return isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper)

    def _load_best_partitioned(self) -> None:
        """The best checkpoint back into DeepSpeed's partitions."""
        deepspeed_load_checkpoint(self.model_wrapped, self.state.best_model_checkpoint)


def expect_trained_only(model: nn.Module) -> None:
    """Has `model.load_state_dict(strict=True)` ask for the parameters that train, and no others.

    A checkpoint holds no frozen parameter; quantization state in it belongs to one.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    def forgive(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if key in trained]
        keys.unexpected_keys.clear()

    model.register_load_state_dict_post_hook(forgive)
