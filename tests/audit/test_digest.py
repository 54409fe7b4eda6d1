"""Checksums see every change of a byte, whatever the dtype, layout or history of the tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor

from trl_sync.audit.digest import (
    ABSENT,
    CPU_ALGORITHM,
    GPU_ALGORITHM,
    Digester,
    combine,
    digests,
    host_bytes,
    xxh3,
)
from trl_sync.audit.digest_gpu import reference_digests

REPOSITORY = Path(__file__).parents[2]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def expected(tensor: Tensor) -> bytes:
    """xxh3-128 over the elements one after the other, spelled out by NumPy."""
    return xxhash.xxh3_128_digest(tensor.detach().numpy().tobytes())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_is_xxh3_of_the_bytes_in_logical_order(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2, (24, 40), dtype=torch.uint8)
    tensor = raw.view(dtype)
    by_column = [bytes(element.tolist()) for element in raw.view(24, -1, dtype.itemsize)[:, 1]]
    assert digests([tensor]) == [xxhash.xxh3_128_digest(bytes(raw.flatten().tolist()))]
    assert digests([tensor[:, 1]]) == [xxhash.xxh3_128_digest(b"".join(by_column))]
    assert xxh3(tensor) == digests([tensor])[0]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[1::3],
        torch.arange(3.0).expand(4, 3),
        torch.tensor(2.5),
        torch.arange(4.0, requires_grad=True),
        torch.nn.Parameter(torch.arange(4.0)),
        torch.arange(6.0).reshape(2, 3).requires_grad_().T,
    ],
    ids=["transposed", "strided", "expanded", "scalar", "leaf", "parameter", "part of a graph"],
)
def test_every_layout_has_the_digest_of_its_values(tensor: Tensor) -> None:
    digester = Digester()
    for _ in range(2):
        assert digester.start([tensor]).result() == [expected(tensor)]


def test_lazy_conjugates_and_negatives_are_resolved() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    digester = Digester()
    for tensor in (values, values.conj(), values, values.conj().imag):
        [found] = digester.start([tensor]).result()
        assert found == expected(tensor.resolve_conj().resolve_neg())


def test_absent_and_empty_differ_and_the_order_is_kept() -> None:
    ones, empty = torch.ones(3), torch.empty(0, 5)
    assert digests([ones, None, empty]) == [expected(ones), ABSENT, xxhash.xxh3_128_digest(b"")]
    assert len(ABSENT) == 16
    assert digests([]) == []
    assert Digester().start([ones, None, empty]).size_bytes == 12


def test_a_root_depends_on_every_digest_and_on_their_order() -> None:
    first, second = digests([torch.zeros(2), torch.ones(2)])
    assert combine([first, second]) == xxhash.xxh3_128_digest(first + second)
    assert len({combine([first, second]), combine([second, first]), combine([first])}) == 3
    assert CPU_ALGORITHM != GPU_ALGORITHM


def test_kept_views_follow_the_tensor_that_is_given() -> None:
    digester = Digester()

    def check(*tensors: Tensor) -> None:
        assert digester.start(tensors).result() == [expected(tensor) for tensor in tensors]

    first, second = torch.arange(16.0), torch.arange(16.0) + 1
    check(first, second)
    check(second, first)
    first[3] = -1
    check(first, second)
    first.data = torch.full((16,), 7.0)
    check(first, second)
    first.resize_(5)
    check(first, second)
    check(first)
    square = torch.arange(16.0).reshape(4, 4)
    check(square)
    # The same address and size in another order.
    check(square.T)
    check(square)


def test_memory_that_was_freed_and_taken_again_is_read_anew() -> None:
    digester = Digester()
    addresses = set()
    for value in range(50):
        tensor = torch.full((4096,), float(value))
        addresses.add(tensor.data_ptr())
        assert digester.start([tensor]).result() == [expected(tensor)]
        del tensor
    assert len(addresses) < 50, "no address came back, so this test tried nothing"


def test_nothing_is_kept_alive() -> None:
    tensor = torch.ones(64)
    tensor_alive, storage_alive = weakref.ref(tensor), weakref.ref(tensor.untyped_storage())
    digester = Digester()
    pending = digester.start([tensor])
    del tensor
    assert len(pending.result()) == 1
    assert tensor_alive() is None
    assert storage_alive() is None


def test_ranges_that_follow_each_other_cover_every_byte() -> None:
    tensor = torch.arange(100, dtype=torch.uint8)
    ranges = [(start, min(start + 16, 100)) for start in range(0, 100, 16)]
    slices = [Digester([one]) for one in ranges]
    clean = [digester.start([tensor]).result()[0] for digester in slices]
    assert clean == [xxhash.xxh3_128_digest(bytes(range(*one))) for one in ranges]
    assert sum(digester.start([tensor]).size_bytes for digester in slices) == 100
    for place in range(100):
        tensor[place] ^= 128
        changed = [digester.start([tensor]).result()[0] for digester in slices]
        tensor[place] ^= 128
        assert [a != b for a, b in zip(clean, changed, strict=True)] == [
            start <= place < stop for start, stop in ranges
        ]


def test_a_range_cuts_strided_tensors_in_logical_order() -> None:
    tensor = torch.arange(12, dtype=torch.uint8).reshape(3, 4).T
    logical = bytes([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    found = Digester([(2, 7), None, (0, 0)]).start([tensor, tensor, tensor])
    assert found.result() == [xxhash.xxh3_128_digest(part) for part in (logical[2:7], logical, b"")]
    assert found.size_bytes == 17


@pytest.mark.parametrize("byte_range", [(0, 13), (-1, 4), (5, 4)])
def test_a_range_outside_the_tensor_is_refused(byte_range: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="does not lie in a tensor of 12 bytes"):
        Digester([byte_range]).start([torch.zeros(3)])


def test_a_list_of_another_length_than_the_ranges_is_refused() -> None:
    with pytest.raises(ValueError, match="Got 2 tensors for 1 byte ranges"):
        Digester([None]).start([torch.zeros(3), torch.zeros(3)])


def fake_tensor() -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(3)


def nested_tensor() -> Tensor:
    return torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(3)])


def quantized_tensor() -> Tensor:
    return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.zeros(3, device="meta"), "meta device"),
        (fake_tensor, "FakeTensor"),
        (nested_tensor, "nested"),
        (quantized_tensor, "quint8"),
    ],
)
def test_what_has_no_bytes_of_its_own_is_refused(make: Callable[[], Tensor], what: str) -> None:
    for function in (lambda tensor: digests([tensor]), xxh3, host_bytes):
        with pytest.raises(TypeError, match=what):
            function(make())


class Renamed(Tensor):
    """A subclass with memory of its own, such as bitsandbytes' weights."""


