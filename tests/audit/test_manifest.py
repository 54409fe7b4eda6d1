"""Manifests: what is written beside a checkpoint, and how a report reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

import manifests
from manifests import ADAPTER, INDEX, STEP, flip, found, scopes, shards
from ranks import run_on_ranks
from trl_sync.audit.manifest import (
    MANIFEST_NAME,
    Problem,
    check_files,
    check_tensors,
    describe,
    list_harmless_changes,
    read_manifest,
    write_manifest,
)
from trl_sync.errors import CheckpointError


def test_a_whole_checkpoint_is_silent(full: Path, lora: Path, full_run: Any, lora_run: Any) -> None:
    for folder, run in ((full, full_run), (lora, lora_run)):
        manifest = read_manifest(folder)
        assert check_files(folder, manifest) == []
        assert list_harmless_changes(folder, manifest) == []
        assert check_tensors(manifest, scopes(run.model, run.optimizer)) == []


def test_the_manifest_lists_every_file_of_a_real_checkpoint(full: Path, lora: Path) -> None:
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    state |= {"training_args.bin"}
    assert len(shards(full)) >= 3
    model = {"config.json", "generation_config.json", INDEX, *shards(full)}
    assert set(read_manifest(full).files) == state | model
    adapter = {ADAPTER, "adapter_config.json", "README.md"}
    assert set(read_manifest(lora).files) == state | adapter


def test_checksums_are_those_of_independent_readers(lora: Path, lora_run: Any) -> None:
    content = json.loads((lora / MANIFEST_NAME).read_text())
    assert (content["step"], content["world_size"], content["verified"]) == (2, 1, True)
    assert (content["format"], content["algorithm"], content["reason"]) == (2, "xxh3-128", None)
    for path, record in content["files"].items():
        data = (lora / path).read_bytes()
        assert record["size_bytes"] == len(data)
        assert record["xxh3_128"] == xxhash.xxh3_128_hexdigest(data)
        assert ("tensors" in record) == ("header" in record) == path.endswith(".safetensors")
    in_file = {n: sum_of(t) for n, t in load_file(lora / ADAPTER).items()}
    assert content["files"][ADAPTER]["tensors"] == in_file
    live = {n: p for n, p in lora_run.model.named_parameters() if p.requires_grad}
    assert content["tensors"]["trainable"] == {
        n: {"xxh3_128": sum_of(p), "dtype": "float32", "shape": list(p.shape)}
        for n, p in live.items()
    }


def sum_of(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.detach().numpy().tobytes())


def test_the_scopes_hold_all_parameters_and_optimizer_states(lora: Path) -> None:
    tensors = read_manifest(lora).tensors
    # 2 layers of 7 adapted linear layers with two factors each; Adam keeps 3 tensors of each.
    # The frozen rest: 14 base weights, 2 norms a layer and the last, embeddings and head.
    assert {scope: len(named) for scope, named in tensors.items()} == {
        "trainable": 28,
        "optimizer": 84,
        "frozen": 21,
        "buffers": 2,
    }


def test_dtypes_and_odd_tensors(tmp_path: Path) -> None:
    named = [
        ("empty", torch.zeros(0, 3)),
        ("scalar", torch.tensor(2.0)),
        ("bf16", torch.ones(3, dtype=torch.bfloat16)),
        ("transposed", torch.arange(6.0).view(2, 3).T),
        ("packed", torch.arange(5, dtype=torch.uint8)),
    ]
    save_file({name: tensor.contiguous() for name, tensor in named}, tmp_path / "m.safetensors")
    manifest = write_manifest(tmp_path, {"frozen": named}, **STEP)
    assert read_manifest(tmp_path) == manifest
    records = manifest.tensors["frozen"]
    assert [records[n].dtype for n, _ in named] == ["float32"] * 2 + [
        "bfloat16",
        "float32",
        "uint8",
    ]
    # Logical order: the same bytes as in the file.
    in_file = manifest.files["m.safetensors"].tensors
    assert in_file == {name: record.xxh3_128 for name, record in records.items()}
    assert check_files(tmp_path, manifest) == []
    assert check_tensors(manifest, {"frozen": named}) == []


def test_writing_again_replaces_the_manifest_and_leaves_nothing_behind(lora: Path) -> None:
    (lora / f"{MANIFEST_NAME}.tmp").write_text("a killed process left this")
    before = set(read_manifest(lora).files)
    again = write_manifest(lora, {}, step=3, world_size=2, verified=False, reason="desync")
    assert set(again.files) == before
    assert read_manifest(lora) == again
    assert not (lora / f"{MANIFEST_NAME}.tmp").exists()


def test_a_failed_write_leaves_the_old_manifest(
    lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (lora / MANIFEST_NAME).read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest(lora, {}, **STEP)
    assert (lora / MANIFEST_NAME).read_bytes() == before


def test_nothing_is_certified_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no files"):
        write_manifest(tmp_path, {}, **STEP)
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_manifest(tmp_path / "nowhere", {}, **STEP)
    save_file({"a": torch.ones(8)}, tmp_path / "m.safetensors")
    os.truncate(tmp_path / "m.safetensors", 80)
    with pytest.raises(CheckpointError, match=r"m\.safetensors is not a whole.*80 bytes"):
        write_manifest(tmp_path, {}, **STEP)
    assert not (tmp_path / MANIFEST_NAME).exists()


@pytest.mark.parametrize(
    "offsets, said",
    [
        ([[0, 4], [8, 12]], "b starts at byte 8 of the data, expected 4"),  # a gap
        ([[0, 8], [4, 12]], "b starts at byte 4 of the data, expected 8"),  # an overlap
        ([[0, 4], [4, 3]], "b has no data_offsets"),
        ([[0, 4], [4]], "b has no data_offsets"),
        ([[0, 4], ["4", 12]], "b has no data_offsets"),
        ([[0, 4], [4, 99]], "its header promises"),
    ],
)
def test_a_header_that_no_reader_would_take(tmp_path: Path, offsets: Any, said: str) -> None:
    entries = {n: {"dtype": "U8", "data_offsets": o} for n, o in zip("ab", offsets, strict=True)}
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(12)
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        write_manifest(tmp_path, {}, **STEP)


def test_arguments_that_contradict_each_other(lora: Path) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        write_manifest(lora, {}, step=1, world_size=1, verified=False)
    with pytest.raises(ValueError, match="exactly one"):
        write_manifest(lora, {}, step=1, world_size=1, verified=True, reason="desync")
    twins = [("a", torch.ones(1)), ("a", torch.ones(2))]
    with pytest.raises(ValueError, match="two tensors of the scope 'frozen' are called 'a'"):
        write_manifest(lora, {"frozen": twins}, **STEP)
    with pytest.raises(ValueError, match="no scope 'trainabel'"):
        check_tensors(read_manifest(lora), {}, scopes=["trainabel"])


def test_the_report_shows_the_first_problems_and_counts_the_rest() -> None:
    assert describe([]) == "No problems: everything is as the manifest says."
    rows = [Problem(kind="changed", place="frozen", name=f"w{i}", detail="x") for i in range(11)]
    lines = describe(rows).splitlines()
    assert lines[0] == "11 problems:"
    assert lines[1] == "- frozen: w0: changed, x"
    assert len(lines) == 10
    assert lines[-1] == "- frozen: 3 more changed"
    assert describe(rows[:1]).startswith("1 problem:\n")


def save_on_two_ranks(output_dir: str) -> bool:
    manifests.train(Path(output_dir), manifests.lora_model(), max_steps=1)
    return True


@pytest.mark.ranks
def test_files_of_other_ranks_are_in_the_manifest(tmp_path: Path) -> None:
    assert run_on_ranks(save_on_two_ranks, str(tmp_path)) == [True, True]
    folder = tmp_path / "checkpoint-1"
    manifest = read_manifest(folder)
    assert manifest.world_size == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(manifest.files)
    assert check_files(folder, manifest) == []
    flip(folder / "rng_state_1.pth", 500)
    assert found(folder) == [("changed", "rng_state_1.pth", None)]
