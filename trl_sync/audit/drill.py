"""A small training job on a frozen 4-bit base, on which every fault can be planted.

LoRA adapters on an NF4 base, a frozen reference with a dropout layer, a frozen reward head outside
the wrapped model, AdamW and two micro-batches an update, under the engine that accelerate's
environment chooses: DistributedDataParallel, ZeRO-1 to 3, FSDP2 or HSDP. All of it is made on the
spot; the ranks' data differ and follow from seed, update, micro-batch and rank.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trl_sync.audit.drill_engine import make_accelerator, release, storage_dtype
from trl_sync.audit.faults import FAULTS, Planted, launched_alone
from trl_sync.audit.faults.state import capture, restore

HIDDEN = 128
VOCABULARY = 96
LAYERS = 2
SEQUENCES = 4
TOKENS = 12
# What a job must be like for a fault to be silent in it.
JOB_OPTIONS: dict[str, dict[str, Any]] = {
    "replaced_after_wrapping": {"find_unused_parameters": True},
}


class DrillLayer(nn.Module):
    """A residual block of two 4-bit projections, packed into `storage`."""

    def __init__(self, storage: torch.dtype) -> None:
        super().__init__()
        from bitsandbytes.nn import Linear4bit

        options: dict[str, Any] = {"bias": False, "quant_type": "nf4", "quant_storage": storage}
        options["compute_dtype"] = torch.float32
        self.norm = nn.LayerNorm(HIDDEN)
        self.q_proj = Linear4bit(HIDDEN, HIDDEN, **options)
        self.o_proj = Linear4bit(HIDDEN, HIDDEN, **options)
        for projection in (self.q_proj, self.o_proj):
            # On some CPUs bitsandbytes repacks the weight in place when it runs in evaluation mode.
            projection.support_avx512bf16_for_cpu = False

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.o_proj(functional.gelu(self.q_proj(self.norm(hidden))))


class DrillModel(nn.Module):
    """Token ids -> logits of the next token."""

    # What FSDP shards and gathers as one, under the name that transformers gave it.
    _no_split_modules = ("DrillLayer",)

    def __init__(self, storage: torch.dtype = torch.uint8) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(DrillLayer(storage) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(self.norm(hidden))


class DrillJob:
    """Model, optimizer, accelerator, reference and reward head of one job, ready to train.

    Jobs can follow one another in a process. Every rank starts from the same `seed`.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        gradient_accumulation_steps: int = 2,
        max_grad_norm: float = 1.0,
        learning_rate: float = 1e-2,
        find_unused_parameters: bool = False,
    ) -> None:
        self.seed = seed
        self.max_grad_norm = max_grad_norm
        self.num_updates = 0
        self.accelerator = make_accelerator(
            micro_batch_size=SEQUENCES,
            gradient_accumulation_steps=gradient_accumulation_steps,
            max_grad_norm=max_grad_norm,
            find_unused_parameters=find_unused_parameters,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = _adapted_model(self.accelerator.device, storage_dtype(self.accelerator))
            self.reference = _frozen(
                nn.Embedding(VOCABULARY, HIDDEN), nn.Dropout(0.1), nn.Linear(HIDDEN, VOCABULARY)
            ).to(self.accelerator.device)
            self.reward_head = _frozen(nn.Linear(VOCABULARY, 1)).to(self.accelerator.device)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=learning_rate)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The frozen modules beside the model, by role."""
        return {"reference": self.reference, "reward": self.reward_head}

    @property
    def unwrapped_model(self) -> nn.Module:
        """The peft model inside the wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def train(
        self, num_steps: int, on_step: Callable[[DrillJob, int], None] | None = None
    ) -> list[float]:
        """The losses of `num_steps` more updates; `on_step(job, number)` follows each update."""
        losses = []
        self.model.train()
        for _ in range(num_steps):
            self.num_updates += 1
            for micro_batch in range(self.accelerator.gradient_accumulation_steps):
                losses.append(self._micro_batch(self._tokens(micro_batch)))
            if on_step is not None:
                on_step(self, self.num_updates)
        return losses

    def _micro_batch(self, input_ids: Tensor) -> float:
        """One forward and backward, with the update after the last micro-batch."""
        with self.accelerator.accumulate(self.model):
            loss = self._loss(input_ids)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()

    def _loss(self, input_ids: Tensor) -> Tensor:
        """Cross-entropy weighted by the reward head, plus the distance from the reference."""
        logits = self.model(input_ids)
        with torch.no_grad():
            reference = self.reference(input_ids)
            weights = torch.sigmoid(self.reward_head(reference).mean(dim=(1, 2)))
        tokens = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
        )
        weighted = (tokens.view(SEQUENCES, -1).mean(1) * weights).mean()
        return weighted + 0.1 * functional.mse_loss(logits, reference)

    def _tokens(self, micro_batch: int) -> Tensor:
        generator = torch.Generator()
        rank = int(os.environ.get("RANK", "0"))
        numbers = (self.seed, self.num_updates, micro_batch, rank)
        generator.manual_seed(sum(n * 1000**i for i, n in enumerate(numbers)))
        tokens = torch.randint(VOCABULARY, (SEQUENCES, TOKENS), generator=generator)
        return tokens.to(self.accelerator.device)

    def trained_state(self, num_steps: int = 2) -> dict[str, Any]:
        """The job's state after `num_steps` more updates, which are taken back."""
        before = capture(self.model, self.optimizer)
        self.train(num_steps)
        after = capture(self.model, self.optimizer)
        restore(self.model, self.optimizer, before)
        self.num_updates -= num_steps
        return after

    def close(self) -> None:
        """Ends the job: what its engine keeps outside of it is let go."""
        release(self.model)


