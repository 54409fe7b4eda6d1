"""Where and how two copies of a tensor differ."""

from __future__ import annotations

import torch
from torch import Tensor

from trl_sync.audit.findings import Difference

PIECE_ELEMENTS = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare_with_reference(
    tensor: Tensor, reference: Tensor, rank: int, reference_rank: int
) -> Difference | None:
    """How `tensor` of `rank` differs from `reference`, of the same shape and type; None if equal.

    Compared are bit patterns: equal NaNs are equal, 0.0 and -0.0 are not. Works in pieces: a large
    tensor is held twice, not a dozen times.
    """
    shape = tensor.shape
    tensor, reference = _flat(tensor), _flat(reference)
    num_different, first, largest = 0, -1, 0.0
    for start in range(0, tensor.shape[0], PIECE_ELEMENTS):
        own, other = (
            tensor[start : start + PIECE_ELEMENTS],
            reference[start : start + PIECE_ELEMENTS],
        )
        different_mask = _differs(own, other)
        count = int(different_mask.sum())
        if count:
            first = start + int(different_mask.nonzero()[0, 0]) if first < 0 else first
            largest = max(largest, _max_abs_difference(own, other))
            num_different += count
    if not num_different:
        return None
    index = tuple(int(axis) for axis in torch.unravel_index(torch.tensor(first), shape))
    size = tensor.element_size()
    return Difference(
        rank=rank,
        reference_rank=reference_rank,
        index=index,
        bits=_hex(tensor[first].view(1), size),
        reference_bits=_hex(reference[first].view(1), size),
        num_different=num_different,
        num_elements=tensor.shape[0],
        max_abs_difference=largest,
        factor=common_factor(tensor, reference),
    )


def common_factor(tensor: Tensor, reference: Tensor) -> float | None:
    """f if `tensor` is f times `reference` to the precision of its type, f being neither 0 nor 1.

    None for integers, for tensors with fewer than two non-zero elements, and when the zeros or the
    ratios differ. Products rounded once each may differ by one unit in the last place, and so may
    what was made of them by one more multiplication, so four units are allowed.
    """
    if not tensor.dtype.is_floating_point:
        return None
    tensor, reference = _flat(tensor), _flat(reference)
    factor, num_known = None, 0
    for start in range(0, tensor.shape[0], PIECE_ELEMENTS):
        own, other = (
            tensor[start : start + PIECE_ELEMENTS],
            reference[start : start + PIECE_ELEMENTS],
        )
        number = torch.finfo(own.dtype)
        own, other = own.double(), other.double()
        # What is below the normal range has lost digits and says nothing about a factor.
        known_mask = other.abs() > number.tiny
        own, other = own[known_mask], other[known_mask]
        if not own.numel():
            continue
        if not bool(torch.isfinite(own).all() & torch.isfinite(other).all()):
            return None
        num_known += own.numel()
        factor = float((own / other).median()) if factor is None else factor
        allowed = 4 * number.eps * own.abs() + number.tiny
        if not bool(((own - factor * other).abs() <= allowed).all()):
            return None
    return None if num_known < 2 or factor in (0.0, 1.0) else factor


def _differs(own: Tensor, other: Tensor) -> Tensor:
    different_mask = _bits(own) != _bits(other)
    if different_mask.shape[0] != own.shape[0]:  # complex128: two words an element
        different_mask = different_mask.view(own.shape[0], -1).any(dim=1)
    return different_mask


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1)


def _bits(flat: Tensor) -> Tensor:
    return flat.view(_INTEGERS.get(flat.element_size(), torch.int64))


def _hex(element: Tensor, size: int) -> str:
    return bytes(element.view(torch.uint8).tolist())[::-1].hex().zfill(2 * size)


def _max_abs_difference(tensor: Tensor, reference: Tensor) -> float:
    if tensor.dtype.is_complex:
        return float((tensor.to(torch.complex128) - reference.to(torch.complex128)).abs().max())
    difference = (tensor.double() - reference.double()).abs()
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
