"""What one rank of an engine does for tests/ppo/test_engines.py; all of it in one launch.

Where a run is compared with one process, responses are scripted: a function of the prompt alone,
of any length from none to the limit. With them every number of ranks trains on the same episodes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import engines
import rollouts
import runs
import tiny
from trl_sync import SyncAuditCallback
from trl_sync.backbone.loading import load_base
from trl_sync.backbone.quantization import nf4_config
from trl_sync.ppo import experience
from trl_sync.ppo.batch import PromptBatch, Rollout

GLOBAL_BATCH = 16
RESPONSE = 8
UPDATES = 8
# 2 iterations of 2 epochs of 2 mini-batches; a mini-batch has several micro-batches on each rank.
SIZES = {
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "total_episodes": 2 * GLOBAL_BATCH,
    "response_length": RESPONSE,
    "stop_token": None,
    "max_grad_norm": 0.05,
    "missing_eos_penalty": None,
}
SGD = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-3}


def rank_and_ranks() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def base(folder: Path, precision: str) -> Any:
    if precision == "fp32":
        return tiny.llama()
    return load_base(str(folder / "base"), quantization_config=nf4_config())


def scripted(model: Any, prompts: PromptBatch, *args: Any, **kwargs: Any) -> Rollout:
    """Responses that follow from the prompts alone; every fifth is empty."""
    responses = []
    for ids in prompts.token_ids:
        generator = torch.Generator().manual_seed(zlib.crc32(str(list(ids)).encode()))
        length = int(torch.randint(0, 5, (), generator=generator)) * 2
        responses.append(torch.randint(3, 30, (length,), generator=generator).tolist())
    made = rollouts.rollout(
        prompts.token_ids, responses, columns=prompts.columns, texts=prompts.prompts
    )
    return dataclasses.replace(made, prompts=prompts)


def trainer_for(
    engine: str, folder: Path, model: Any, ranks: int, local_batch: int, **changes: Any
) -> Any:
    """A trainer whose rollout batch is `local_batch` on each of `ranks`, in micro-batches of 2."""
    options = SIZES | engines.settings(engine) | changes
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": local_batch // 2}
    return runs.make(folder, model=model, kind=runs.WatchedTrainer, **options)


def scripted_run(engine: str, folder: Path, precision: str, **changes: Any) -> Any:
    """A trainer after `UPDATES` updates on scripted responses, from random adapters."""
    _, ranks = rank_and_ranks()
    backbone = runs.SharedBackbone(base(folder, precision), runs.lora())
    runs.randomise(backbone)
    trainer = trainer_for(engine, folder, backbone, ranks, GLOBAL_BATCH // ranks, **changes)
    with mock.patch.object(experience, "roll_out", scripted):
        trainer.train()
    return trainer


def as_one_process(folder: Path, precision: str, ranks: int, **changes: Any) -> dict[str, Tensor]:
    """The parameters after the same updates in one process, mini-batches made up as on `ranks`."""
    backbone = runs.SharedBackbone(base(folder, precision), runs.lora())
    runs.randomise(backbone)
    trainer = trainer_for("none", folder, backbone, 1, GLOBAL_BATCH, **changes)

    def mini_batches(loader: Any, iteration: int) -> Iterator[Tensor]:
        plan = trainer.plan
        for epoch in range(plan.num_ppo_epochs):
            generator = loader._generator(experience._MINI_BATCHES, iteration, epoch)
            order = torch.from_numpy(generator.permutation(GLOBAL_BATCH // ranks))
            for rows in order.split(plan.local_mini_batch_size // ranks):
                # Rank r of n holds rows r, r + n, r + 2n ... of the rollout batch.
                yield torch.cat([rows * ranks + rank for rank in range(ranks)])

    with (
        mock.patch.object(experience, "roll_out", scripted),
        mock.patch.object(experience.ExperienceLoader, "_mini_batches", mini_batches),
    ):
        trainer.train()
    return whole_parameters(trainer)


def whole_parameters(trainer: Any) -> dict[str, Tensor]:
    """Every parameter that trains, whole on every rank. A collective."""
    values = {}
    for name, parameter in trainer.backbone.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                values[name] = parameter.detach().clone()
        elif isinstance(parameter, DTensor):
            values[name] = parameter.full_tensor().detach().clone()
        else:
            values[name] = parameter.detach().clone()
    return values


def checksums(values: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.md5(value.contiguous().numpy().tobytes()).hexdigest()
        for name, value in values.items()
    }


def frozen_bytes(trainer: Any) -> dict[str, int]:
    """Bytes of the 4-bit weights that this rank holds, and of the whole."""
    local = whole = 0
    for _, parameter in trainer.backbone.named_parameters():
        if "base_layer" in _ or parameter.requires_grad:
            held = getattr(parameter, "ds_tensor", parameter)
            held = held.to_local() if isinstance(held, DTensor) else held
            if not parameter.requires_grad:
                local += held.numel() * held.element_size()
                whole += getattr(parameter, "ds_numel", parameter.numel()) * held.element_size()
    return {"local": local, "whole": whole}


def one_gradient(engine: str, folder: Path) -> dict[str, Any]:
    """One update with plain SGD at rate 1: by how much it moved, and each rank's own gradient.

    The own gradient is computed on a second model that no engine holds, from the micro-batches
    that this rank was given.
    """
    sizes = {"num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": GLOBAL_BATCH}
    options = SGD | {"learning_rate": 1.0, "max_grad_norm": 0.0} | sizes
    alone = runs.SharedBackbone(base(folder, "fp32"), runs.lora())
    runs.randomise(alone)
    before = {n: p.detach().clone() for n, p in alone.named_parameters() if p.requires_grad}
    engines.start_anew(engine)
    trainer = scripted_run(engine, folder, "fp32", **options)
    after = whole_parameters(trainer)
    alone.train()
    for kept in list(trainer.micro_batches):
        batch = {n: t for n, t in kept.items() if n not in ("step", "ratio", "values")}
        trainer.compute_loss(alone, batch).backward()
    own = {n: p.grad.clone() for n, p in alone.named_parameters() if p.requires_grad}
    return {"moved": {n: before[n] - after[n] for n in after}, "own": own}


def generated_runs(engine: str, folder: Path) -> dict[str, Any]:
    """A run on an NF4 base that generates, saves and evaluates; and one resumed from its middle."""
    options = {
        "save_strategy": "steps",
        "save_steps": 4,
        "kl_target": 0.5,
        "kl_horizon": 100,
        **engines.settings(engine),
    }
    rank, ranks = rank_and_ranks()
    options["gradient_accumulation_steps"] = 8 // ranks  # a rollout batch of 32, whatever the ranks
    # Otherwise DDP orders its buckets anew after the first backward, also the first one after a
    # resume; and of more than two ranks the order of a sum depends on the place in a bucket.
    options["ddp_find_unused_parameters"] = ranks > 2
    lora = runs.lora(lora_dropout=0.1)
    outcomes = []
    for resume in (None, str(folder / "out" / "checkpoint-4")):
        engines.start_anew(engine)
        # As a script does: the arguments come first, which changes how models are loaded.
        tiny.config(folder / "unused", **engines.settings(engine))
        engines.start_anew(engine)
        audit = SyncAuditCallback()
        trainer = runs.make(
            folder, model=base(folder, "nf4"), peft_config=lora, callbacks=[audit], **options
        )
        answered = None if resume else trainer.completions(tiny.prompts(5))
        trainer.train(resume_from_checkpoint=resume)
        outcomes.append(checksums(whole_parameters(trainer)))
        assert audit.summary().desyncs == 0
        if resume is None:
            first = {
                "audits": audit.summary().audits,
                "answers_before": len(answered["query"]),
                "frozen": frozen_bytes(trainer),
                "evaluated": trainer.evaluate(tiny.prompts(5))["eval_objective/response_length"],
                "lengths": different_lengths(trainer, rank),
                "gathered_bytes": runs.rows(trainer)[-1].get("gathered_bytes"),
                "engine": trainer.engine.value,
            }
            trainer.save_model(str(folder / "final"))
            first["unchanged"] = checksums(whole_parameters(trainer)) == outcomes[0]
    return first | {"resumed_equal": outcomes[0] == outcomes[1], "final": outcomes[0]}


def different_lengths(trainer: Any, rank: int) -> int:
    """Rank 0 generates in three batches of 8 tokens, the others one token: none waits for another.

    Without the gather each forward would be a collective, and the longer rank would hang.
    """
    sampling = dataclasses.replace(trainer.sampling, stop_token_ids=())
    short = dataclasses.replace(sampling, response_length=8 if rank == 0 else 1)
    tokens = 0
    with trainer.gathered():
        for _ in range(3 if rank == 0 else 1):
            prompts = trainer.train_dataset.batch([rank, rank + 1])
            made = experience.roll_out(
                trainer.backbone, prompts, short, batch_size=2, device=trainer.accelerator.device
            )
            tokens += int(made.response_mask.sum())
    return tokens


def everything(engine: str, path: str) -> dict[str, Any]:
    """All of the above on this rank; tensors go to files, which ranks do not return."""
    folder = Path(path)
    rank, _ = rank_and_ranks()
    found: dict[str, Any] = {}
    for name, precision, optimizer in (("sgd", "fp32", SGD), ("adam", "nf4", ADAM)):
        engines.start_anew(engine)
        trainer = scripted_run(engine, folder, precision, **optimizer)
        values = whole_parameters(trainer)
        found[name] = checksums(values)
        found["updates"] = trainer.state.global_step
        found["empty"] = sum(
            int((batch["response_mask"].sum(1) == 0).sum()) for batch in trainer.micro_batches
        )
        if rank == 0:
            torch.save(values, folder / f"{engine}_{name}.pt")
    gradients = one_gradient(engine, folder)
    torch.save(gradients, folder / f"{engine}_gradient_{rank}.pt")
    return found | generated_runs(engine, folder)
