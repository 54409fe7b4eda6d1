"""Audited loops under each engine, with faults planted by hand; one rank's part of a launch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from trl_sync.audit import reaction
from trl_sync.audit.auditor import SyncAuditor
from trl_sync.audit.compare import Comparison
from trl_sync.errors import ConfigError, DesyncError

WIDTH = 64
BATCH = 4
STEPS = 5
FAULT_STEP = 3  # planted between this update and the next
STRUCK = 1
PPO_TENSOR = "peft_model.base_model.model.model.layers.1.mlp.up_proj.lora_A.policy.weight"


class Block(nn.Module):
    """A frozen 4-bit layer with an adapter beside it."""

    def __init__(self, storage: torch.dtype) -> None:
        super().__init__()
        from bitsandbytes.nn import Linear4bit

        self.base = Linear4bit(
            WIDTH,
            WIDTH,
            bias=False,
            compute_dtype=torch.float32,
            quant_type="nf4",
            quant_storage=storage,
        )
        self.base.support_avx512bf16_for_cpu = False
        self.down = nn.Linear(WIDTH, 6, bias=False)
        self.up = nn.Linear(6, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        update = self.up(self.down(hidden))
        if hasattr(self, "late"):
            update = update + self.late(hidden)
        return hidden + self.base(hidden) + update


class Model(nn.Module):
    """Numbers -> a number. `head` has rows that do not divide, `scale` too few for every rank."""

    _no_split_modules = ("Block",)

    def __init__(self, storage: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.block = Block(storage)
        self.head = nn.Linear(WIDTH, 3)
        self.scale = nn.Linear(3, 1, bias=False)

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"loss": self.scale(self.head(self.block(self.norm(hidden)))).square().mean()}


class Job:
    """A model under the engine of this process, the same on every rank."""

    def __init__(self, engine: str) -> None:
        from accelerate import Accelerator

        self.engine = engine
        self.accelerator = Accelerator(cpu=engine == "ddp")
        self._fill_in_deepspeed()
        fsdp = engine in ("fsdp2", "hsdp")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Model(torch.float32 if fsdp else torch.uint8).to("cpu")  # the move quantizes
        # Two groups: ZeRO calls the inner optimizer once for each of them in an update.
        trained = (model.block.down, model.block.up), (model.head, model.scale)
        groups = [{"params": [p for m in part for p in m.parameters()]} for part in trained]
        self.optimizer: Any = torch.optim.AdamW(groups, lr=1e-2)
        self.inner = model
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)

    def _fill_in_deepspeed(self) -> None:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None:
            sizes = {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 1}
            sizes["train_batch_size"] = BATCH * self.accelerator.num_processes
            plugin.deepspeed_config |= {**sizes, "gradient_clipping": 1.0}

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(100 * number + self.accelerator.process_index)
        loss = self.model(torch.randn(BATCH, WIDTH, generator=generator))["loss"]
        self.accelerator.backward(loss)
        if self.engine in ("ddp", "fsdp2", "hsdp"):
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def look(self) -> None:
        """A forward without backward: FSDP2's root keeps whole parameters afterwards."""
        with torch.no_grad():
            self.model(torch.ones(BATCH, WIDTH))

    def parameter(self, name: str) -> Any:
        return dict(self.inner.named_parameters())[name]

    def close(self) -> None:
        if self.engine.startswith("zero"):
            self.model.destroy()


def own(parameter: Any) -> Tensor:
    """What this rank holds of a parameter, to be written to."""
    if hasattr(parameter, "ds_tensor"):
        tensor: Tensor = parameter.ds_tensor.data
        rank = torch.distributed.get_rank()
        # Where the elements do not divide, the last partition ends with memory that is never set.
        return tensor[: max(0, parameter.ds_numel - rank * tensor.numel())]
    with torch.no_grad():
        return parameter.data.to_local() if hasattr(parameter, "to_local") else parameter.data


def flip(tensor: Tensor, position: int = 0) -> None:
    """Changes the lowest bit of one 32-bit word or byte."""
    word = torch.int32 if tensor.element_size() == 4 else torch.uint8
    tensor.view(-1).view(word)[position] ^= 1


# The faults. Each is called after update FAULT_STEP, on every rank.


def trainable_bit(job: Job) -> None:
    if job.accelerator.process_index == STRUCK:
        flip(own(job.parameter("block.down.weight")))


def trainable_on_all(job: Job) -> None:
    """`scale` has one row: the second rank of a shard group holds nothing of it."""
    for name in ("block.down.weight", "scale.weight"):
        with torch.no_grad():
            own(job.parameter(name)).mul_(0.5)


