"""Live tensors against the manifest of the checkpoint they were loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import manifests
from manifests import kinds, scopes
from trl_sync.audit.manifest import (
    check_tensors,
    describe,
    read_manifest,
)


def live(run: Any) -> dict[str, list[tuple[str, Tensor]]]:
    """Copies of the live tensors, which a test may change."""
    named = scopes(run.model, run.optimizer)
    return {
        scope: [(n, t.detach().clone()) for n, t in tensors] for scope, tensors in named.items()
    }


@pytest.mark.parametrize("scope", ["trainable", "frozen", "optimizer", "buffers"])
def test_one_bit_of_a_live_tensor(lora: Path, lora_run: Any, scope: str) -> None:
    tensors = live(lora_run)
    name, tensor = tensors[scope][0]
    tensor.view(-1).view(torch.uint8)[-1] ^= 1
    assert kinds(check_tensors(read_manifest(lora), tensors)) == [("changed", scope, name)]


def test_live_tensors_of_another_dtype_shape_or_name(lora: Path, lora_run: Any) -> None:
    tensors = live(lora_run)
    names = [name for name, _ in tensors["trainable"]]
    rows = tensors["trainable"]
    rows[0] = (names[0], rows[0][1].view(torch.int32))
    rows[1] = (names[1], rows[1][1].view(-1))
    rows[2] = ("another", rows[2][1])
    assert kinds(check_tensors(read_manifest(lora), tensors)) == [
        ("dtype", "trainable", names[0]),
        ("shape", "trainable", names[1]),
        ("unexpected", "trainable", "another"),
        ("missing", "trainable", names[2]),
    ]


def test_two_live_tensors_that_changed_places(lora: Path, lora_run: Any) -> None:
    tensors = live(lora_run)
    rows = tensors["trainable"]
    one, two = (i for i, (n, _) in enumerate(rows) if "down_proj.lora_A" in n)
    rows[one], rows[two] = (rows[one][0], rows[two][1]), (rows[two][0], rows[one][1])
    problems = check_tensors(read_manifest(lora), tensors)
    assert kinds(problems) == [("changed", "trainable", rows[i][0]) for i in (one, two)]
    assert f"the bytes of {rows[two][0]}" in problems[0].detail


def test_another_base_is_said_in_one_line(lora: Path, lora_run: Any) -> None:
    other = manifests.lora_model()
    for parameter in other.parameters():
        parameter.data += 1.0
    tensors = live(lora_run) | {"frozen": scopes(other)["frozen"]}
    problems = check_tensors(read_manifest(lora), tensors)
    first = tensors["frozen"][0][0]
    assert kinds(problems) == [("another_base", "frozen", first)]
    assert "another model or was quantized differently: 21 of 21 frozen" in problems[0].detail


def test_a_base_of_another_dtype_or_architecture_is_another_base(lora: Path, lora_run: Any) -> None:
    manifest, tensors = read_manifest(lora), live(lora_run)
    halves = [(name, tensor.bfloat16()) for name, tensor in tensors["frozen"]]
    assert kinds(check_tensors(manifest, {"frozen": halves}, ["frozen"])) == [
        ("another_base", "frozen", halves[0][0])
    ]
    other = [(f"other.{name}", tensor) for name, tensor in tensors["frozen"]]
    (problem,) = check_tensors(manifest, {"frozen": other}, ["frozen"])
    assert "42 of 42" in problem.detail


def test_scopes_restrict_the_check(lora: Path, lora_run: Any) -> None:
    manifest, tensors = read_manifest(lora), live(lora_run)
    del tensors["optimizer"]
    assert check_tensors(manifest, tensors, ["trainable", "frozen"]) == []
    # A scope that is not handed over is missing, not passed.
    problems = check_tensors(manifest, tensors)
    assert {(p.kind, p.place) for p in problems} == {("missing", "optimizer")}
    assert len(problems) == 84


class CheckAtStart(TrainerCallback):
    """Compares what a Trainer loaded with the manifest of the checkpoint, before its first step."""

    checkpoint: Path
    said: str

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tensors = scopes(kwargs["model"], kwargs["optimizer"])
        problems = check_tensors(read_manifest(self.checkpoint), tensors)
        type(self).said = describe(problems)
        if not tensors["optimizer"]:
            raise AssertionError("no optimizer state was loaded")


def test_a_resumed_run_holds_what_the_manifest_says(lora_run: Any, tmp_path: Path) -> None:
    checkpoints = Path(lora_run.args.output_dir)

    def resume(checked: str) -> str:
        CheckAtStart.checkpoint = checkpoints / checked
        model, resumed = manifests.lora_model(3), str(checkpoints / "checkpoint-1")
        manifests.train(tmp_path, model, callback=CheckAtStart, resume_from=resumed)
        return CheckAtStart.said

    assert resume("checkpoint-1").startswith("No problems")
    # One step earlier, everything that trains was different: 28 factors, 84 Adam tensors.
    assert resume("checkpoint-2").startswith("112 problems")
