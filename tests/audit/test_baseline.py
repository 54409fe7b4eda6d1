"""The rolling slice: full cover in time, changes found, pieces stable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trl_sync.audit.baseline import PIECE_BYTES, FrozenBaseline
from trl_sync.audit.findings import Scope
from trl_sync.audit.inventory import Inventory

SCOPES = (Scope.FROZEN, Scope.QUANTIZATION)


def frozen(*shapes: tuple[int, ...]) -> nn.ParameterList:
    return nn.ParameterList(
        nn.Parameter(torch.randn(shape), requires_grad=False) for shape in shapes
    )


def cover(baseline: FrozenBaseline, steps: int) -> list[str]:
    """Labels of all pieces that `steps` slices look at, and what moved."""
    seen = []
    for step in range(steps):
        part = baseline.start_next(step)
        assert part is not None
        moved = baseline.compare(part.pieces, part.pending.result())
        seen += [f"moved {piece.label}" for piece in moved] or [p.label for p in part.pieces]
    return seen


@pytest.mark.parametrize("cover_steps", [1, 2, 3, 7, 64])
def test_every_byte_within_cover_steps(cover_steps: int) -> None:
    model = frozen((3,), (700, 1000), (5, 7), (0,), (64, 64))
    inventory = Inventory(model)
    baseline = FrozenBaseline(cover_steps, SCOPES)
    baseline.cut(inventory)
    seen = cover(baseline, cover_steps)
    # 2.8 MB are three pieces of at most 1 MiB; the others are one each, the empty one too.
    expected = {"0[0:12]", "2[0:140]", "3[0:0]", "4[0:16384]"}
    expected |= {
        f"1[{s}:{min(s + PIECE_BYTES, 2_800_000)}]" for s in range(0, 2_800_000, PIECE_BYTES)
    }
    assert set(seen) == expected
    inventory.close()


def test_one_byte_anywhere_is_found_within_the_cover() -> None:
    model = frozen((40, 40), (300, 1000), (9,))
    inventory = Inventory(model)
    baseline = FrozenBaseline(4, SCOPES)
    baseline.cut(inventory)
    cover(baseline, 4)
    for name, parameter in model.named_parameters():
        for position in (0, parameter.numel() - 1):
            before = parameter.data.view(-1)[position].clone()
            parameter.data.view(-1)[position] += 1
            moved = {label for label in cover(baseline, 4) if label.startswith("moved")}
            assert len(moved) == 1
            assert moved.pop().startswith(f"moved {name}[")
            parameter.data.view(-1)[position] = before
            assert not [label for label in cover(baseline, 4) if label.startswith("moved")]
    inventory.close()


def test_a_swapped_storage_is_looked_at_where_it_is_now() -> None:
    model = frozen((16, 16))
    inventory = Inventory(model)
    baseline = FrozenBaseline(1, SCOPES)
    baseline.cut(inventory)
    cover(baseline, 2)
    model[0].data = model[0].data.clone()
    assert cover(baseline, 1) == ["0[0:1024]"]
    model[0].data = model[0].data + 1
    assert cover(baseline, 1) == ["moved 0[0:1024]"]
    inventory.close()


def test_checksums_survive_a_change_of_the_inventory() -> None:
    model = nn.ModuleDict({"base": frozen((16, 16))})
    inventory = Inventory(model)
    baseline = FrozenBaseline(1, SCOPES)
    baseline.cut(inventory)
    cover(baseline, 1)
    model["base"][0].data[0, 0] += 1
    model["late"] = frozen((4,))
    inventory.refresh()
    baseline.cut(inventory)
    assert cover(baseline, 1) == ["moved base.0[0:1024]"]
    inventory.close()


def test_accepting_makes_a_new_baseline() -> None:
    model = frozen((4,))
    inventory = Inventory(model)
    baseline = FrozenBaseline(1, SCOPES)
    baseline.cut(inventory)
    cover(baseline, 1)
    model[0].data += 1
    part = baseline.start_all(1)
    assert part is not None
    baseline.accept(part.pieces, part.pending.result())
    assert cover(baseline, 1) == ["0[0:16]"]
    inventory.close()


def test_nothing_frozen() -> None:
    inventory = Inventory(nn.Linear(2, 2))
    baseline = FrozenBaseline(8, SCOPES)
    baseline.cut(inventory)
    assert baseline.start_next(0) is None
    assert baseline.start_all(0) is None
    inventory.close()


def test_another_size_under_the_same_name_is_a_change() -> None:
    model = nn.ModuleDict({"base": frozen((16, 16), (4,)), "adapter": frozen((3,))})
    inventory = Inventory(model)
    baseline = FrozenBaseline(1, SCOPES)
    baseline.cut(inventory)
    assert baseline.reshaped == []
    model["base"][0] = nn.Parameter(torch.zeros(16, 8), requires_grad=False)
    del model["adapter"]
    model["other"] = frozen((3,))
    inventory.refresh(force=True)
    baseline.cut(inventory)
    # What only comes or goes, as a frozen adapter may, is none.
    assert [piece.label for piece in baseline.reshaped] == ["base.0[0:512]"]
    inventory.close()


def test_a_quantization_state_of_other_parts_is_a_change() -> None:
    from bitsandbytes.nn import Linear4bit

    layers = [
        Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=nested).to("cpu")
        for nested in (True, False)
    ]
    inventory = Inventory(nn.Sequential(layers[0]))
    baseline = FrozenBaseline(1, SCOPES)
    baseline.cut(inventory)
    layers[0].weight.quant_state = layers[1].weight.quant_state
    assert inventory.refresh()
    baseline.cut(inventory)
    assert [piece.scope for piece in baseline.reshaped] == [Scope.QUANTIZATION]
    inventory.close()
