"""Low-rank updates added in place to what a layer's base computed, each slice of the batch its own.

Step by step (cut the batch, two products, scale, add, join) autograd would pass four times more
often over tensors as large as the output, in both directions. Here the second product adds to the
output where it stands, and only the thin product [N, r] is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """The update `scaling * up @ down` of a weight [out, in]."""

    down: Float[Tensor, "r in"]
    up: Float[Tensor, "out r"]
    scaling: float


def add_low_rank(
    output: Float[Tensor, "B *T out"],
    source: Float[Tensor, "B *T in"],
    updates: Sequence[LowRank | None],
) -> Float[Tensor, "B *T out"]:
    """`output`, to which each of `len(updates)` equal slices of `source` has added its own update.

    `output` may be changed: nothing else may need what it held. A slice with None stays as it is.
    `source` and the weights are of one type; `output` may be of another.
    """
    if output._is_view() or not output.is_contiguous():
        # Autograd forbids changing some views; a layer with a bias, or 8-bit weights, returns one.
        output = output.clone(memory_format=torch.contiguous_format)
    chosen = tuple(
        (number, update.scaling) for number, update in enumerate(updates) if update is not None
    )
    weights = [w for update in updates if update is not None for w in (update.down, update.up)]
    if torch.is_grad_enabled():
        result: Tensor = _AddLowRank.apply(output, source, len(updates), chosen, *weights)
        return result
    _add(output, source, len(updates), chosen, weights)
    return output


def _add(
    output: Tensor,
    source: Tensor,
    num_slices: int,
    chosen: Sequence[tuple[int, float]],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Adds the updates of the `chosen` slices; returns their thin products [N, r]."""
    sources, outputs = source.chunk(num_slices), output.chunk(num_slices)
    thin_products = []
    for (number, scaling), down, up in zip(chosen, weights[::2], weights[1::2], strict=True):
        thin = _rows(sources[number]) @ down.T
        target = outputs[number].view(-1, output.shape[-1])
        if target.dtype == up.dtype:
            target.addmm_(thin, up.T, alpha=scaling)
        else:
            target.add_(thin @ up.T, alpha=scaling)
        thin_products.append(thin)
    return thin_products


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        source: Tensor,
        num_slices: int,
        chosen: tuple[tuple[int, float], ...],
        *weights: Tensor,
    ) -> Tensor:
        thin = _add(output, source, num_slices, chosen, weights)
        ctx.mark_dirty(output)
        ctx.num_slices, ctx.chosen = num_slices, chosen
        ctx.save_for_backward(source, *weights, *thin)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        source, *saved = ctx.saved_tensors
        num_updates = len(ctx.chosen)
        weights, thin_products = saved[: 2 * num_updates], saved[2 * num_updates :]
        wants_source, wants_weights = ctx.needs_input_grad[1], ctx.needs_input_grad[4:]
        whole = num_updates == ctx.num_slices
        of_source = None
        if wants_source:
            make = torch.empty_like if whole else torch.zeros_like
            of_source = make(source, memory_format=torch.contiguous_format)
        of_weights: list[Tensor | None] = []
        grads, sources = grad.chunk(ctx.num_slices), source.chunk(ctx.num_slices)
        for index, (number, scaling) in enumerate(ctx.chosen):
            down, up, thin = weights[2 * index], weights[2 * index + 1], thin_products[index]
            wants_down, wants_up = wants_weights[2 * index : 2 * index + 2]
            of_output = _rows(grads[number]).to(up.dtype)
            of_thin = (of_output @ up).mul_(scaling)
            of_weights.append(of_thin.T @ _rows(sources[number]) if wants_down else None)
            # This way round the product is long along the contiguous side.
            of_weights.append((thin.T @ of_output).mul_(scaling).T if wants_up else None)
            if of_source is not None:
                part = of_source.chunk(ctx.num_slices)[number]
                torch.mm(of_thin, down, out=part.view(-1, part.shape[-1]))
        return grad, of_source, None, None, *of_weights


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
