"""Where and how two copies of a tensor differ."""

from __future__ import annotations

import torch
from torch import Tensor

from trl_sync.audit.findings import Difference

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare_with_reference(
    tensor: Tensor, reference: Tensor, rank: int, reference_rank: int
) -> Difference | None:
    """How `tensor` of `rank` differs from `reference`, of the same shape and type; None if equal.

    Compared are bit patterns: equal NaNs are equal, 0.0 and -0.0 are not.
    """
    shape = tensor.shape
    tensor, reference = _flat(tensor), _flat(reference)
    different = _bits(tensor) != _bits(reference)
    size = tensor.element_size()
    if different.shape[0] != tensor.shape[0]:  # complex128: two words an element
        different = different.view(tensor.shape[0], -1).any(dim=1)
    if not bool(different.any()):
        return None
    first = different.nonzero()[0, 0]
    index = tuple(int(axis) for axis in torch.unravel_index(first, shape))
    return Difference(
        rank=rank,
        reference_rank=reference_rank,
        index=index,
        bits=_hex(tensor[first].view(1), size),
        reference_bits=_hex(reference[first].view(1), size),
        num_different=int(different.sum()),
        num_elements=tensor.shape[0],
        max_abs_difference=_max_abs_difference(tensor, reference),
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
    epsilon = torch.finfo(tensor.dtype).eps
    smallest = torch.finfo(tensor.dtype).tiny
    # What is below the normal range has lost digits and says nothing about a factor.
    known_mask = reference.double().abs() > smallest
    tensor, reference = tensor.double()[known_mask], reference.double()[known_mask]
    if tensor.numel() < 2 or not bool(
        torch.isfinite(tensor).all() & torch.isfinite(reference).all()
    ):
        return None
    factor = float((tensor / reference).median())
    if factor in (0.0, 1.0):
        return None
    error = (tensor - factor * reference).abs()
    allowed = 4 * epsilon * tensor.abs() + smallest
    return factor if bool((error <= allowed).all()) else None


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
