"""Random faults in real tensors, by class, and the count of those that a checksum misses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Digest = Callable[[Tensor], bytes]

# Unsigned integer of the same width, and the bits above the mantissa: a NaN has all of them set.
DTYPES = {
    "float32": (torch.float32, np.uint32, 0x7F800000),
    "bfloat16": (torch.bfloat16, np.uint16, 0x7F80),
    "float16": (torch.float16, np.uint16, 0x7C00),
    "float8_e4m3fn": (torch.float8_e4m3fn, np.uint8, 0x7F),
    "float8_e5m2": (torch.float8_e5m2, np.uint8, 0x7C),
    "uint8": (torch.uint8, np.uint8, None),
}
SHAPES = [(1, 1), (1, 7), (13, 11), (31, 33), (64, 64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A tensor, and the same memory as unsigned integers."""

    tensor: Tensor
    elements: np.ndarray
    exponent_bits: int | None
    fresh: np.ndarray
    draw: random.Random
    numpy_draw: np.random.Generator

    @property
    def num_bits(self) -> int:
        return 8 * self.elements.itemsize

    def place(self) -> tuple[int, int]:
        rows, columns = self.elements.shape
        return int(self.draw.random() * rows), int(self.draw.random() * columns)

    def refill(self) -> None:
        """New random content, so that no two injections meet the same tensor."""
        first = int(self.draw.random() * (len(self.fresh) - self.elements.size))
        self.elements[...] = self.fresh[first : first + self.elements.size].reshape(
            self.elements.shape
        )


# A fault prepares the clean tensor, yields for its checksum, then changes the tensor.
Fault = Callable[[Case], Iterator[None]]


def one_bit(case: Case) -> Iterator[None]:
    yield
    case.elements[case.place()] ^= 1 << case.draw.randrange(case.num_bits)


