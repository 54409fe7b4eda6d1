"""The Triton kernel behind `digest_gpu`. Importing this module imports Triton."""

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

BLOCK_WORDS = 2048
NUM_WARPS = 8


def launch(table: Tensor, lane_sums: Tensor, lane_seeds: tuple[int, int]) -> None:
    """Adds the weighted words of every tile in `table` to `lane_sums`, int64 [number of spans, 2].

    A row of `table` is as `digest_gpu.tile_table` writes it.
    """
    if len(table):
        checksum_tiles[(len(table),)](
            table,
            lane_sums,
            seed_0=lane_seeds[0],
            seed_1=lane_seeds[1],
            block_words=BLOCK_WORDS,
            num_warps=NUM_WARPS,
        )


# no_type_check keeps checkers that rewrite functions at import away: Triton compiles the source.
@triton.jit
@no_type_check
def coefficient(state):
    """splitmix64(state) | 1: the next output of the generator at `state`, made odd."""
    z = state + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)) | 1


@triton.jit
@no_type_check
def checksum_tiles(
    table, lane_sums, seed_0: tl.constexpr, seed_1: tl.constexpr, block_words: tl.constexpr
):
    """One program sums one tile; its loads are as wide as the tile's address allows."""
    row = table + tl.program_id(0).to(tl.int64) * 4
    address = tl.load(row)
    first_word = tl.load(row + 1).to(tl.uint64)
    size_bytes = tl.load(row + 2)
    lane_sums += tl.load(row + 3) * 2
    lanes = tl.arange(0, block_words)
    sum_0 = tl.zeros([block_words], tl.uint64)
    sum_1 = tl.zeros([block_words], tl.uint64)
    # The words in blocks that need no mask: a mask would split wide loads into single words.
    full_words = size_bytes // 4 // block_words * block_words
    if address % 16 == 0:
        # The hint marks this value alone: in the other branch 16-byte loads would be misaligned.
        words = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)
        for block in range(0, full_words, block_words):
            x = tl.load(words + block + lanes).to(tl.uint64)
            index = first_word + (block + lanes).to(tl.uint64)
            sum_0 += x * coefficient(seed_0 + index)
            sum_1 += x * coefficient(seed_1 + index)
    elif address % 4 == 0:
        words = address.to(tl.pointer_type(tl.uint32))
        for block in range(0, full_words, block_words):
            x = tl.load(words + block + lanes).to(tl.uint64)
            index = first_word + (block + lanes).to(tl.uint64)
            sum_0 += x * coefficient(seed_0 + index)
            sum_1 += x * coefficient(seed_1 + index)
    else:
        full_words = full_words * 0
    # The rest byte by byte: the end of the tensor, and all of it where no word is aligned.
    bytes_ = address.to(tl.pointer_type(tl.uint8))
    for block in range(full_words, (size_bytes + 3) // 4, block_words):
        x = tl.zeros([block_words], tl.uint64)
        for i in tl.static_range(4):
            at = (block + lanes) * 4 + i
            x |= tl.load(bytes_ + at, mask=at < size_bytes, other=0).to(tl.uint64) << (8 * i)
        index = first_word + (block + lanes).to(tl.uint64)
        sum_0 += x * coefficient(seed_0 + index)
        sum_1 += x * coefficient(seed_1 + index)
    tl.atomic_add(lane_sums, tl.sum(sum_0).to(tl.int64), sem="relaxed")
    tl.atomic_add(lane_sums + 1, tl.sum(sum_1).to(tl.int64), sem="relaxed")
