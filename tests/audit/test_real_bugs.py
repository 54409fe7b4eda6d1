"""Bugs that other projects shipped, replayed in the trainers they happened in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import trainer_runs
from ranks import run_on_ranks
from trainer_runs import (
    STEPS,
    DeclareSync,
    LateAdapter,
    MergeAndUnmerge,
    UnwrappedLoss,
    attempt,
    base_model,
    damage_file,
    journal,
    packed_bytes,
    save_bases,
    trained,
    trainer,
)
from trl_sync import SyncAuditCallback
from trl_sync.audit import faults

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

BOTH = (0, 1)
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
SAVING = {"save_strategy": "steps", "save_steps": 2}


def replay(folder: str) -> dict[str, Any]:
    """What is said on this rank of every bug that shows inside a training."""
    replays = (
        unwrapped_loss,
        late_adapter,
        late_adapter_in_training,
        merged_for_inference,
        merged_as_declared,
        reference_that_follows,
        restored_on_rank_0,
        damaged_checkpoints,
        resumed_on_rank_0,
    )
    return {function.__name__: function(Path(folder)) for function in replays}


def unwrapped_loss(folder: Path) -> dict[str, Any]:
    callback = SyncAuditCallback()
    made = trainer("dpo", "full", folder, callback, name="unwrapped", trainer_class=UnwrappedLoss)
    return attempt(made, callback)


def late_adapter(folder: Path) -> dict[str, Any]:
    callback = SyncAuditCallback()
    made = trainer("sft", "lora", folder, None, name="late")
    made.add_callback(LateAdapter())
    made.add_callback(callback)
    return attempt(made, callback)


def late_adapter_in_training(folder: Path) -> dict[str, Any]:
    callback = SyncAuditCallback()
    made = trainer("sft", "lora", folder, callback, name="later")
    return attempt(made, callback, faults.adapter_added_after_wrapping(made.model, step=3))


def merged_for_inference(folder: Path, *, declared: bool = False) -> dict[str, Any]:
    callback = SyncAuditCallback(frozen_cover_steps=1)
    name = f"merged-{declared}"
    made = trainer("sft", "nf4", folder, callback, name=name, learning_rate=0.1)
    made.add_callback(MergeAndUnmerge())
    if declared:
        made.add_callback(DeclareSync(callback))
    before = packed_bytes(made.model)
    found = attempt(made, callback)
    changed = [name for name, data in packed_bytes(made.model).items() if data != before[name]]
    return found | {"changed": changed}


def merged_as_declared(folder: Path) -> dict[str, Any]:
    return merged_for_inference(folder, declared=True)


def reference_that_follows(folder: Path) -> dict[str, Any]:
    """DPO with TRL's own `sync_ref_model`: the reference moves after steps 2 and 4."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2}
    made = trainer("dpo", "full", folder, None, name="follows", **settings)
    made.ref_model.requires_grad_(False)
    callback = SyncAuditCallback(frozen_cover_steps=1, modules={"reference": made.ref_model})
    made.add_callback(callback)
    before = [p.tolist() for p in made.ref_model.parameters()]
    found = attempt(made, callback)
    after = [p.tolist() for p in made.ref_model.parameters()]
    return found | {"num_moved": sum(a != b for a, b in zip(before, after, strict=True))}


