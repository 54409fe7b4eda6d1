"""The two-line use of the audit, unchanged, in trainers of transformers and TRL."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import run_on_ranks
from trainer_runs import STEPS, attempt, base_model, save_bases, trained, trainer
from trl_sync import SyncAuditCallback
from trl_sync.audit import faults

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

KINDS = ("trainer", "sft", "dpo", "kto", "reward", "rloo", "grpo")
BASES = ("full", "lora", "nf4")
JOBS = [(kind, base) for kind in KINDS for base in BASES]


def healthy(jobs: list[tuple[str, str]], folder: str, alone: bool = False) -> dict[str, Any]:
    """The two-line use in each trainer, by kind and base, and what needs more than one trainer."""
    if alone:
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(variable, None)
    found: dict[str, Any] = {}
    for kind, base in jobs:
        callback = SyncAuditCallback()
        found[f"{kind}-{base}"] = trained(trainer(kind, base, Path(folder), callback), callback)
    found["reference"] = with_reference(Path(folder))
    found |= life_of_a_run(Path(folder))
    found["parity"] = [losses(Path(folder), audited) for audited in (False, True)]
    assert torch.distributed.is_initialized() != alone
    return found


def with_reference(folder: Path) -> dict[str, Any]:
    """DPO that audits the reference it loaded itself; TRL shows callbacks only the policy."""
    made = trainer("dpo", "full", folder, None, name="reference")
    # TRL 1.16 runs it under no_grad, but leaves requires_grad as it was loaded.
    made.ref_model.requires_grad_(False)
    callback = SyncAuditCallback(modules={"reference": made.ref_model})
    made.add_callback(callback)
    return trained(made, callback)


def life_of_a_run(folder: Path) -> dict[str, Any]:
    """Evaluation, saving, accumulation and the best model; trained again; resumed in four ways.

    Not on 4-bit weights: an evaluation on a CPU with AVX512-BF16 rounds their scales (bitsandbytes
    0.50.2), which is a change of the base.
    """
    settings = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "gradient_accumulation_steps": 2, "load_best_model_at_end": True,
    }  # fmt: skip
    callback = SyncAuditCallback()
    made = trainer("sft", "lora", folder, callback, name="life", **settings)
    found = {name: trained(made, callback) for name in ("life", "again")}
    checkpoint = str(folder / "life" / "checkpoint-4")
    settings["max_steps"] = STEPS + 2
    for name, options in {
        "resumed": {},
        "resumed_elsewhere": {},
        "resumed_as_told": {"resume_from": checkpoint},
        "resumed_unverified": {},
    }.items():
        if name == "resumed_unverified":
            # Each rank a copy of its own, without the manifest.
            copy = folder / f"bare-{os.environ.get('RANK', '0')}"
            shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("sync_manifest.json"))
            checkpoint = str(copy)
        callback = SyncAuditCallback(**options)
        output = "life" if name == "resumed" else name
        made = trainer("sft", "lora", folder, callback, name=output, **settings)
        found[name] = trained(made, callback, resume_from_checkpoint=checkpoint)
    return found


def losses(folder: Path, audited: bool) -> tuple[list[float], float]:
    """The losses of a run with dropout, and the sum of what it trained."""
    made = trainer("sft", "lora", folder, None, name=f"parity-{audited}", seed=11)
    if audited:
        made.add_callback(SyncAuditCallback())
    with contextlib.redirect_stdout(io.StringIO()):
        made.train()
    trainable = [p for p in made.model.parameters() if p.requires_grad]
    total = sum(float(p.detach().double().sum()) for p in trainable)
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry], total


FAULT_STEP = 3
# What a fault needs beside the model it is planted in.
ON_MODEL = (
    "bit_flipped", "base_byte_changed", "absmax_changed", "adapter_merged", "gradients_clipped",
    "forward_unwrapped", "no_sync_on_last_micro_batch",
)  # fmt: skip
FAULTS = (*ON_MODEL, "step_skipped", "other_learning_rate", "extra_optimizer_step")


def faulty(folder: str) -> dict[str, Any]:
    """What is said and saved on this rank when a fault is planted in a trainer's third step."""
    found = {name: with_fault(name, Path(folder)) for name in FAULTS}
    found["dropout_in_reference"] = with_dropout_in_reference(Path(folder))
    reactions = {
        "warn": ("gradients_clipped", {"on_desync": "warn"}),
        "stop": ("gradients_clipped", {"on_desync": "stop"}),
        # Seen by the full audit before the save, for the rolling one is elsewhere.
        "stop_at_save": ("base_byte_changed", {"on_desync": "stop"}),
    }
    for output, (fault, options) in reactions.items():
        found[output] = with_fault(
            fault, Path(folder), output=output, save_total_limit=1, **options
        )
    found["resumed_stopped"] = resumed_stopped(Path(folder))
    return found