def test_a_subclass_with_its_own_memory_is_read_directly() -> None:
    tensor = torch.arange(5.0)
    assert digests([tensor.as_subclass(Renamed)]) == [expected(tensor)]


def test_a_wrapper_is_read_through_its_inner_tensors() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    first, second = torch.arange(3.0), torch.arange(3.0) + 5
    pair = TwoTensor(first, second)
    assert digests([pair]) == [combine([expected(first), expected(second)])]
    assert xxh3(pair) == digests([pair])[0]
    assert bytes(host_bytes(pair)) == first.numpy().tobytes() + second.numpy().tobytes()
    # Bytes 8 to 16 are the last element of the first and the first element of the second.
    ranged = Digester([(8, 16)]).start([pair])
    assert ranged.result() == [combine([expected(first[2:]), expected(second[:1])])]
    assert ranged.size_bytes == 8


def test_host_bytes_outlive_their_tensor_and_show_its_changes() -> None:
    tensor = torch.zeros(1024)
    view = host_bytes(tensor)
    tensor[0] = 1.0
    assert bytes(view[:4]) == b"\x00\x00\x80\x3f"
    del tensor
    others = [torch.full((1024,), 3.0) for _ in range(20)]
    assert bytes(view[4:]) == bytes(4092)
    assert len(others) == 20


def test_no_random_number_is_drawn_and_no_tensor_changed() -> None:
    tensors = [torch.randn(33, 7), torch.randn(9, 5).T]
    copies = [tensor.clone() for tensor in tensors]
    before = torch.get_rng_state()
    digests(tensors)
    reference_digests(tensors)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))


def test_digests_need_no_other_part_of_the_stack() -> None:
    code = (
        "import sys, torch, trl_sync.audit.digest as d; d.digests([torch.ones(2)]);"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'transformers', 'accelerate',"
        " 'peft', 'trl', 'triton'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_checksums_cost_what_was_promised(tmp_path: Path) -> None:
    # A process of its own: the checks of annotations in this one are no part of the cost.
    figures = tmp_path / "figures.json"
    script = REPOSITORY / "recipes" / "bench" / "checksum_speed.py"
    subprocess.run(
        [sys.executable, str(script), "--rounds", "15", "--json", str(figures)],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    found = json.loads(figures.read_text())
    assert [row["size_mib"] for row in found["large"]] == [4, 16, 64]
    for row in found["large"]:
        assert row["best_s"]["xxh3"] / row["best_s"]["trl_sync"] >= 0.8, row
    assert [row["size_bytes"] for row in found["small"]] == [64, 4096]
    for row in found["small"]:
        assert row["best_s"]["trl_sync"] - row["best_s"]["xxh3"] <= 3e-6, row