def same_bit_in_two_words(case: Case) -> Iterator[None]:
    yield
    columns = case.elements.shape[1]
    in_a_word = 4 // case.elements.itemsize
    first = case.draw.randrange(case.elements.size - in_a_word)
    distance = in_a_word * case.draw.randint(1, (case.elements.size - 1 - first) // in_a_word or 1)
    bit = 1 << case.draw.randrange(case.num_bits)
    for place in (first, first + distance):
        case.elements[divmod(place, columns)] ^= bit


def row_permutation(case: Case) -> Iterator[None]:
    yield
    case.elements[...] = case.elements[case.numpy_draw.permutation(len(case.elements))]


def transpose(case: Case) -> Iterator[None]:
    yield
    case.elements[...] = case.elements.T.reshape(case.elements.shape).copy()


def sign_flip(case: Case) -> Iterator[None]:
    yield
    if case.exponent_bits is None:
        np.negative(case.elements, out=case.elements)
    else:
        case.elements[...] ^= 1 << (case.num_bits - 1)


def zeros_for_a_constant(case: Case) -> Iterator[None]:
    case.elements[...] = case.draw.randrange(1, 1 << case.num_bits)
    yield
    case.elements[...] = 0


def one_negative_zero(case: Case) -> Iterator[None]:
    place = case.place()
    case.elements[place] = 0
    yield
    case.elements[place] = 1 << (case.num_bits - 1)


def one_ulp(case: Case) -> Iterator[None]:
    yield
    place = case.place()
    case.elements[place] = (int(case.elements[place]) + 1) % (1 << case.num_bits)


def forty_bytes(case: Case) -> Iterator[None]:
    yield
    size, itemsize = case.elements.size, case.elements.itemsize
    content = np.ascontiguousarray(case.elements).reshape(-1).copy()
    places = case.numpy_draw.integers(0, size * itemsize, 40)
    content.view(np.uint8)[places] ^= case.numpy_draw.integers(1, 256, 40, dtype=np.uint8)
    case.elements[...] = content.reshape(case.elements.shape)


def swapped_rows(case: Case) -> Iterator[None]:
    yield
    pair = case.draw.sample(range(len(case.elements)), 2)
    case.elements[pair] = case.elements[pair[::-1]]


def one_nan(case: Case) -> Iterator[None]:
    yield
    assert case.exponent_bits is not None
    num_mantissa_bits = case.exponent_bits & -case.exponent_bits
    payload = case.draw.randrange(1, num_mantissa_bits) if num_mantissa_bits > 1 else 0
    case.elements[case.place()] = case.exponent_bits | payload


# The fault, the smallest number of rows and of elements it needs, whether it is about floats.
FAULTS: dict[str, tuple[Fault, int, int, bool]] = {
    "1 bit": (one_bit, 1, 1, False),
    "same bit in 2 words": (same_bit_in_two_words, 1, 5, False),
    "row permutation": (row_permutation, 2, 2, False),
    "transpose": (transpose, 2, 4, False),
    "sign flip": (sign_flip, 1, 1, False),
    "zeros for a constant": (zeros_for_a_constant, 1, 1, False),
    "one -0.0": (one_negative_zero, 1, 1, True),
    "1 ulp": (one_ulp, 1, 1, False),
    "40 bytes": (forty_bytes, 1, 1, False),
    "swapped rows": (swapped_rows, 2, 2, False),
    "one NaN": (one_nan, 1, 1, True),
}


def cells() -> list[tuple[str, str]]:
    """Every class of fault with every dtype it applies to."""
    return [
        (fault, dtype)
        for fault, (_, _, _, about_floats) in FAULTS.items()
        for dtype, (_, _, exponent_bits) in DTYPES.items()
        if exponent_bits is not None or not about_floats
    ]


def inject(
    make_digest: Callable[[], Digest], fault: str, dtype: str, num_injections: int
) -> tuple[int, int]:
    """How many faults changed a byte (`num_injections`), and how many of them went unnoticed.

    `make_digest` is called once for every tensor. A draw that changes no byte is drawn again.
    """
    run, min_rows, min_elements, _ = FAULTS[fault]
    cases = [
        (case, make_digest())
        for case in _cases(dtype)
        if len(case.elements) >= min_rows and case.elements.size >= min_elements
    ]
    num_changed = num_missed = 0
    for attempt in range(4 * num_injections):
        if num_changed == num_injections:
            break
        case, digest = cases[attempt % len(cases)]
        case.refill()
        steps = run(case)
        next(steps)
        clean_bytes, clean = case.elements.tobytes(), digest(case.tensor)
        next(steps, None)
        if case.elements.tobytes() != clean_bytes:
            num_changed += 1
            num_missed += digest(case.tensor) == clean
    return num_changed, num_missed


def table(found: dict[tuple[str, str], tuple[int, int]]) -> str:
    """Misses/injections, classes by dtypes."""
    lines = [f"{'':22}" + "".join(f"{dtype:>15}" for dtype in DTYPES)]
    for fault in FAULTS:
        row = [found.get((fault, dtype)) for dtype in DTYPES]
        entries = ["-" if cell is None else f"{cell[1]}/{cell[0]}" for cell in row]
        lines.append(f"{fault:22}" + "".join(f"{entry:>15}" for entry in entries))
    return "\n".join(lines)


def _cases(dtype: str) -> list[Case]:
    """Contiguous tensors of odd sizes, a transposed one and one with gaps."""
    torch_dtype, integer, exponent_bits = DTYPES[dtype]
    numpy_draw = np.random.default_rng(20)
    limit = 1 << (8 * np.dtype(integer).itemsize)
    arrays = [np.zeros(shape, integer) for shape in SHAPES]
    arrays += [np.zeros((19, 17), integer).T, np.zeros((12, 30), integer)[:, ::3]]
    fresh = numpy_draw.integers(0, limit, 65536, dtype=integer)
    return [
        Case(
            tensor=torch.from_numpy(array).view(torch_dtype),
            elements=array,
            exponent_bits=exponent_bits,
            fresh=fresh,
            draw=random.Random(21 + index),
            numpy_draw=numpy_draw,
        )
        for index, array in enumerate(arrays)
    ]