def restored_on_rank_0(folder: Path) -> dict[str, Any]:
    """Weights and optimizer of rank 0 come from a checkpoint after the wrapping broadcast."""

    class Restore(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.process_index == 0:
                with torch.no_grad():
                    for parameter in kwargs["model"].parameters():
                        if parameter.requires_grad:
                            parameter.add_(0.01)

    callback = SyncAuditCallback()
    made = trainer("sft", "lora", folder, None, name="restored")
    made.add_callback(Restore())
    made.add_callback(callback)
    return attempt(made, callback)


def damaged_checkpoints(folder: Path) -> dict[str, Any]:
    """Resumes from a good checkpoint, and from copies of it that are not what was saved."""
    callback = SyncAuditCallback()
    trained(trainer("sft", "lora", folder, callback, name="saved", **SAVING), callback)
    torch.distributed.barrier()
    found = {}
    for damage in ("none", "adapter", "optimizer", "base"):
        callback = SyncAuditCallback()
        model = base_model("full", folder)
        if damage == "base":
            with torch.no_grad():
                model.lm_head.weight.mul_(1.5)
        settings: dict[str, Any] = {"name": f"damaged-{damage}", "model": model}
        made = trainer("sft", "lora", folder, callback, max_steps=STEPS + 1, **settings)
        checkpoint = Path(made.args.output_dir) / f"checkpoint-{STEPS}"
        if made.args.process_index == 0:
            shutil.copytree(folder / "saved" / checkpoint.name, checkpoint)
            damage_file(checkpoint, damage)
        torch.distributed.barrier()
        found[damage] = attempt(made, callback, resume_from_checkpoint=str(checkpoint))
    return found


def resumed_on_rank_0(folder: Path) -> dict[str, Any]:
    """Rank 0 finds the checkpoint that `damaged_checkpoints` made, rank 1 does not."""
    callback = SyncAuditCallback()
    made = trainer("sft", "lora", folder, callback, name="resumed", max_steps=STEPS + 1)
    checkpoint = str(folder / "saved" / f"checkpoint-{STEPS}")
    given = {"resume_from_checkpoint": checkpoint} if made.args.process_index == 0 else {}
    return attempt(made, callback, **given)


@pytest.fixture(scope="module")
def replays(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bugs")
    save_bases(folder)
    return run_on_ranks(replay, str(folder), deadline_s=280)


def named(replays: Any, name: str) -> dict[str, Any]:
    """What rank 0 says of a bug, and rank 1 word for word."""
    first, second = (rank[name] for rank in replays)
    assert first["error"] is not None, "nobody noticed"
    assert first["error"] == second["error"]
    assert first["checkpoints"] == {}
    return first


def test_loss_on_the_unwrapped_model(replays: Any) -> None:
    """trl#7245: with a fused loss DPO and KTO trained every rank by itself.

    "310/310 params differ" after one step; here all 12 of the model.
    """
    found = named(replays, "unwrapped_loss")
    assert (found["cause"], found["step"], found["ranks"]) == ("gradient_not_reduced", 1, BOTH)
    assert found["num_tensors"] == 12
    assert found["steps"] == 0


def test_adapter_added_after_wrapping_before_training(replays: Any) -> None:
    """transformers#48792: N ranks trained N different adapters, and saved that of rank 0."""
    found = named(replays, "late_adapter")
    assert (found["cause"], found["step"], found["ranks"]) == ("init_mismatch", 0, BOTH)
    # lora_B is zero everywhere, so only lora_A tells the seeds apart: two layers of it.
    assert (found["tensor"], found["num_tensors"]) == (f"{LAYER}.lora_A.late.weight", 2)


def test_adapter_added_after_wrapping_in_training(replays: Any) -> None:
    """transformers#48792, with the adapter added in the third step."""
    found = named(replays, "late_adapter_in_training")
    assert (found["cause"], found["step"], found["ranks"]) == ("init_mismatch", 3, BOTH)
    assert (found["tensor"], found["num_tensors"]) == (f"{LAYER}.lora_A.late_adapter.weight", 2)


def test_merging_into_a_4_bit_base(replays: Any) -> None:
    """trl#6688: merge_adapter and unmerge_adapter around a weight sync leave another base.

    All ranks do it alike: comparing them shows nothing, the first checksums do.
    """
    found = named(replays, "merged_for_inference")
    assert (found["cause"], found["step"], found["ranks"]) == ("frozen_changed", 3, BOTH)
    assert (found["tensor"], found["num_tensors"]) == (f"{LAYER}.base_layer.weight", 2)
    assert len(found["changed"]) == 2


def test_merging_that_was_declared_is_a_warning(replays: Any) -> None:
    """trl#6688, as it is in a run that merges for an inference engine by intent."""
    first, second = (rank["merged_as_declared"] for rank in replays)
    for found in (first, second):
        assert (found["error"], found["desyncs"], found["steps"]) == (None, 0, STEPS)
        assert len(found["changed"]) == 2, "nothing to be silent about"
    assert second["messages"] == []
    frozen = [text for text in first["messages"] if "Cause: frozen_changed." in text]
    assert len(frozen) == 1
    # Two packed weights: 64 x 64 and 32 x 64 numbers of half a byte.
    assert f"{64 * 64 // 2 + 32 * 64 // 2:,} bytes in 2 tensor(s)" in frozen[0]
    assert "Declared: adapters are merged for the inference engine." in frozen[0]
    assert first["journal"][-1]["event"] == "end"


def test_checkpoint_restored_on_one_rank(replays: Any) -> None:
    """A checkpoint on the disk of one node only: the other ranks start afresh."""
    found = named(replays, "restored_on_rank_0")
    assert (found["cause"], found["step"], found["ranks"]) == ("init_mismatch", 0, BOTH)
    assert (found["tensor"], found["num_tensors"]) == (f"{LAYER}.lora_A.default.weight", 4)


def test_resumed_on_one_rank(replays: Any) -> None:
    """The same through `resume_from_checkpoint`; the wrapping broadcast repairs the weights."""
    found = named(replays, "resumed_on_rank_0")
    assert (found["cause"], found["ranks"]) == ("init_mismatch", BOTH)
    assert journal_ends(replays, "resumed_on_rank_0") == ["begin", "desync"]


def journal_ends(replays: Any, name: str) -> list[str]:
    return [event["event"] for event in replays[0][name]["journal"]]


def test_reference_that_is_synced_by_trl_is_a_warning(replays: Any) -> None:
    """trl's SyncRefModelCallback: a frozen model that moves by intent, on all ranks alike."""
    first, second = (rank["reference_that_follows"] for rank in replays)
    for found in (first, second):
        assert (found["error"], found["desyncs"], found["steps"]) == (None, 0, STEPS)
        assert found["num_moved"] == 12, "nothing to be silent about"
    assert second["messages"] == []
    assert len(first["messages"]) == 1
    assert "Cause: frozen_changed." in first["messages"][0]
    assert "bytes in 12 tensor(s)" in first["messages"][0]


@pytest.mark.parametrize(
    "damage, words",
    [
        ("adapter", "lora_B.default.weight: changed"),
        ("optimizer", "lora_A.default.weight.exp_avg: changed"),
        ("base", "model.lm_head.weight: changed"),
    ],
)
def test_damaged_checkpoint_is_refused_before_a_step(replays: Any, damage: str, words: str) -> None:
    """peft loads an adapter onto any base, torch an optimizer with any numbers."""
    for found in (rank["damaged_checkpoints"][damage] for rank in replays):
        assert (found["cause"], found["step"]) == ("manifest_mismatch", STEPS)
        assert found["ranks"] == BOTH
        assert words in found["error"]
        assert found["steps"] == STEPS, "it has trained"
    assert replays[0]["damaged_checkpoints"][damage]["journal"][-1]["event"] == "desync"


def test_good_checkpoint_is_resumed(replays: Any) -> None:
    """The healthy twin: the same copy without damage."""
    for found in (rank["damaged_checkpoints"]["none"] for rank in replays):
        assert (found["error"], found["desyncs"], found["steps"]) == (None, 0, STEPS + 1)
    events = [event["event"] for event in replays[0]["damaged_checkpoints"]["none"]["journal"]]
    assert events == ["begin", "audit", "resume", "audit", "audit", "end"]


LAUNCH = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
mixed_precision: 'no'
use_cpu: false
"""
SCRIPT = """
import os, sys, time
from pathlib import Path
import trainer_runs
from trl_sync import DesyncError, SyncAuditCallback

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
made = trainer_runs.trainer("sft", "full", folder, SyncAuditCallback(), name="alone", use_cpu=False)
said = f"{made.accelerator.num_processes} process, "
try:
    made.train()
    said += "trained"
except DesyncError as error:
    said += str(error)
    raise
finally:
    (folder / rank).write_text(said)
    # The launcher ends the others when the first one fails.
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and not (folder / str(1 - int(rank))).is_file():
        time.sleep(0.1)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bug needs a machine without GPU")
def test_ranks_that_believe_they_are_alone(tmp_path: Path) -> None:
    """`accelerate launch` of two processes on a machine without GPU, and without use_cpu."""
    save_bases(tmp_path)
    (tmp_path / "launch.yaml").write_text(LAUNCH)
    (tmp_path / "train.py").write_text(SCRIPT)
    tests = Path(trainer_runs.__file__).parent
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(tmp_path / "launch.yaml"), str(tmp_path / "train.py")]
    ended = subprocess.run(
        [*command, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    output = ended.stdout + ended.stderr
    assert ended.returncode != 0, output
    for rank in (0, 1):
        said = (tmp_path / str(rank)).read_text()
        assert said.startswith(f"1 process, step 0, this run: on rank {rank}.")
        assert "Cause: not_distributed. The launcher started 2 processes (WORLD_SIZE=2)" in said
        assert "use_cpu=True" in said
    events = journal(tmp_path / "alone")
    assert {event["event"] for event in events} == {"desync"}
    assert events[0]["findings"][0]["cause"] == "not_distributed"