def with_fault(
    name: str, folder: Path, *, output: str = "", on_desync: str = "raise", **changes: Any
) -> dict[str, Any]:
    """SFT on a 4-bit base with a fault in update 3, a checkpoint a step, and two micro-batches."""
    cover = 64 if output else 1
    callback = SyncAuditCallback(frozen_cover_steps=cover, on_desync=on_desync)
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    made = trainer("sft", "nf4", folder, callback, name=output or name, **settings, **changes)
    given = {"model": made.model} if name in ON_MODEL else {}
    return attempt(made, callback, faults.FAULTS[name].plant(step=FAULT_STEP, **given))


def with_dropout_in_reference(folder: Path) -> dict[str, Any]:
    """DPO whose own reference is put into training mode, by a fault in update 3."""
    reference = base_model("full", folder).requires_grad_(False)
    reference.model.norm = torch.nn.Sequential(reference.model.norm, torch.nn.Dropout(0.1))
    reference.eval()
    callback = SyncAuditCallback(modules={"reference": reference})
    settings = {"save_strategy": "steps", "save_steps": 1, "disable_dropout": False}
    name = "dropout_in_reference"
    made = trainer("dpo", "full", folder, callback, name=name, ref_model=reference, **settings)
    return attempt(made, callback, faults.dropout_in_reference(reference, step=FAULT_STEP))


def resumed_stopped(folder: Path) -> dict[str, Any]:
    """Goes on from the checkpoint that `stop` wrote."""
    callback = SyncAuditCallback()
    made = trainer("sft", "nf4", folder, callback, name="stop")
    checkpoint = str(folder / "stop" / f"checkpoint-{FAULT_STEP}")
    return attempt(made, callback, resume_from_checkpoint=checkpoint)


