"""Manifests of PPO under engines that hold the state in parts: damage to it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import xxhash

import engine_manifests
import engines
import tiny
from engine_manifests import END, HALFWAY, TENSOR, nf4_base
from trl_sync.audit.manifest import check_base, check_files, read_manifest
from trl_sync.audit.manifest_base import plain_name
from trl_sync.audit.manifest_format import Manifest

pytestmark = [pytest.mark.engines, pytest.mark.ranks]

# 2 layers of 7 linear layers, each with two factors for policy and value model; a head with a bias.
NUM_TRAINABLE = 2 * 7 * 2 * 2 + 2
# 14 base weights, 2 norms a layer and the last, embeddings and head.
NUM_FROZEN = 14 + 5 + 2
SHARDED = ("zero3", "fsdp2", "hsdp")


@pytest.fixture(
    scope="module",
    params=["zero2", "zero3", "fsdp2", pytest.param("hsdp", marks=pytest.mark.slow)],
)
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """Engine, folder of the saved run, and what each rank found."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, seed in (("right", 0), ("other", 9)):
        tiny.llama(seed).save_pretrained(folder / name)
    found = engines.run_on_engine(
        request.param, engine_manifests.everything, request.param, str(folder), deadline_s=280
    )
    return request.param, folder / "saved", found


def sums(manifest: Manifest, scope: str) -> dict[str, str]:
    return {name: record.xxh3_128 for name, record in manifest.tensors[scope].items()}


def test_trainable_tensors_are_recorded_whole(run: Any) -> None:
    engine, output, found = run
    manifest = read_manifest(output / END)
    assert len(manifest.tensors["trainable"]) == NUM_TRAINABLE
    assert sums(manifest, "trainable") == found[0]["trainable"] == found[1]["trainable"]
    # A LoRA factor of 4 x 64 numbers of 4 bytes: along its rows, or cut as one long row.
    record = manifest.tensors["trainable"][TENSOR]
    halves = ["0:512", "512:1024"] if engine in SHARDED else []
    assert (list(record.parts), record.shape) == (halves, (4, 64))


def test_a_4_bit_base_is_recorded_as_the_same_bytes(run: Any) -> None:
    engine, output, _ = run
    frozen = read_manifest(output / HALFWAY).tensors["frozen"]
    expected = {}
    for name, parameter in nf4_base(output.parent / "right").named_parameters():
        data = parameter.detach().data.contiguous().numpy()
        expected[name] = (xxhash.xxh3_128_hexdigest(data.tobytes()), str(data.dtype), data.shape)
    assert len(expected) == NUM_FROZEN
    recorded = {
        plain_name(name).removeprefix("peft_model."): (r.xxh3_128, r.dtype, r.shape)
        for name, r in frozen.items()
    }
    assert recorded == expected
    assert any(record.parts for record in frozen.values()) == (engine in SHARDED)


def test_the_optimizer_is_recorded_whole_or_by_rank(run: Any) -> None:
    engine, output, found = run
    manifest = read_manifest(output / END)
    if engine in ("fsdp2", "hsdp"):
        assert sums(manifest, "optimizer") == found[0]["optimizer"]
        assert len(manifest.tensors["optimizer"]) == 3 * NUM_TRAINABLE
        assert (manifest.partitioned_by, manifest.partitions) == (None, {})
    else:
        assert manifest.tensors["optimizer"] == {}
        names = {"zero2": "ZeRO-2", "zero3": "DeepSpeedZeroOptimizer_Stage3"}
        assert manifest.partitioned_by == names[engine]
        ranks = manifest.partitions
        assert list(ranks) == ["0", "1"]
        assert ranks["0"].keys() == ranks["1"].keys() >= {"partition_0.exp_avg"}
        one, other = (ranks[rank]["partition_0.exp_avg"] for rank in ("0", "1"))
        assert one.xxh3_128 != other.xxh3_128


def test_a_frozen_base_is_gathered_once(run: Any) -> None:
    engine, _, found = run
    for rank in found:
        first, *later = rank["gathered"] or [[]]
        assert first.count("frozen") == (NUM_FROZEN if engine in SHARDED else 0)
        assert [scopes.count("frozen") for scopes in later] == [0] * len(later)
        assert [scopes.count("trainable") for scopes in later] == (
            [NUM_TRAINABLE] if engine in SHARDED else []
        )
        # The same layout as when it was saved: each rank compares what it holds.
        assert rank["resumed"]["gathered"] == []
        assert rank["resumed"]["gathered_later"].count("frozen") == 0


def test_a_whole_checkpoint_is_verified(run: Any) -> None:
    _, output, found = run
    assert check_files(output / HALFWAY, read_manifest(output / HALFWAY)) == []
    for rank in found:
        assert rank["resumed"]["steps"] == 8
        assert not [text for text in rank["resumed"]["messages"] if "compared" in text]
    assert found[0]["resumed"]["events"][:3] == ["begin", "audit", "resume"]