def _adapted_model(device: torch.device, storage: torch.dtype) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base = DrillModel(storage).to(device)  # the move quantizes
    # peft and accelerate read this mark from models that transformers loaded in 4 bits.
    vars(base)["is_loaded_in_4bit"] = True
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], lora_dropout=0.0)
    return get_peft_model(base, config, adapter_name="policy")


def _frozen(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).requires_grad_(False).eval()


def plant_on(
    job: DrillJob,
    fault: str,
    *,
    step: int,
    rank: int | None = None,
    late: bool = False,
    **options: Any,
) -> AbstractContextManager[Planted]:
    """The block of the fault called `fault`, aimed at the job; `options` go to the fault.

    Faults that can act at once do so, unless `late` has them wait for update `step`, too. `rank`
    None means the fault's own choice.

    Raises:
        ValueError: there is no such fault, or it is none that strikes a running job.
    """
    if fault not in FAULTS:
        raise ValueError(f"no fault is called {fault}; expected one of {', '.join(FAULTS)}")
    if FAULTS[fault].on == "checkpoint" or fault == "launched_alone":
        raise ValueError(f"{fault} does not strike a running job; call it with its own target")
    parameters = inspect.signature(FAULTS[fault].plant).parameters
    makers: Mapping[str, Callable[[], Any]] = {
        "model": lambda: job.model,
        "optimizer": lambda: job.optimizer,
        "reference": lambda: job.reference,
        "head": lambda: job.reward_head,
        "checkpoint": job.trained_state,
    }
    arguments = {name: make() for name, make in makers.items() if name in parameters}
    if "step" in parameters and (late or parameters["step"].default is inspect.Parameter.empty):
        arguments["step"] = step
    if "rank" in parameters and rank is not None:
        arguments["rank"] = rank
    return FAULTS[fault].plant(**arguments | options)


def run_drill(
    fault: str | None,
    *,
    steps: int = 6,
    fault_step: int = 3,
    rank: int | None = None,
    fault_options: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    **audit_options: Any,
) -> Planted | None:
    """What was planted, after an audited job with the fault ran to its end on this process's rank.

    An audit that raises ends it earlier, with its error. Without a fault it is the healthy job.
    """
    if output_dir is not None:
        audit_options.setdefault("journal", Path(output_dir, "sync_audit.jsonl"))
    if fault == "launched_alone":
        with launched_alone() as planted:
            _train_audited(DrillJob(), steps, audit_options)
        return planted
    job = DrillJob(**JOB_OPTIONS.get(fault or "", {}))
    if fault is None:
        _train_audited(job, steps, audit_options)
        return None
    options = dict(fault_options or {})
    with plant_on(job, fault, step=fault_step, rank=rank, **options) as planted:
        _train_audited(job, steps, audit_options)
    return planted


def _train_audited(job: DrillJob, steps: int, audit_options: Mapping[str, Any]) -> None:
    from trl_sync.audit.auditor import SyncAuditor

    auditor = SyncAuditor(
        job.accelerator, job.model, job.optimizer, modules=job.modules, **audit_options
    )
    with auditor.attach():
        job.train(steps)
