"""A manifest that is damaged, edited, forged or of another kind is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests import ADAPTER, flip, found
from trl_sync.audit.manifest import (
    MANIFEST_NAME,
    read_manifest,
)
from trl_sync.audit.manifest_format import own_checksum
from trl_sync.errors import CheckpointError


def test_a_changed_manifest_is_refused(lora: Path) -> None:
    content = json.loads((lora / MANIFEST_NAME).read_text())
    content["step"] += 1
    (lora / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="changed after it was written"):
        read_manifest(lora)
    # Another layout of the same content is none of its business.
    content["step"] -= 1
    (lora / MANIFEST_NAME).write_text(json.dumps(content))
    assert read_manifest(lora).step == 2


def test_a_random_byte_of_the_manifest_never_passes_for_other_content(lora: Path) -> None:
    whole, healthy = (lora / MANIFEST_NAME).read_bytes(), read_manifest(lora)
    draw, refused = random.Random(1), 0
    for _ in range(200):
        position = draw.randrange(len(whole))
        flip(lora / MANIFEST_NAME, position, draw.randrange(1, 256))
        try:
            assert read_manifest(lora) == healthy
            assert whole[position : position + 1].isspace()
        except CheckpointError:
            refused += 1
        (lora / MANIFEST_NAME).write_bytes(whole)
    assert refused > 150


def test_a_manifest_cut_anywhere_is_refused(lora: Path) -> None:
    whole = (lora / MANIFEST_NAME).read_bytes()
    for length in [0, 1, 2, 100, len(whole) // 2, len(whole) - 2]:
        (lora / MANIFEST_NAME).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="no JSON"):
            read_manifest(lora)


def test_a_missing_manifest(lora: Path) -> None:
    (lora / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        read_manifest(lora)
    (lora / MANIFEST_NAME).mkdir()
    with pytest.raises(CheckpointError, match="cannot be used"):
        read_manifest(lora)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[]", "a JSON list, an object was expected"),
        ("3", "a JSON int"),
        ("[" * 100_000, "no JSON"),
        ('{"format": NaN}', "NaN is no JSON number"),
        ('{"format": Infinity}', "Infinity is no JSON number"),
        ('{"format": ' + "9" * 5000 + "}", "no JSON"),
        ("{}", "no field 'format'"),
        (
            '{"format": 3, "package_version": "9.9"}',
            "format 3, .*reads format 1 and 2.*wrote it: 9.9",
        ),
        ('{"format": "1"}', "expected int"),
        ('{"format": true}', "expected int"),
        ('{"format": 1}', "no field 'checksum'"),
        ('{"format": 0}', "format 0"),
    ],
)
def test_a_text_that_is_no_manifest(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_manifest(tmp_path)


def forged(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest in `folder` and mends its checksum."""
    content = json.loads((folder / MANIFEST_NAME).read_text())
    change(content)
    content["checksum"] = own_checksum(content)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "./a", "a/", "..", "C:x", "a\\b", "a\0b"],
)
def test_a_path_that_leaves_the_folder_is_refused(lora: Path, path: str) -> None:
    forged(lora, lambda m: m["files"].update({path: m["files"]["optimizer.pt"]}))
    with pytest.raises(CheckpointError, match="expected a path that stays in the folder"):
        read_manifest(lora)


