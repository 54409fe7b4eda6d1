"""Every damage to a file of a checkpoint is named; a whole checkpoint gives silence."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import manifests
from manifests import ADAPTER, INDEX, STEP, flip, found, shards
from trl_sync.audit import checkpoint_files
from trl_sync.audit.manifest import (
    MANIFEST_NAME,
    check_files,
    list_harmless_changes,
    read_manifest,
    write_manifest,
)


def test_a_flipped_byte_in_the_data_names_the_tensor(full: Path) -> None:
    shard = shards(full)[1]
    last = (full / shard).stat().st_size - 1
    name = manifests.tensor_at(full / shard, last)
    flip(full / shard, last)
    assert found(full) == [("changed", shard, name)]


def test_the_first_byte_of_the_data_belongs_to_the_first_tensor(lora: Path) -> None:
    header = int.from_bytes((lora / ADAPTER).read_bytes()[:8], "little")
    flip(lora / ADAPTER, 8 + header)
    name = manifests.tensor_at(lora / ADAPTER, 8 + header)
    assert name is not None
    assert found(lora) == [("changed", ADAPTER, name)]


@pytest.mark.parametrize("position", [0, 7, 8, 9])
def test_a_flipped_byte_in_size_or_start_of_the_header(lora: Path, position: int) -> None:
    flip(lora / ADAPTER, position)
    assert found(lora) == [("changed", ADAPTER, "(header)")]


def test_a_flipped_letter_of_a_name(lora: Path) -> None:
    content = (lora / ADAPTER).read_bytes()
    position = content.index(b"lora_A") + 5
    flip(lora / ADAPTER, position)  # A becomes @
    kinds = found(lora)
    assert kinds[0] == ("changed", ADAPTER, "(header)")
    ((_, _, gone),) = [k for k in kinds if k[0] == "missing"]
    ((_, _, new),) = [k for k in kinds if k[0] == "unexpected"]
    assert gone is not None
    assert new == gone.replace("lora_A", "lora_@")
    assert len(kinds) == 3


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]
)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_flipped_byte_in_another_file(full: Path, file: str, where: float) -> None:
    size = (full / file).stat().st_size
    flip(full / file, round(where * (size - 1)), 0x80)
    assert found(full) == [("changed", file, None)]


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_a_truncated_file(full: Path, keep: int) -> None:
    os.truncate(full / "optimizer.pt", keep)
    assert found(full) == [("truncated", "optimizer.pt", None)]
    (problem,) = check_files(full, read_manifest(full))
    assert f"{keep} bytes" in problem.detail


def test_a_shard_that_lost_its_last_byte(full: Path) -> None:
    shard = full / shards(full)[0]
    size = shard.stat().st_size
    name = manifests.tensor_at(shard, size - 1)
    os.truncate(shard, size - 1)
    assert found(full) == [("truncated", shard.name, name)]
    (problem,) = check_files(full, read_manifest(full))
    assert f"{size - 1} bytes, {size} were written: 1 of" in problem.detail


@pytest.mark.parametrize("keep", [0, 7, 8, 50])
def test_a_shard_cut_inside_its_header(full: Path, keep: int) -> None:
    os.truncate(full / shards(full)[0], keep)
    assert found(full) == [("truncated", shards(full)[0], None)]


@pytest.mark.parametrize("file", ["optimizer.pt", ADAPTER])
def test_bytes_after_the_end(lora: Path, file: str) -> None:
    with (lora / file).open("ab") as stream:
        stream.write(b"\0")
    assert found(lora) == [("changed", file, None)]
    (problem,) = check_files(lora, read_manifest(lora))
    size = (lora / file).stat().st_size
    sizes = f"{size} bytes, {size - 1} were written"
    assert problem.detail == ("1 bytes after the last tensor" if file == ADAPTER else sizes)


def test_a_deleted_shard(full: Path) -> None:
    gone = shards(full)[1]
    (full / gone).unlink()
    assert found(full) == [("missing", gone, None)]


def test_two_shards_that_changed_places(full: Path) -> None:
    one, two = (full / name for name in shards(full)[:2])
    one.rename(full / "aside")
    two.rename(one)
    (full / "aside").rename(two)
    assert {place for _, place, _ in found(full)} == {one.name, two.name}


def test_a_shard_that_the_index_names_and_that_was_never_written(full: Path) -> None:
    gone = shards(full)[1]
    with_it = json.loads((full / INDEX).read_text())["weight_map"]
    names = sorted(name for name, shard in with_it.items() if shard == gone)
    (full / gone).unlink()
    write_manifest(full, {}, **STEP)
    assert found(full) == [("missing", INDEX, names[0])]
    (problem,) = check_files(full, read_manifest(full))
    assert f"{gone}, which was not written: {len(names)} tensors" in problem.detail


def test_an_index_that_names_the_wrong_shard(full: Path) -> None:
    content = json.loads((full / INDEX).read_text())
    name, shard = next(iter(content["weight_map"].items()))
    content["weight_map"][name] = next(s for s in shards(full) if s != shard)
    (full / INDEX).write_text(json.dumps(content))
    write_manifest(full, {}, **STEP)
    assert found(full) == [("missing", INDEX, name)]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map"']
)
def test_an_index_that_is_none(full: Path, content: str) -> None:
    (full / INDEX).write_text(content)
    write_manifest(full, {}, **STEP)
    assert found(full) == [("unreadable", INDEX, None)]


def test_an_index_cannot_lead_out_of_the_folder(full: Path) -> None:
    (full / INDEX).write_text('{"weight_map": {"a": "../x.safetensors", "b": "/etc/hosts"}}')
    write_manifest(full, {}, **STEP)
    assert found(full) == [("missing", INDEX, "a"), ("missing", INDEX, "b")]


def test_the_adapter_of_another_run(lora: Path, other_lora_run: Any) -> None:
    other = Path(other_lora_run.args.output_dir) / "checkpoint-2"
    shutil.copy(other / ADAPTER, lora / ADAPTER)
    assert found(lora) == [("replaced", ADAPTER, None)]
    assert "all 28 tensors differ" in str(check_files(lora, read_manifest(lora))[0])


def test_the_optimizer_of_another_step(lora: Path, lora_run: Any) -> None:
    shutil.copy(Path(lora_run.args.output_dir) / "checkpoint-1" / "optimizer.pt", lora)
    assert found(lora) == [("changed", "optimizer.pt", None)]


def test_two_tensors_that_changed_names(lora: Path) -> None:
    tensors = load_file(lora / ADAPTER)
    one, two = sorted(name for name in tensors if "down_proj.lora_A" in name)
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, lora / ADAPTER, metadata={"format": "pt"})
    assert sorted(found(lora)) == [("changed", ADAPTER, one), ("changed", ADAPTER, two)]
    problems = {p.name: p.detail for p in check_files(lora, read_manifest(lora))}
    assert f"the bytes of {two}" in problems[one]
    assert f"the bytes of {one}" in problems[two]


def test_a_tensor_more_a_tensor_less_and_another_shape(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    tensors = {name: torch.full((4, 2), float(i)) for i, name in enumerate("abc")}
    save_file(tensors, file)
    manifest = write_manifest(tmp_path, {}, **STEP)
    header = ("changed", file.name, "(header)")

    def after(changed: dict[str, Tensor]) -> list[tuple[str, str, str | None]]:
        save_file(changed, file)
        return [(p.kind, p.place, p.name) for p in check_files(tmp_path, manifest)]

    more = {**tensors, "d": torch.ones(1)}
    assert after(more) == [header, ("unexpected", file.name, "d")]
    less = {name: tensors[name] for name in "ab"}
    assert after(less) == [header, ("missing", file.name, "c")]
    # Same bytes, another meaning.
    assert after({**tensors, "b": tensors["b"].view(2, 4)}) == [header]
    assert after({**tensors, "b": tensors["b"].view(torch.int32)}) == [header]
    assert after(tensors) == []


def test_what_may_change_after_the_save_is_listed_and_no_problem(lora: Path) -> None:
    (lora / "README.md").write_text("my notes")
    (lora / "notes.txt").write_text("more notes")
    (lora / "merged").mkdir()
    (lora / "merged" / "model.safetensors").write_bytes(b"")
    (lora / ".cache").mkdir()
    (lora / ".cache" / "upload.lock").write_bytes(b"")
    assert found(lora) == []
    listed = list_harmless_changes(lora, read_manifest(lora))
    assert [(p.kind, p.place) for p in listed] == [
        ("added", "merged/model.safetensors"),
        ("added", "notes.txt"),
        ("edited", "README.md"),
    ]


def test_other_checkpoints_inside_are_left_to_their_own_manifest(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "checkpoint-3", tmp_path / "value"):
        folder.mkdir(exist_ok=True)
        save_file({"a": torch.ones(2)}, folder / "m.safetensors")
    manifest = write_manifest(tmp_path, {}, **STEP)
    assert set(manifest.files) == {"m.safetensors", "value/m.safetensors"}
    flip(tmp_path / "value" / "m.safetensors", -1)
    assert found(tmp_path) == [("changed", "value/m.safetensors", "a")]


def test_an_unverified_manifest_is_a_problem(lora: Path) -> None:
    write_manifest(lora, {}, step=9, world_size=2, verified=False, reason="ranks 0 and 1 differ")
    assert found(lora) == [("unverified", "manifest", None)]
    (problem,) = check_files(lora, read_manifest(lora))
    assert "step 9" in problem.detail
    assert "ranks 0 and 1 differ" in problem.detail


def test_an_emptied_folder_lists_every_file(full: Path) -> None:
    manifest = read_manifest(full)
    shutil.rmtree(full)
    assert {p.place for p in check_files(full, manifest)} == set(manifest.files)
    assert {p.kind for p in check_files(full, manifest)} == {"missing"}


def test_what_cannot_be_read_is_named(full: Path) -> None:
    manifest = read_manifest(full)
    (full / "optimizer.pt").unlink()
    (full / "optimizer.pt").symlink_to("optimizer.pt")  # a loop
    (full / "config.json").unlink()
    (full / "config.json").mkdir()
    (full / "scheduler.pt").unlink()
    os.mkfifo(full / "scheduler.pt")  # opening it would wait forever
    (full / shards(full)[0]).unlink()
    (full / "model-00001-of-00099.safetensors").symlink_to("nowhere")
    kinds = {p.place: p.kind for p in check_files(full, manifest)}
    gone = min(path for path in manifest.files if path.startswith("model-"))
    assert kinds == {
        "optimizer.pt": "unreadable",
        "config.json": "unreadable",
        "scheduler.pt": "unreadable",
        gone: "missing",
    }


def test_a_symbolic_link_counts_as_the_file_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "b1")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "m.safetensors").symlink_to("../blobs/b1")
    (folder / "again").symlink_to(".")  # a folder inside itself
    manifest = write_manifest(folder, {}, **STEP)
    assert set(manifest.files) == {"m.safetensors"}
    assert check_files(folder, manifest) == []
    flip(tmp_path / "blobs" / "b1", -1)
    assert found(folder) == [("changed", "m.safetensors", "a")]


def test_a_random_byte_of_a_random_file_is_always_named(full: Path, lora: Path) -> None:
    draw = random.Random(0)
    # The files of the two checkpoints, each with the tensors that own its bytes.
    files = [p for folder in (full, lora) for p in sorted(folder.iterdir())]
    for _ in range(200):
        file = draw.choice([p for p in files if p.name != MANIFEST_NAME])
        content = file.read_bytes()
        position, mask = draw.randrange(len(content)), draw.randrange(1, 256)
        is_safetensors = file.suffix == ".safetensors"
        owner = manifests.tensor_at(file, position) if is_safetensors else None
        flip(file, position, mask)
        kinds = found(file.parent)
        if file.name == "README.md":
            assert kinds == []
            manifest = read_manifest(file.parent)
            assert [p.place for p in list_harmless_changes(file.parent, manifest)] == ["README.md"]
        elif owner is not None or not is_safetensors:
            assert ("changed", file.name, owner) in kinds, (file, position, mask)
            # An index that cannot be read, or names what is not there, says so in addition.
            assert file.name == INDEX or len(kinds) == 1
        else:
            assert ("changed", file.name, "(header)") in kinds, (file, position, mask)
        assert {place for _, place, _ in kinds} <= {file.name}
        file.write_bytes(content)
    assert found(full) == found(lora) == []


@pytest.mark.parametrize("chunk_bytes", [1, 7, 4096])
def test_checksums_do_not_depend_on_the_size_of_a_read(
    lora: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    before = read_manifest(lora)
    for path in set(before.files) - {ADAPTER, "README.md"}:
        (lora / path).unlink()
    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", chunk_bytes)
    after = write_manifest(lora, {}, **STEP)
    assert after.files == {path: before.files[path] for path in (ADAPTER, "README.md")}
    assert check_files(lora, after) == []