def test_partitions_of_another_number_of_ranks_are_not_compared(run: Any) -> None:
    engine, _, found = run
    if engine == "zero2":
        first, second = (rank["ranks"] for rank in found)
        assert (first["steps"], second["steps"]) == (8, 8)
        assert second["messages"] == []
        (said,) = (text for text in first["messages"] if "compared" in text)
        assert "among 2 ranks, and did among 4. The checkpoint's files were" in said
        assert first["events"] == ["begin", "audit", "not_compared", "resume"]
        # The file that was not loaded to be compared is compared itself.
        for rank in found:
            damaged = rank["ranks, file"]
            assert (damaged["cause"], damaged["ranks"]) == ("manifest_mismatch", [0, 1])
            assert damaged["tensor"].endswith("zero_pp_rank_1_mp_rank_00_optim_states.pt")


def test_a_manifest_of_format_1_is_verified(run: Any) -> None:
    engine, _, found = run
    if engine == "zero3":
        first, second = (rank["format 1"] for rank in found)
        assert (first["steps"], second["steps"]) == (8, 8)
        (said,) = (text for text in first["messages"] if "compared" in text)
        assert "recorded as whole tensors, and is held as DeepSpeedZeroOptimizer_Stage3" in said
        # Without parts every sharded tensor is gathered, the base included.
        assert first["gathered"].count("trainable") == NUM_TRAINABLE
        assert first["gathered"].count("frozen") == NUM_FROZEN


def test_a_bit_in_memory_names_tensor_and_rank(run: Any) -> None:
    engine, _, found = run
    # Where others hold the same bytes, the first audit is earlier than the manifest.
    cause, ranks = {
        "zero2": ("init_mismatch", [0, 1]),
        "hsdp": ("init_mismatch", [1, 3]),
    }.get(engine, ("manifest_mismatch", [1]))
    for rank in found:
        memory = rank["memory"]
        assert (memory["cause"], memory["tensor"], memory["ranks"]) == (cause, TENSOR, ranks)
        if cause == "manifest_mismatch":
            assert "bytes 512:1024 have checksum" in memory["said"]


def test_a_bit_of_a_partition_of_the_optimizer_names_the_rank(run: Any) -> None:
    engine, _, found = run
    if engine.startswith("zero"):
        for rank in found:
            partition = rank["partition"]
            assert (partition["cause"], partition["ranks"]) == ("manifest_mismatch", [1])
            assert partition["tensor"] == "partition_0.exp_avg"


def test_a_flipped_byte_in_a_file_names_tensor_and_file(run: Any) -> None:
    engine, _, found = run
    for rank in found:
        said = rank["file"]["said"]
        assert rank["file"]["cause"] == "manifest_mismatch"
        if engine.startswith("zero"):
            assert rank["file"]["tensor"] == "partition_0.exp_avg"
            assert rank["file"]["ranks"] == [1]
            assert "zero_pp_rank_1_mp_rank_00_optim_states.pt: changed" in said
        else:
            assert ".policy.weight: changed" in said
            assert "adapter_model.safetensors: " in said


def test_a_missing_shard_of_the_optimizer_is_named(run: Any) -> None:
    _, output, found = run
    damaged = output.parent / "missing" / HALFWAY
    (problem,) = check_files(damaged, read_manifest(damaged))
    assert problem.kind == "missing"
    assert "rank_1_" in problem.place or "/__1_" in problem.place
    for rank in found:
        assert problem.place.rpartition("/")[2] in rank["missing"]["said"]


def test_another_base_is_named(run: Any) -> None:
    _, output, found = run
    for rank in found:
        assert (rank["base"]["cause"], rank["base"]["ranks"]) == (
            "manifest_mismatch",
            list(range(len(found))),
        )
        assert "frozen: " in rank["base"]["said"]
        assert ": another_base, the base is another model" in rank["base"]["said"]
    # Of the files of the base: norms, embeddings and head, which are not packed.
    manifest = read_manifest(output / END)
    assert [p.kind for p in check_base(manifest, output.parent / "right")] == ["not_comparable"]
    kinds = [p.kind for p in check_base(manifest, output.parent / "other")]
    assert kinds == ["changed", "changed", "not_comparable"]


def test_adapters_that_only_rank_0_restored(run: Any) -> None:
    """accelerate#4206: FSDP2 with PEFT and FULL_STATE_DICT restored the shard of rank 0 alone.

    accelerate 1.15 sends the others theirs, so the replay puts back what rank 1 had before. No rank
    holds the same as another: only the manifest can tell.
    """
    engine, _, found = run
    if engine == "fsdp2":
        for rank in found:
            partly = rank["rank 0 only"]
            assert (partly["cause"], partly["ranks"]) == ("manifest_mismatch", [1])
            assert "lora_" in partly["tensor"]
            assert "have checksum" in partly["said"]