WRONG_TYPES: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("the manifest.step is True", lambda m: m.update(step=True)),
    ("the manifest.step is 1.5", lambda m: m.update(step=1.5)),
    ("the manifest.verified is 1", lambda m: m.update(verified=1)),
    ("the manifest.reason is 3", lambda m: m.update(reason=3)),
    ("no field 'reason'", lambda m: m.pop("reason")),
    ("no field 'partitions'", lambda m: m.pop("partitions")),
    ("no field 'partitioned_by'", lambda m: m.pop("partitioned_by")),
    ("partitions.0 is", lambda m: m.update(partitions={"0": 3})),
    ("partitions.0.a.shape is", lambda m: m.update(partitions={"0": {"a": {"shape": 3}}})),
    ("'0-8', expected bytes", lambda m: first_tensor(m).update(parts={"0-8": "0" * 32})),
    ("32 hexadecimal", lambda m: first_tensor(m).update(parts={"0:8": "0"})),
    ("no field 'world_size'", lambda m: m.pop("world_size")),
    ("algorithm 'md5'", lambda m: m.update(algorithm="md5")),
    ("the manifest.tensors is", lambda m: m.update(tensors=[])),
    ("tensors.frozen is", lambda m: m["tensors"].update(frozen=3)),
    ("tensors.frozen.a is a int", lambda m: m["tensors"].update(frozen={"a": 3})),
    ("the manifest.files is", lambda m: m.update(files=None)),
    ("files.config.json is a str", lambda m: m["files"].update({"config.json": "x"})),
    ("size_bytes is '3'", lambda m: m["files"]["optimizer.pt"].update(size_bytes="3")),
    ("32 hexadecimal", lambda m: m["files"]["optimizer.pt"].update(xxh3_128="g" * 32)),
    ("32 hexadecimal", lambda m: m["files"]["optimizer.pt"].update(xxh3_128="A" * 32)),
    ("no field 'header'", lambda m: m["files"][ADAPTER].pop("header")),
    ("32 hexadecimal", lambda m: m["files"][ADAPTER]["tensors"].update(a="")),
    ("expected a list of sizes", lambda m: first_tensor(m).update(shape=[-1])),
    ("expected a list of sizes", lambda m: first_tensor(m).update(shape=[True])),
    ("expected list", lambda m: first_tensor(m).update(shape="3")),
    ("expected str", lambda m: first_tensor(m).update(dtype=None)),
]


def first_tensor(content: dict[str, Any]) -> dict[str, Any]:
    return next(iter(content["tensors"]["frozen"].values()))


@pytest.mark.parametrize("said, change", WRONG_TYPES)
def test_a_field_of_a_wrong_type(
    lora: Path, said: str, change: Callable[[dict[str, Any]], object]
) -> None:
    forged(lora, change)
    with pytest.raises(CheckpointError, match=said.replace(".", r"\.")):
        read_manifest(lora)


def test_a_manifest_of_format_1_is_read(lora: Path) -> None:
    """It had no parts and no partitions, and kept the type that packed weights were stored in."""
    healthy = read_manifest(lora)
    weight, other = list(healthy.tensors["frozen"])[:2]
    parts = {"0:8": "0" * 32}
    forged(lora, lambda m: m["tensors"]["frozen"][weight].update(parts=parts))
    assert read_manifest(lora).tensors["frozen"][weight].parts == parts

    def downgrade(content: dict[str, Any]) -> None:
        del content["partitioned_by"], content["partitions"]
        content["format"] = 1
        frozen = content["tensors"]["frozen"]
        del frozen[weight]["parts"]
        frozen[weight].update(dtype="bfloat16", shape=[6, 1])
        content["tensors"]["quantization"] = {f"{weight}.absmax": frozen[other]}

    forged(lora, downgrade)
    old = read_manifest(lora)
    assert (old.format, healthy.format) == (1, 2)
    assert (old.partitioned_by, old.partitions) == (None, {})
    packed = old.tensors["frozen"][weight]
    # Six numbers of two bytes; every other record is as it was.
    assert (packed.dtype, packed.shape) == ("uint8", (12, 1))
    assert old.tensors["frozen"][other] == healthy.tensors["frozen"][other]
    assert (old.tensors["trainable"], old.files) == (healthy.tensors["trainable"], healthy.files)


def test_a_forged_checksum_of_a_file_is_found_in_the_file(lora: Path) -> None:
    forged(lora, lambda m: m["files"]["optimizer.pt"].update(xxh3_128="0" * 32))
    forged(lora, lambda m: m["files"][ADAPTER].update(xxh3_128="0" * 32))
    assert found(lora) == [("changed", ADAPTER, None), ("changed", "optimizer.pt", None)]
