"""The audit under DeepSpeed and FSDP2: what it compares, what it names, and that it only looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engine_audits
import engines

pytestmark = [pytest.mark.engines, pytest.mark.ranks]

SLOW, DEEPSPEED = pytest.mark.slow, pytest.mark.deepspeed
ENGINES = [
    pytest.param("ddp", marks=SLOW),
    pytest.param("zero1", marks=[DEEPSPEED, SLOW]),
    pytest.param("zero2", marks=DEEPSPEED),
    pytest.param("zero3", marks=[DEEPSPEED, SLOW]),
    "fsdp2",
    pytest.param("hsdp", marks=SLOW),
]
# Numbers in one exchange: 11 counters and two for each of 8 slots; among replicas the latter only.
ALL, REPLICAS = 11 + 2 * 8, 2 * 8
EXCHANGES = {"hsdp": [REPLICAS, ALL]}
EDITED, FROZEN, QUANTIZED = "edited_outside_step", "frozen_changed", "quantization_changed"
DIVERGED, INIT = "optimizer_diverged", "init_mismatch"
DOWN, NORM, ABSMAX = "block.down.weight", "norm.weight", "block.base.weight.absmax"
LATE = "block.late.weight"
# fault -> cause, tensor, ranks, the ranks that hold the same shard, elements that differ.
Named = tuple[str, str | None, list[int], list[int], int | None]
EVERYWHERE: dict[str, Named] = {
    "frozen_byte": (FROZEN, NORM, [1], [], None),
    "absmax": (QUANTIZED, ABSMAX, [1], [], None),
}
# What the engine updates in parts comes from all ranks: the copies agree again after the update.
ZERO: dict[str, Named] = {
    **EVERYWHERE,
    "trainable_bit": (EDITED, DOWN, [1], [], None),
    "learning_rate": (DIVERGED, None, [0, 1], [], None),
}
FAULTS: dict[str, dict[str, Named]] = {
    "ddp": {**EVERYWHERE, "trainable_bit": (EDITED, DOWN, [1], [], 1)},
    "zero1": {"trainable_bit": ZERO["trainable_bit"], "frozen_byte": ZERO["frozen_byte"]},
    "zero2": ZERO,
    "zero3": {**ZERO, "gathered_byte": (EDITED, "head.weight (gathered)", [1], [], None)},
    "fsdp2": {
        **EVERYWHERE,
        "trainable_bit": (EDITED, DOWN, [1], [], None),
        "after_a_look": (EDITED, "head.weight", [1], [], None),
        "late_adapter": (INIT, LATE, [0, 1], [], 64 * 64),
        "late_adapter_alike": ("gradient_not_reduced", LATE, [0, 1], [], 64 * 64),
        "learning_rate": (DIVERGED, None, [0, 1], [], None),
    },
    # Ranks 0 and 2, and 1 and 3, hold the same shards.
    "hsdp": {
        **EVERYWHERE,
        "trainable_bit": (EDITED, DOWN, [1], [1, 3], 1),
        "after_a_look": (EDITED, "head.weight", [1], [1, 3], 1),
        "late_adapter": (INIT, LATE, [0, 1, 2, 3], [], 64 * 64),
        "learning_rate": (DIVERGED, DOWN, [1, 3], [1, 3], 3 * 64),
        "scaled_gradients": ("gradient_scaled_differently", DOWN, [1, 3], [1, 3], 3 * 64),
    },
}
# Five trainable tensors, three frozen ones, five of quantization state.
COMPARED: dict[str, dict[str, dict[str, int]]] = {
    "zero3": {"trainable": {"all ranks": 5, "history": 5}, "frozen": {"history": 3}},
    "fsdp2": {"trainable": {"history": 5}, "frozen": {"history": 3}},
    "hsdp": {
        "trainable": {"replicas": 5},
        "gradients": {"replicas": 5},
        "frozen": {"replicas": 3},
    },
}
UNAVAILABLE = {
    "zero1": {"gradients", "optimizer"},
    "zero2": {"gradients", "optimizer"},
    "zero3": {"gradients", "optimizer"},
    "fsdp2": {"gradients"},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_loops(engine: str, tmp_path: Path) -> None:
    faults = [*FAULTS[engine], "trainable_on_all"]
    answers = engines.run_on_engine(
        engine, engine_audits.audits, engine, faults, str(tmp_path), deadline_s=280
    )
    for answer in answers:
        check_healthy(engine, answer)
        for fault, expected in FAULTS[engine].items():
            check_named(fault, answer[fault], expected)
        # Edited on all ranks alike: a warning, also of a row of which only one rank holds a part.
        assert answer["trainable_on_all"]["cause"] is None
        assert bool(answer["repair"]) == (engine != "ddp")
    warnings = answers[0]["trainable_on_all"]["warnings"]
    assert [EDITED in text for text in warnings] == [True]
    assert "1 more tensor(s)" in warnings[0]
    check_first_line(engine, answers[0]["healthy"]["scopes"])


def check_healthy(engine: str, answer: dict[str, Any]) -> None:
    healthy = answer["healthy"]
    # At the start, after each of five updates, by hand in between, and at the end.
    assert (healthy["audits"], healthy["desyncs"]) == (1 + 5 + 1 + 1, 0)
    audited = [EXCHANGES.get(engine, [ALL])] * 5
    assert healthy["exchanges"] == [*audited, []]
    assert healthy["events"] in ([], ["begin", *["audit"] * 8, "end"])
    assert healthy["checksum"] == answer["without"]


def check_named(fault: str, found: dict[str, Any], expected: Named) -> None:
    cause, tensor, ranks, replicas, elements = expected
    assert found.pop("warnings") == [], fault
    assert found == {
        "cause": cause,
        "tensor": tensor,
        "ranks": ranks,
        "step": engine_audits.FAULT_STEP + 1,
        "replicas": replicas,
        "elements": elements,
        "others": 0,
    }, fault


def check_first_line(engine: str, scopes: dict[str, Any]) -> None:
    compared = {
        name: line["compared_with"] for name, line in scopes.items() if "compared_with" in line
    }
    assert compared == COMPARED.get(engine, {})
    missing = {name for name, line in scopes.items() if line["status"] == "unavailable"}
    assert missing == UNAVAILABLE.get(engine, set())
    assert all(scopes[name]["reason"] for name in missing)
    in_part = {name for name, line in scopes.items() if "not_compared" in line}
    expected = {"fsdp2": {"optimizer"}}.get(engine, set())
    assert in_part == ({"roles"} if engine.startswith("zero") else expected)
    assert (scopes["quantization"]["tensors"], scopes["frozen"]["tensors"]) == (5, 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_ppo(engine: str, tmp_path: Path) -> None:
    answers = engines.run_on_engine(
        engine, engine_audits.ppo, engine, str(tmp_path), deadline_s=280
    )
    for answer in answers:
        assert answer["with"] == answer["without"]
        # At the start, after each update, and at the end.
        assert (answer["audits"], answer["desyncs"]) == (1 + 4 + 1, 0)
        assert answer["found"] == {
            "cause": EDITED,
            "tensor": engine_audits.PPO_TENSOR,
            "role": "policy",
            "ranks": [1],
            "step": engine_audits.FAULT_STEP + 1,
        }