def frozen_byte(job: Job) -> None:
    if job.accelerator.process_index == STRUCK:
        flip(own(job.parameter("norm.weight")))


def absmax(job: Job) -> None:
    if job.accelerator.process_index == STRUCK:
        layer = job.inner.block.base
        state = getattr(layer, "quant_state", None) or layer.weight.quant_state
        flip(state.absmax)


def gathered_byte(job: Job) -> None:
    """ZeRO-3 keeps small parameters whole between steps, and computes with that copy."""
    if job.accelerator.process_index == STRUCK:
        flip(job.parameter("head.weight").data)


def late_adapter(job: Job, seed: int | None = None) -> None:
    """An adapter after sharding, with a seed per rank; FSDP2 neither shards nor reduces it."""
    torch.manual_seed(job.accelerator.process_index if seed is None else seed)
    job.inner.block.late = nn.Linear(WIDTH, WIDTH, bias=False)
    job.optimizer.optimizer.add_param_group({"params": [job.inner.block.late.weight]})


def late_adapter_alike(job: Job) -> None:
    """The same one on all ranks: they part by its gradient, which nobody reduces."""
    late_adapter(job, seed=0)


def learning_rate(job: Job) -> None:
    if job.accelerator.process_index == STRUCK:
        for group in job.optimizer.param_groups:
            group["lr"] = 1e-3


def scaled_gradients(job: Job) -> None:
    """From now on rank STRUCK multiplies its gradients, after they were reduced and clipped."""
    if job.accelerator.process_index == STRUCK:
        clip = job.accelerator.clip_grad_norm_

        def clip_and_scale(parameters: Any, norm: float) -> None:
            clip(parameters, norm)
            for parameter in job.inner.parameters():
                if parameter.grad is not None:
                    with torch.no_grad():
                        parameter.grad.to_local().mul_(0.5)

        job.accelerator.clip_grad_norm_ = clip_and_scale


def after_a_look(job: Job) -> None:
    """The bit of a parameter that FSDP2 shows gathered just now."""
    parameter = job.parameter("head.weight")
    job.look()
    if job.accelerator.process_index == STRUCK:
        flip(own(parameter))


FAULTS: dict[str, Callable[[Job], None]] = {
    "trainable_bit": trainable_bit,
    "trainable_on_all": trainable_on_all,
    "frozen_byte": frozen_byte,
    "absmax": absmax,
    "gathered_byte": gathered_byte,
    "late_adapter": late_adapter,
    "late_adapter_alike": late_adapter_alike,
    "learning_rate": learning_rate,
    "scaled_gradients": scaled_gradients,
    "after_a_look": after_a_look,
}


def audits(engine: str, faults: list[str], folder: str) -> dict[str, Any]:
    """What a healthy job and one for each of `faults` came to, on this rank."""
    result: dict[str, Any] = {"without": checksum(run_without(engine).inner)}
    result["healthy"] = healthy(engine, Path(folder))
    for fault in faults:
        result[fault] = named(engine, FAULTS[fault])
    result["repair"] = refusal(engine)
    return result


def run_without(engine: str) -> Job:
    """A healthy job that nobody audits."""
    job = Job(engine)
    for number in range(1, STEPS + 2):
        job.step(number)
        if number == FAULT_STEP:
            job.look()
    job.close()
    return job


