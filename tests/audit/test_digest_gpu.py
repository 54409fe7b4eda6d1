"""The GPU's checksum: kernel, torch reference and big integers agree bit for bit.

Without a GPU the kernel runs in Triton's interpreter, in a process of its own that is born with
TRITON_INTERPRET: Triton reads it when it is imported, which libraries do on their own.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from trl_sync.audit import digest_gpu
from trl_sync.audit.digest import ABSENT, Digester, PendingDigests, digests
from trl_sync.audit.digest_gpu import LANE_SEEDS, TILE_BYTES, reference_digests, tile_table

MASK_64 = (1 << 64) - 1
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
# Around words, 16-byte loads, blocks of 2,048 words and tiles of 65,536 bytes.
SIZES = [0, 1, 2, 3, 4, 5, 15, 16, 17, 8191, 8192, 8193, 8196, 65535, 65536, 65537, 65540, 200001]

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="runs the compiled kernel on a GPU; without one the interpreter runs it above",
)


def random_bytes(size_bytes: int, seed: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, generator=generator)


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return z ^ (z >> 31)


def big_integer_digest(data: bytes) -> bytes:
    """The definition at the head of digest_gpu.py, in Python's integers."""
    padded = data + bytes(-len(data) % 4)
    words = [int.from_bytes(padded[at : at + 4], "little") for at in range(0, len(padded), 4)]
    digest = b""
    for seed in LANE_SEEDS:
        total = sum((splitmix64(seed + i & MASK_64) | 1) * word for i, word in enumerate(words))
        lane = splitmix64((total & MASK_64) ^ splitmix64(seed ^ len(data)))
        digest += lane.to_bytes(8, "little")
    return digest


def through_the_kernel(
    tensors: list[Tensor | None], ranges: list[tuple[int, int] | None] | None = None
) -> list[bytes]:
    """What the public Digester answers when CPU tensors are sent to the kernel."""
    digester = Digester(ranges, kernel_devices=("cpu",))
    first = digester.start(tensors).result()
    # The second call finds the table of tiles that the first one made.
    assert digester.start(tensors).result() == first
    return first


def enter_interpreter() -> None:
    warnings.simplefilter("error")
    from trl_sync.audit import digest_kernel

    assert type(digest_kernel.checksum_tiles).__name__ == "InterpretedFunction"


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton's kernels run on CPU tensors."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=enter_interpreter) as process:
        with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
            process.submit(os.getpid).result()
        yield process


def test_the_reference_is_the_definition_in_big_integers() -> None:
    # The published first outputs of the generator that starts at 0.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    raw = random_bytes(9000)
    tensors = [raw[first : first + size] for first in (0, 3) for size in SIZES if size < 8990]
    assert reference_digests(tensors) == [big_integer_digest(bytes(t.tolist())) for t in tensors]


def test_the_reference_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_bytes(1001)
    whole = reference_digests([raw])
    monkeypatch.setattr(digest_gpu, "REFERENCE_CHUNK_WORDS", 7)
    assert reference_digests([raw]) == whole


def check_sizes_and_alignments() -> None:
    raw = random_bytes(300_000)
    tensors: list[Tensor | None] = [raw[:size] for size in SIZES]
    # Every alignment of the first byte, over more than two blocks of words.
    tensors += [raw[first : 20_000 + 2 * first] for first in range(1, 20)]
    found = through_the_kernel(tensors)
    assert found == reference_digests(tensors)
    assert len(set(found)) == len(tensors)


def check_dtypes_and_layouts() -> None:
    raw = random_bytes(24 * 40).reshape(24, 40)
    # Other bytes than 0 and 1 are no booleans.
    of_bytes = [(raw % 2 if dtype == torch.bool else raw).view(dtype) for dtype in DTYPES]
    tensors = [layout for tensor in of_bytes for layout in (tensor, tensor.T, tensor[:, ::2])]
    tensors += [tensors[0].requires_grad_(False), torch.tensor([1 + 2j]).conj(), torch.tensor(2.5)]
    assert through_the_kernel([*tensors, None]) == [*reference_digests(tensors), ABSENT]


def check_many_tensors() -> None:
    generator = torch.Generator().manual_seed(31)
    sizes = torch.randint(0, 40, (300,), generator=generator).tolist()
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    assert through_the_kernel(tensors) == reference_digests(tensors)


def check_ranges() -> None:
    raw = random_bytes(150_000)
    ranges = [None, (0, 150_000), (16, 70_000), (13, 65_549 + 13), (149_999, 150_000), (5, 5)]
    tensors = [raw] * len(ranges)
    found = through_the_kernel(tensors, ranges)
    assert found == reference_digests(tensors, ranges)
    cut = [raw if one is None else raw[one[0] : one[1]].clone() for one in ranges]
    assert found == reference_digests(cut)


def check_the_table_follows_the_tensors() -> None:
    digester = Digester(kernel_devices=("cpu",))
    first, second = random_bytes(100, 1), random_bytes(100, 2)
    for tensors in ([first, second], [second, first], [first], [first[:50]], [first[1:51]]):
        assert digester.start(tensors).result() == reference_digests(tensors)
    first[0] ^= 1
    assert digester.start([first]).result() == reference_digests([first])
    assert through_the_kernel([first[:0]]) == reference_digests([first[:0]])


@pytest.mark.parametrize(
    "check",
    [
        check_sizes_and_alignments,
        check_dtypes_and_layouts,
        check_many_tensors,
        check_ranges,
        check_the_table_follows_the_tensors,
    ],
)
def test_the_interpreted_kernel_is_the_reference(
    check: Callable[[], None], interpreter: ProcessPoolExecutor
) -> None:
    interpreter.submit(check).result()


