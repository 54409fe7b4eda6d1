"""Training with and without the audit, and the state after every step, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

STEPS = 6
# Each reads more, or at other times, than the default does.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "verdict one step late": {"blocking": False},
    "every third step": {"every_steps": 3},
    "all frozen bytes every step": {"frozen_cover_steps": 1},
    "warn": {"on_desync": "warn"},
    "repair": {"on_desync": "repair"},
    "no self-test": {"self_test": False},
}
# What happened, and checksums of every part of the state then.
Trace = list[tuple[str, dict[str, str]]]


def state_of(modules: list[nn.Module], optimizer: Any) -> dict[str, str]:
    """Checksums of parameters, buffers, quantization and optimizer state, modes and generators."""
    from trl_sync.quantization_state import quantization_tensors

    parts: dict[str, list[Tensor]] = {"trainable": [], "gradients": [], "frozen": []}
    modes = []
    for module in modules:
        for parameter in module.parameters():
            parts["trainable" if parameter.requires_grad else "frozen"].append(parameter)
            if parameter.grad is not None:
                parts["gradients"].append(parameter.grad)
        parts["frozen"] += [*module.buffers(), *(t for _, t in quantization_tensors(module))]
        modes += [(part.training, len(part._buffers)) for part in module.modules()]
    parts["optimizer"] = [
        value
        for _, state in sorted(optimizer.state_dict()["state"].items())
        for _, value in sorted(state.items())
        if isinstance(value, Tensor)
    ]
    found = {name: _sha(*map(_bytes, tensors)) for name, tensors in parts.items()}
    options = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    return found | {
        "modes": _sha(pickle.dumps(modes)),
        "optimizer options": repr(options),
        "torch random state": _sha(_bytes(torch.get_rng_state())),
        "python random state": _sha(repr(random.getstate()).encode()),
        "numpy random state": _sha(
            *(np.asarray(part).tobytes() for part in np.random.get_state(legacy=True)[1:])
        ),
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _sha(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()


# Three kinds of training. Each takes its folder and the audit's options, None for no audit.


def drill(folder: Path, options: dict[str, Any] | None, check: bool = True) -> Trace:
    """The drill job, LoRA on an NF4 base, with dropout before the adapters.

    `check`: the audit must have run and found nothing.
    """
    from trl_sync import SyncAuditor
    from trl_sync.audit.drill import DrillJob

    seed_everything()
    job = DrillJob()
    for module in job.unwrapped_model.modules():
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, nn.ModuleDict):
            dropout["policy"] = nn.Dropout(0.2)
    modules = [job.unwrapped_model, *job.modules.values()]
    trace: Trace = []

    def on_step(job: Any, number: int) -> None:
        trace.append((f"step {number}", state_of(modules, job.optimizer)))

    if options is None:
        losses = job.train(STEPS, on_step)
    else:
        auditor = SyncAuditor(
            job.accelerator,
            job.model,
            job.optimizer,
            modules=job.modules,
            journal=folder / "journal.jsonl",
            **options,
        )
        with auditor.attach():
            losses = job.train(STEPS, on_step)
        assert auditor.summary().audits > 2
        assert not check or auditor.summary().desyncs == 0
    trace.append(("end", state_of(modules, job.optimizer)))
    trace.append(("losses", {"losses": str([loss.hex() for loss in losses])}))
    return trace


class Recorder(TrainerCallback):
    """Keeps the state at every event, as it is before the audit's own callback runs."""

    def __init__(self, *further: nn.Module) -> None:
        self.trace: Trace = []
        self._further = list(further)

    def _keep(self, event: str, state: Any, kwargs: Any) -> None:
        modules = [kwargs["model"], *self._further]
        name = f"{event} {state.global_step}"
        self.trace.append((name, state_of(modules, kwargs["optimizer"])))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep("step begin", state, kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep("optimizer step", state, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep("step end", state, kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep("evaluate", state, kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep("save", state, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep("train end", state, kwargs)

    def finish(self, trainer: Any) -> Trace:
        """The trace, with the state after training and all that was logged but times."""
        kwargs = {"model": trainer.model_wrapped, "optimizer": trainer.optimizer}
        self._keep("end", trainer.state, kwargs)
        timed = ("time", "runtime", "per_second", "eps")
        logged = [
            {k: float(v).hex() for k, v in row.items() if not any(word in k for word in timed)}
            for row in trainer.state.log_history
        ]
        self.trace.append(("log", {"log": str(logged)}))
        return self.trace


def trainer(folder: Path, options: dict[str, Any] | None) -> Trace:
    """transformers' Trainer with dropout, which saves and evaluates."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    import tiny

    seed_everything()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = tiny.llama(attention_dropout=0.2, **small)
    recorder = Recorder()
    rows = [[3 + (i * j) % 20 for j in range(8)] for i in range(24)]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    made = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            save_steps=4,
            eval_strategy="steps",
            eval_steps=3,
            logging_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(6)),
        callbacks=[recorder, *audit_callbacks(options)],
    )
    made.train()
    return recorder.finish(made)


def ppo(folder: Path, options: dict[str, Any] | None) -> Trace:
    """The PPO trainer with a reward model and dropout in its adapters."""
    from peft import LoraConfig

    import tiny
    from trl_sync import PPOTrainer

    seed_everything()
    reward = tiny.reward_llama()
    recorder = Recorder(reward)
    config = tiny.config(
        folder,
        total_episodes=32,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
    )
    made = PPOTrainer(
        config,
        tiny.tokenizer(),
        tiny.llama(),
        reward_model=reward,
        train_dataset=tiny.prompts(),
        eval_dataset=tiny.prompts(4),
        callbacks=[recorder, *audit_callbacks(options, modules={"reward": reward})],
        peft_config=LoraConfig(
            r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM"
        ),
    )
    made.train()
    return recorder.finish(made)


def audit_callbacks(options: dict[str, Any] | None, **more: Any) -> list[Any]:
    from trl_sync import SyncAuditCallback

    return [] if options is None else [SyncAuditCallback(**more, **options)]


def seed_everything() -> None:
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)


TRAININGS: dict[str, Callable[[Path, dict[str, Any] | None], Trace]] = {
    "drill": drill,
    "trainer": trainer,
    "ppo": ppo,
}


def traces(folder: Path, wanted: list[tuple[str, str | None]]) -> dict[tuple[str, str | None], Any]:
    """A trace for each kind of training with each set of options; None is without the audit."""
    found = {}
    for kind, name in wanted:
        place = folder / f"{kind} {name}"
        found[kind, name] = TRAININGS[kind](place, None if name is None else OPTIONS[name])
    return found


def traces_and_meddled(
    folder: Path, wanted: list[tuple[str, str | None]]
) -> tuple[dict[tuple[str, str | None], Any], dict[str, Trace]]:
    """`traces`, and one of the drill job for each way of meddling."""
    meddled = {}
    for name in MEDDLING:
        with meddling(name):
            meddled[name] = drill(folder, {"on_desync": "warn"}, check=False)
    return traces(folder, wanted), meddled


# What an audit must not do; each makes the comparison of traces fail.


def _draws_from_torch(*args: Any) -> None:
    torch.rand(1)


def _draws_from_python(*args: Any) -> None:
    random.random()


def _draws_from_numpy(*args: Any) -> None:
    np.random.rand()


def _touches_a_weight(snapshotter: Any) -> None:
    weight = snapshotter.inventory.trainable.tensors[0].data.view(-1)
    weight.view(torch.int32)[0] ^= 1


def _touches_a_moment(snapshotter: Any) -> None:
    for name, tensor in snapshotter.inventory.optimizer_state().items():
        if name.endswith("lora_B.policy.weight.exp_avg"):
            tensor.view(-1).view(torch.int32)[0] ^= 1 << 20
            return


def _touches_the_base(snapshotter: Any) -> None:
    snapshotter.inventory.frozen.tensors[0].data.view(-1).view(torch.uint8)[0] ^= 1


def _switches_dropout_off(snapshotter: Any) -> None:
    snapshotter.inventory.model.eval()


# The deed, the first event after it, and the parts of the state that have changed by then.
MEDDLING: dict[str, tuple[Callable[..., None], str, set[str]]] = {
    "draws from torch": (_draws_from_torch, "step 1", {"torch random state"}),
    "draws from python": (_draws_from_python, "step 1", {"python random state"}),
    "draws from numpy": (_draws_from_numpy, "step 1", {"numpy random state"}),
    "touches a weight": (_touches_a_weight, "step 1", {"trainable"}),
    # There is none before the first update.
    "touches a moment": (_touches_a_moment, "step 2", {"trainable", "optimizer"}),
    "touches the base": (_touches_the_base, "step 1", {"frozen"}),
    "switches dropout off": (_switches_dropout_off, "step 1", {"modes"}),
}


@contextlib.contextmanager
def meddling(name: str) -> Iterator[None]:
    """Before its look at the gradients the audit also does what `name` says."""
    from trl_sync.audit.snapshotter import Snapshotter

    look = Snapshotter.before_update
    deed = MEDDLING[name][0]

    def before_update(snapshotter: Any, **options: Any) -> None:
        deed(snapshotter)
        look(snapshotter, **options)

    with mock.patch.object(Snapshotter, "before_update", before_update):
        yield