def healthy(engine: str, folder: Path) -> dict[str, Any]:
    """A silent run: what it counted, its journal, and the checksum of what it trained."""
    job = Job(engine)
    counts: list[list[int]] = []
    with counted_exchanges() as exchanges:
        auditor = SyncAuditor(
            job.accelerator,
            job.model,
            job.optimizer,
            journal=folder / f"{engine}.jsonl",
            frozen_cover_steps=2,
        )
        with auditor.attach():
            for number in range(1, STEPS + 1):
                exchanges.clear()
                job.step(number)
                counts.append(list(exchanges))
                if number == FAULT_STEP:
                    job.look()
                    auditor.check()
        exchanges.clear()
        job.step(STEPS + 1)  # unseen: the hooks are gone
        counts.append(list(exchanges))
        summary = auditor.summary()
    job.close()
    lines = []
    if job.accelerator.is_main_process:
        text = (folder / f"{engine}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
    return {
        "audits": summary.audits,
        "desyncs": summary.desyncs,
        "exchanges": counts,
        "scopes": lines[0]["scopes"] if lines else {},
        "events": [line["event"] for line in lines],
        "checksum": checksum(job.inner),
    }


def checksum(module: nn.Module) -> str:
    """Of the bytes this rank holds of what `module` trains."""
    found = hashlib.sha256()
    for parameter in module.parameters():
        if parameter.requires_grad:
            found.update(own(parameter).contiguous().numpy().tobytes())
    return found.hexdigest()


def named(engine: str, fault: Callable[[Job], None]) -> dict[str, Any]:
    """What the audit says of a fault planted after update FAULT_STEP."""
    job = Job(engine)
    auditor = SyncAuditor(job.accelerator, job.model, job.optimizer, frozen_cover_steps=1)
    found: dict[str, Any] = {"cause": None}
    with mock.patch.object(reaction, "logger") as logger:
        try:
            with auditor.attach():
                for number in range(1, STEPS + 1):
                    job.step(number)
                    if number == FAULT_STEP:
                        fault(job)
        except DesyncError as error:
            first = error.findings[0]
            found = {
                "cause": first.cause.value,
                "tensor": first.tensor,
                "ranks": list(first.ranks),
                "step": first.step,
                "replicas": list(first.replicas),
                "elements": first.difference.num_different if first.difference else None,
                "others": len(error.findings) - 1,
            }
    found["warnings"] = [str(call.args[1]) for call in logger.warning.call_args_list]
    job.close()
    return found


def refusal(engine: str) -> str:
    """The refusal to repair, or nothing."""
    job = Job(engine)
    auditor = SyncAuditor(job.accelerator, job.model, job.optimizer, on_desync="repair")
    try:
        with auditor.attach():
            return ""
    except ConfigError as error:
        return str(error)
    finally:
        job.close()


@contextlib.contextmanager
def counted_exchanges() -> Iterator[list[int]]:
    """Sizes in numbers of every all-reduce of the audit in the block."""
    sizes: list[int] = []
    agree = Comparison.agree

    def counting(comparison: Comparison, values: Any) -> list[bool]:
        sizes.append(len(values))
        return agree(comparison, values)

    with mock.patch.object(Comparison, "agree", counting):
        yield sizes


def ppo(engine: str, folder: str) -> dict[str, Any]:
    """PPO with the audit and without, then with one bit of a shard flipped on one rank."""
    from trl_sync import SyncAuditCallback

    plain = _ppo_run(engine, folder, [])
    callback = SyncAuditCallback(journal=Path(folder) / f"{engine}.jsonl")
    audited = _ppo_run(engine, folder, [callback])
    summary = callback.summary()
    return {
        "without": plain,
        "with": audited,
        "audits": summary.audits,
        "desyncs": summary.desyncs,
        "found": _ppo_desync(engine, folder),
    }


def _ppo_run(engine: str, folder: str, callbacks: list[Any]) -> str:
    """The checksum of what this rank has trained after four updates."""
    from accelerate.state import AcceleratorState
    from peft import LoraConfig

    import engines
    import tiny
    from trl_sync import PPOTrainer

    if engine.startswith("zero"):
        # accelerate takes a DeepSpeed plugin from arguments for the first Accelerator only.
        AcceleratorState._reset_state()
    episodes = 16 * int(os.environ["WORLD_SIZE"])
    trainer = PPOTrainer(
        tiny.config(
            Path(folder) / os.environ["RANK"], total_episodes=episodes, **engines.settings(engine)
        ),
        tiny.tokenizer(),
        tiny.llama(),
        reward_model=_count_e,
        train_dataset=tiny.prompts(),
        callbacks=callbacks,
        peft_config=LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    return checksum(trainer.backbone)


def _count_e(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(text.count("e")) for text in completions]


def _ppo_desync(engine: str, folder: str) -> dict[str, Any]:
    """What the audit says of one bit, changed between two updates of PPO."""
    from trl_sync import SyncAuditCallback

    callback = SyncAuditCallback(journal=None)
    try:
        _ppo_run(engine, folder, [_strike(callback), callback])
    except DesyncError as error:
        first = error.findings[0]
        return {
            "cause": first.cause.value,
            "tensor": first.tensor,
            "role": first.role,
            "ranks": list(first.ranks),
            "step": first.step,
        }
    return {"cause": None}


def _strike(audit: Any) -> Any:
    """A callback that flips a bit on rank STRUCK once update FAULT_STEP is done."""
    from transformers import TrainerCallback

    def on_step_end(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == FAULT_STEP and args.process_index == STRUCK:
            parameters = dict(audit.auditor.inventory.model.named_parameters())
            flip(own(parameters[PPO_TENSOR]))

    callback = TrainerCallback()
    vars(callback)["on_step_end"] = on_step_end
    return callback
