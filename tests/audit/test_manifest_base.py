"""A base folder against the frozen tensors of a manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import manifests
import tiny
from manifests import INDEX, STEP, flip, kinds
from trl_sync.audit.manifest import (
    check_base,
    describe,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def base(lora_run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(lora_run.args.output_dir) / "base", tmp_path / "base"))


def test_the_base_on_disk_is_the_frozen_base(lora: Path, base: Path, tmp_path: Path) -> None:
    manifest = read_manifest(lora)
    assert len(list(base.glob("model-*.safetensors"))) >= 3
    assert check_base(manifest, base) == []
    tiny.llama().save_pretrained(tmp_path / "single")
    assert check_base(manifest, tmp_path / "single") == []


def test_a_flipped_byte_in_the_base_names_the_frozen_tensor(lora: Path, base: Path) -> None:
    shard = min(base.glob("model-*.safetensors"))
    stored = manifests.tensor_at(shard, shard.stat().st_size - 1)
    flip(shard, -1)
    ((kind, place, name),) = kinds(check_base(read_manifest(lora), base))
    assert (kind, place) == ("changed", "frozen")
    assert name is not None
    assert name.removeprefix("base_model.model.").replace(".base_layer", "") == stored


def test_another_base_on_disk_is_said_in_one_line(lora: Path, tmp_path: Path) -> None:
    tiny.llama(9).save_pretrained(tmp_path / "other")
    (problem,) = check_base(read_manifest(lora), tmp_path / "other")
    # The norms of an untrained model are ones in every model: 5 of 21 agree.
    assert problem.kind == "another_base"
    assert "16 of 21 frozen" in problem.detail


def test_a_base_that_lacks_a_layer_or_has_another_shape(lora: Path, tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    file, prefix = tmp_path / "model.safetensors", "base_model.model."
    whole = load_file(file)
    save_file({n: t for n, t in whole.items() if "layers.1." not in n}, file)
    problems = check_base(read_manifest(lora), tmp_path)
    # 7 weights and 2 norms, fewer than half of 21.
    assert [p.kind for p in problems] == ["missing"] * 9
    assert all("layers.1." in str(p.name) for p in problems)
    save_file({**whole, "model.norm.weight": torch.ones(32)}, file)
    (problem,) = check_base(read_manifest(lora), tmp_path)
    assert (problem.kind, problem.name) == ("shape", f"{prefix}model.norm.weight")
    assert "(32,) in model.safetensors, (64,) when saved" in problem.detail


def test_names_of_wrappers_and_other_models(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    named = [
        (f"module.peft_model.base_model.model.{n}".replace("q_proj.", "q_proj.base_layer."), p)
        for n, p in model.named_parameters()
    ]
    adapter = ("module.peft_model.base_model.model.x.lora_A.reference.weight", torch.ones(2))
    reward = ("reward.model.norm.weight", torch.zeros(64))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "f").write_text("x")
    manifest = write_manifest(tmp_path / "c", {"frozen": [*named, adapter, reward]}, **STEP)
    # The frozen model is a bf16 copy of an fp32 file: cast as loading does.
    assert check_base(manifest, base, other_models=["reward"]) == []
    assert [p.name for p in check_base(manifest, base)] == ["reward.model.norm.weight"]


def test_a_quantized_base_cannot_be_compared_offline(base: Path, tmp_path: Path) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(base, quantization_config=quantization)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "f").write_text("x")
    manifest = write_manifest(tmp_path / "c", {"frozen": list(model.named_parameters())}, **STEP)
    (problem,) = check_base(manifest, base)
    assert problem.kind == "not_comparable"
    assert "14 of 21 frozen tensors are quantized in memory" in problem.detail
    assert "when a run resumes" in problem.detail
    # Norms, embeddings and head are not quantized, and are compared.
    tiny.llama(9).save_pretrained(tmp_path / "other")
    problems = check_base(manifest, tmp_path / "other")
    assert [p.kind for p in problems] == ["changed", "changed", "not_comparable"]


def test_a_base_folder_without_weights(lora: Path, full: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        (problem,) = check_base(read_manifest(lora), folder)
        assert problem.kind == "unreadable"
        assert "no .safetensors files" in problem.detail
    # A whole model was trained: no frozen base, so nothing was compared.
    (problem,) = check_base(read_manifest(full), full)
    assert problem.kind == "not_comparable"


def test_a_damaged_base_folder_is_named_not_a_traceback(lora: Path, base: Path) -> None:
    shard = min(base.glob("model-*.safetensors"))
    flip(shard, 0, 0xFF)
    stored = json.loads((base / INDEX).read_text())["weight_map"]
    problems = check_base(read_manifest(lora), base)
    assert {p.kind for p in problems} == {"unreadable"}
    assert len(problems) == list(stored.values()).count(shard.name)
    assert shard.name in describe(problems)
    (base / INDEX).write_text('{"weight_map": {"a": "../../x"}}')
    (problem,) = check_base(read_manifest(lora), base)
    assert (problem.kind, "'../../x'" in problem.detail) == ("unreadable", True)