def compile_for(capability: int, cache: str) -> str:
    """The PTX of the kernel for a GPU that need not be there."""
    with mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from trl_sync.audit import digest_kernel

        source = ASTSource(
            fn=digest_kernel.checksum_tiles,
            signature={"table": "*i64", "lane_sums": "*i64"}
            | dict.fromkeys(("seed_0", "seed_1", "block_words"), "constexpr"),
            constexprs={"seed_0": 1, "seed_1": 2, "block_words": digest_kernel.BLOCK_WORDS},
        )
        options = {"num_warps": digest_kernel.NUM_WARPS}
        return triton.compile(source, GPUTarget("cuda", capability, 32), options).asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_compiled_kernel_reads_16_bytes_at_once_only_where_they_are_aligned(
    capability: int, tmp_path: Path
) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        ptx = process.submit(compile_for, capability, str(tmp_path)).result()
    # 8 words for each of 256 threads: two wide loads in one branch, eight single ones in the other.
    assert ptx.count("ld.global.v4.b32") == 2
    assert ptx.count("ld.global.b32") == 8


def test_tiles_cut_up_every_span_once() -> None:
    spans = [(1 << 40, 2 * TILE_BYTES + 5), (77, 0), (1 << 41, TILE_BYTES)]
    assert tile_table(spans).tolist() == [
        [1 << 40, 0, TILE_BYTES, 0],
        [(1 << 40) + TILE_BYTES, TILE_BYTES // 4, TILE_BYTES, 0],
        [(1 << 40) + 2 * TILE_BYTES, TILE_BYTES // 2, 5, 0],
        [1 << 41, 0, TILE_BYTES, 2],
    ]
    assert tile_table([]).shape == (0, 4)


def test_any_change_of_one_word_is_seen_by_both_lanes() -> None:
    words = torch.zeros(64, dtype=torch.int32)
    clean = reference_digests([words])[0]
    # An even coefficient would lose the highest bits: 2^31 times an even number is 0 mod 2^32.
    differences = [1 << bit for bit in range(32)] + [0xFFFFFFFF, 0x80000001, 0xAAAAAAAA]
    for place in (0, 1, 31, 63):
        for difference in differences:
            words[place] = difference - (1 << 32) if difference >> 31 else difference
            changed = reference_digests([words])[0]
            assert changed[:8] != clean[:8]
            assert changed[8:] != clean[8:]
        words[place] = 0


def test_without_triton_the_same_digests_come_from_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digest_gpu, "_kernel", lambda: None)
    raw = random_bytes(1000)
    assert digest_gpu.DeviceDigester(torch.device("cpu")).backend == "torch"
    assert through_the_kernel([raw, None, raw[3:]]) == [
        big_integer_digest(bytes(raw.tolist())),
        ABSENT,
        big_integer_digest(bytes(raw[3:].tolist())),
    ]


def test_zeros_of_different_lengths_differ() -> None:
    found = reference_digests([torch.zeros(n, dtype=torch.uint8) for n in range(40)])
    assert len({digest[:8] for digest in found} | {digest[8:] for digest in found}) == 80


def test_the_reference_takes_no_wrapper_of_several_tensors() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(ValueError, match="TwoTensor holds 2 inner tensors"):
        reference_digests([TwoTensor(torch.zeros(2), torch.zeros(2))])


# Triton 3.9.0 announces a new default for floating point, which this kernel does not use.
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")
@pytest.mark.gpu
@needs_gpu
class TestOnAGpu:
    def tensors(self) -> list[Tensor]:
        raw = random_bytes(300_000).cuda()
        square = random_bytes(960).reshape(24, 40).cuda()
        return (
            [raw[:size] for size in SIZES]
            + [raw[first : 20_000 + 2 * first] for first in range(1, 20)]
            + [square.view(dtype) for dtype in DTYPES[1:]]
            + [square.view(torch.float32).T]
        )

    def test_the_kernel_is_the_reference_on_host_and_device(self) -> None:
        tensors = self.tensors()
        found = Digester().start(tensors).result()
        assert found == reference_digests(tensors)
        assert found == reference_digests([tensor.cpu() for tensor in tensors])
        assert digest_gpu.DeviceDigester(tensors[0].device).backend == "triton"

    def test_cpu_and_gpu_tensors_share_a_list(self) -> None:
        on_gpu, on_cpu = self.tensors()[-1], torch.arange(9.0)
        assert digests([on_cpu, None, on_gpu]) == [
            *digests([on_cpu]),
            ABSENT,
            *reference_digests([on_gpu]),
        ]

    def test_start_does_not_wait_for_the_device(self) -> None:
        tensors, digester = self.tensors(), Digester()
        # Several at once, so that the allocator has pinned buffers for those that follow.
        [expected, *_] = [one.result() for one in [digester.start(tensors) for _ in range(3)]]
        torch.cuda.set_sync_debug_mode("error")
        try:
            pending = digester.start(tensors)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert isinstance(pending, PendingDigests)
        # The stream is busy for seconds: a start() that waited would come back after them.
        done = torch.cuda.Event()
        torch.cuda._sleep(4_000_000_000)
        done.record()
        later = digester.start(tensors)
        assert not done.query()
        assert pending.result() == later.result() == expected

    def test_hashing_runs_at_80_percent_of_the_speed_of_copying(self) -> None:
        from bench import checksum_speed

        found = checksum_speed.measure_gpu(rounds=15)
        ratio = found["best_s"]["copy"] / found["best_s"]["trl_sync"]
        assert ratio >= 0.8, f"{ratio:.0%} of the copy's speed: {found}"
