"""Updates added in place equal those that are written out, in their values and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trl_sync.backbone.low_rank import LowRank, add_low_rank

ROWS, TOKENS, INPUTS, OUTPUTS, RANK = 6, 5, 7, 4, 2
# Which of three slices of two rows have an update.
CHOICES = [(True, True, True), (True, False, True), (False, False, True)]


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[LowRank]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    updates = [
        LowRank(down=draw(RANK, INPUTS), up=draw(OUTPUTS, RANK), scaling=0.5 + number)
        for number in range(3)
    ]
    return draw(OUTPUTS, INPUTS), draw(ROWS, TOKENS, INPUTS), updates


def written_out(output: Tensor, source: Tensor, updates: list[LowRank | None]) -> Tensor:
    slices = zip(updates, source.chunk(len(updates)), output.chunk(len(updates)), strict=True)
    return torch.cat(
        [
            base if update is None else base + x @ (update.scaling * update.up @ update.down).T
            for update, x, base in slices
        ]
    )


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_update_written_out(
    chosen: tuple[bool, ...], bias: bool
) -> None:
    """In double precision; with a bias the layer returns a view, which must not be changed."""
    found, expected = [], []
    for results, function in ((found, add_low_rank), (expected, written_out)):
        base, source, updates = tensors(0)
        kept = [update if wanted else None for update, wanted in zip(updates, chosen, strict=True)]
        leaves = [source, *(w for u in kept if u is not None for w in (u.down, u.up))]
        for leaf in leaves:
            leaf.requires_grad_()
        shift = torch.ones(OUTPUTS, dtype=torch.float64) if bias else None
        # The source goes through something first and is used twice, as a normed state is.
        inner = source * 2
        output = torch.nn.functional.linear(inner, base, shift)
        result = function(output, inner, kept) + inner[..., :OUTPUTS]
        weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result)
        gradients = torch.autograd.grad((result * weights).sum(), leaves)
        results.extend([result.detach(), *gradients])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # fp64


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_without_gradients_the_output_itself_is_changed(chosen: tuple[bool, ...]) -> None:
    base, source, updates = tensors(1)
    kept = [update if wanted else None for update, wanted in zip(updates, chosen, strict=True)]
    with torch.no_grad():
        output = source @ base.T
        expected = written_out(output.clone(), source, kept)
        result = add_low_rank(output, source, kept)
    assert result.data_ptr() == output.data_ptr()
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)  # fp64


def test_frozen_updates_pass_the_gradient_to_the_source_alone() -> None:
    base, source, updates = tensors(2)
    source.requires_grad_()
    add_low_rank(source @ base.T, source, updates).sum().backward()
    assert source.grad is not None
    assert all(u.down.grad is None and u.up.grad is None for u in updates)


def test_a_source_that_needs_no_gradient_gets_none() -> None:
    base, source, updates = tensors(3)
    for update in updates:
        update.up.requires_grad_()
    add_low_rank(source @ base.T, source, updates).sum().backward()
    assert source.grad is None
    assert all(u.up.grad is not None and u.down.grad is None for u in updates)


def test_a_coarser_output_takes_the_update_of_finer_weights() -> None:
    """A base that computes in bf16 below adapters in fp32."""
    base, source, updates = tensors(4, torch.float32)
    for update in updates:
        update.down.requires_grad_()
    exact = written_out((source @ base.T), source, updates)
    result = add_low_rank((source @ base.T).bfloat16(), source, updates)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), exact, rtol=2e-2, atol=2e-2)  # bf16, two digits
    result.sum().backward()
    assert all(u.down.grad is not None and u.down.grad.dtype == torch.float32 for u in updates)


def test_an_output_that_is_not_contiguous_stays_as_it_is() -> None:
    base, source, updates = tensors(5)
    output = (source @ base.T).transpose(0, 1).contiguous().transpose(0, 1)
    before = output.clone()
    expected = written_out(output, source, updates)
    torch.testing.assert_close(
        add_low_rank(output, source, updates), expected, rtol=1e-12, atol=1e-12
    )  # fp64
    assert torch.equal(output, before)


def test_the_gradient_of_a_source_that_is_not_contiguous() -> None:
    base, source, updates = tensors(6)
    source = source.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    (expected,) = torch.autograd.grad(written_out(source @ base.T, source, updates).sum(), source)
    (found,) = torch.autograd.grad(add_low_rank(source @ base.T, source, updates).sum(), source)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # fp64