@pytest.fixture(scope="module", params=[1, 2], ids=["one_process", "two_ranks"])
def outcomes(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw of every healthy run; one process is launched without a process group."""
    folder = tmp_path_factory.mktemp("healthy")
    save_bases(folder)
    alone = request.param == 1
    arguments = (JOBS, str(folder), alone)
    return run_on_ranks(healthy, *arguments, num_ranks=request.param, deadline_s=280)


@pytest.mark.parametrize("kind, base", JOBS)
def test_each_trainer_is_audited_in_silence(outcomes: Any, kind: str, base: str) -> None:
    runs = [rank[f"{kind}-{base}"] for rank in outcomes]
    for run in runs:
        # One at the beginning, one a step, one at the end: silence is not absence.
        assert (run["audits"], run["desyncs"], run["messages"]) == (STEPS + 2, 0, [])
        assert len(run["losses"]) == STEPS
    assert [len(run["end_lines"]) for run in runs] == [1] + [0] * (len(runs) - 1)
    assert runs[0]["end_lines"][0].startswith(f"sync audit: {STEPS + 2} audits, no desync, ")
    events = [event["event"] for event in runs[0]["journal"]]
    assert events == ["begin", *["audit"] * (STEPS + 2), "end"]


@pytest.mark.parametrize("kind, base", JOBS)
def test_first_line_lists_what_is_audited(outcomes: Any, kind: str, base: str) -> None:
    run = outcomes[0][f"{kind}-{base}"]
    first = run["journal"][0]
    assert first["world_size"] == len(outcomes)
    scopes = first["scopes"]
    others = {scope["status"] for name, scope in scopes.items() if name != "gradients"}
    assert others == {"audited"}
    alone = len(outcomes) == 1  # then there is nobody to compare gradients with
    assert scopes["gradients"]["status"] == ("not needed" if alone else "audited")
    # One layer of 9 weights, the embedding, the last norm and the head; LoRA on two of them.
    assert (run["num_trainable"], run["num_frozen"]) == ((12, 0) if base == "full" else (4, 12))
    assert scopes["trainable"]["tensors"] == run["num_trainable"]
    assert alone or scopes["gradients"]["tensors"] == run["num_trainable"]
    assert scopes["frozen"]["tensors"] == run["num_frozen"]
    # Seven linear layers of absmax, quant_map and the three of double quantization.
    assert scopes["quantization"]["tensors"] == (7 * 5 if base == "nf4" else 0)


def test_reference_of_a_full_model_is_a_frozen_role(outcomes: Any) -> None:
    for run in (rank["reference"] for rank in outcomes):
        assert (run["audits"], run["desyncs"], run["messages"]) == (STEPS + 2, 0, [])
    first = outcomes[0]["reference"]["journal"][0]
    assert first["roles"] == {"reference": {"trainable": False, "parameters": 12}}
    assert first["scopes"]["frozen"]["tensors"] == 12


@pytest.mark.parametrize("name", ["life", "again"])
def test_saves_evaluations_and_a_second_training_are_healthy(outcomes: Any, name: str) -> None:
    for run in (rank[name] for rank in outcomes):
        # Two saves with a full audit each.
        assert (run["audits"], run["desyncs"], run["messages"]) == (STEPS + 2 + 2, 0, [])
    training = ["begin", *["audit"] * 4, "save", *["audit"] * 3, "save", "audit", "end"]
    times = {"life": 1, "again": 2}[name]
    journal = outcomes[0][name]["journal"]
    assert [event["event"] for event in journal] == training * times
    saves = [(e["step"], e["verified"]) for e in journal if e["event"] == "save"]
    assert saves == [(2, True), (4, True)] * times


@pytest.mark.parametrize("name", ["resumed", "resumed_elsewhere", "resumed_as_told"])
def test_resumed_state_is_verified(outcomes: Any, name: str) -> None:
    for run in (rank[name] for rank in outcomes):
        # Two steps more and a save.
        assert (run["audits"], run["desyncs"], run["messages"]) == (2 + 2 + 1, 0, [])
    journal = outcomes[0][name]["journal"][-9:]
    events = ["begin", "audit", "resume", *["audit"] * 3, "save", "audit", "end"]
    assert [event["event"] for event in journal] == events
    assert (journal[2]["step"], journal[2]["verified"]) == (4, True)
    assert journal[2]["folder"].endswith("life/checkpoint-4")


def test_resuming_without_a_manifest_is_said(outcomes: Any) -> None:
    first, *others = [rank["resumed_unverified"] for rank in outcomes]
    assert len(first["messages"]) == 1
    assert "resumed at step 4 without a sync_manifest.json" in first["messages"][0]
    assert all(run["messages"] == [] for run in others)
    assert "resume" not in [event["event"] for event in first["journal"]]


def test_training_is_the_same_as_without_the_audit(outcomes: Any) -> None:
    for rank in outcomes:
        without, audited = rank["parity"]
        assert without == audited
        assert len(without[0]) == STEPS


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("faulty")
    save_bases(folder)
    return run_on_ranks(faulty, str(folder), deadline_s=280)


LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
PACKED = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
BOTH, SECOND = (0, 1), (1,)
# Cause, tensor, how many have that cause, and the ranks.
NAMED: dict[str, tuple[str, str | None, int, tuple[int, ...]]] = {
    "bit_flipped": ("edited_outside_step", LORA_A, 1, SECOND),
    "base_byte_changed": ("frozen_changed", PACKED, 1, SECOND),
    "absmax_changed": ("quantization_changed", f"{PACKED}.absmax", 1, SECOND),
    # The two layers that have an adapter.
    "adapter_merged": ("frozen_changed", PACKED, 2, BOTH),
    "gradients_clipped": ("gradient_scaled_differently", LORA_A, 4, BOTH),
    "forward_unwrapped": ("gradient_not_reduced", LORA_A, 4, BOTH),
    "no_sync_on_last_micro_batch": ("gradient_not_reduced", LORA_A, 4, BOTH),
    "step_skipped": ("stale_replica", LORA_A, 4, SECOND),
    "other_learning_rate": ("optimizer_diverged", LORA_A, 4, BOTH),
    "extra_optimizer_step": ("step_skew", None, 1, SECOND),
    "dropout_in_reference": ("role_violation", "reference.model.norm.1", 1, BOTH),
}


@pytest.mark.parametrize("name", NAMED)
def test_fault_in_a_trainer_is_named_at_its_step(damaged: Any, name: str) -> None:
    first, second = (rank[name] for rank in damaged)
    assert first["error"] == second["error"]
    assert (first["cause"], first["tensor"], first["num_tensors"], first["ranks"]) == NAMED[name]
    assert first["step"] == FAULT_STEP
    assert first["role"] == ("reference" if name == "dropout_in_reference" else None)
    if second["planted"] is not None:
        assert first["tensor"] is None or first["tensor"].endswith(second["planted"])
    assert first["journal"][-1]["event"] == "desync"
    assert first["journal"][-1]["message"] == first["error"]


@pytest.mark.parametrize("name", NAMED)
def test_no_checkpoint_after_a_fault(damaged: Any, name: str) -> None:
    for run in (rank[name] for rank in damaged):
        assert run["steps"] == FAULT_STEP - 1
        assert run["checkpoints"] == {1: (True, []), 2: (True, [])}


def test_warn_trains_on_and_says_so_once(damaged: Any) -> None:
    first, second = (rank["warn"] for rank in damaged)
    for run in (first, second):
        assert (run["error"], run["steps"]) == (None, STEPS)
        assert run["desyncs"] >= 1
        # What was saved while ranks differ carries no verdict that they are equal.
        assert {step: verified for step, (verified, _) in run["checkpoints"].items()} == {4: False}
    assert second["messages"] == []
    assert len(first["messages"]) == 1
    assert "Cause: gradient_scaled_differently." in first["messages"][0]
    assert f"step {FAULT_STEP}, " in first["messages"][0]


@pytest.mark.parametrize("name", ["stop", "stop_at_save"])
def test_stop_saves_an_unverified_checkpoint_and_ends(damaged: Any, name: str) -> None:
    """save_total_limit is 1: without care the last good checkpoint would be deleted."""
    first, second = (rank[name] for rank in damaged)
    cause = {"stop": "gradient_scaled_differently", "stop_at_save": "frozen_changed"}[name]
    for run in (first, second):
        assert (run["error"], run["desyncs"], run["steps"]) == (None, 1, FAULT_STEP)
        assert list(run["checkpoints"]) == [FAULT_STEP - 1, FAULT_STEP]
        assert run["checkpoints"][FAULT_STEP - 1] == (True, [])
        verified, problems = run["checkpoints"][FAULT_STEP]
        assert not verified
        assert len(problems) == 1
        assert problems[0].startswith("manifest: unverified, ")
        assert f"Cause: {cause}." in problems[0]
    assert len(first["messages"]) == 1
    assert len(first["end_lines"]) == 1


def test_resuming_from_an_unverified_checkpoint_is_refused(damaged: Any) -> None:
    for run in (rank["resumed_stopped"] for rank in damaged):
        assert (run["cause"], run["ranks"], run["step"]) == ("manifest_mismatch", BOTH, FAULT_STEP)
        assert "is marked unverified" in run["error"]
        assert run["steps"] == FAULT_STEP, "it has trained"
