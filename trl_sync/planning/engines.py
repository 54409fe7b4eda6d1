"""What an engine divides among its ranks, and what it holds besides.

Sources: Rajbhandari et al. 2019 (ZeRO), sections 5 and 6; DeepSpeed 0.19 (`runtime/zero`), torch
2.13 (`nn.parallel.distributed`, `distributed.fsdp`), accelerate 1.15 (`utils/fsdp_utils.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trl_sync.planning.formulas import ADAM_BYTES, FP32

# DeepSpeed's defaults, which accelerate's launcher leaves as they are, in elements.
ZERO_BUCKET = 500_000_000
ZERO3_MAX_LIVE = 1_000_000_000
ZERO3_PREFETCH = 50_000_000
ZERO3_PERSISTENT = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Which parts of the state are divided among the ranks that share one copy.

    `casts_weights`: DeepSpeed turns the weights it trains into bf16 and keeps a copy in fp32.
    `four_bit_only`: the config is meant for a 4-bit base.
    """

    name: str
    shards_optimizer: bool = False
    shards_gradients: bool = False
    shards_parameters: bool = False
    casts_weights: bool = False
    four_bit_only: bool = False

    @property
    def is_deepspeed(self) -> bool:
        return self.name.startswith("zero")

    @property
    def is_fsdp(self) -> bool:
        return self.shards_parameters and not self.is_deepspeed


def _fully_sharded(name: str, *, four_bit_only: bool = False) -> Engine:
    return Engine(
        name=name,
        shards_optimizer=True,
        shards_gradients=True,
        shards_parameters=True,
        four_bit_only=four_bit_only,
    )


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(name="none"),
        Engine(name="ddp"),
        Engine(name="zero1", shards_optimizer=True, casts_weights=True),
        Engine(name="zero2", shards_optimizer=True, shards_gradients=True, casts_weights=True),
        Engine(
            name="zero3",
            shards_optimizer=True,
            shards_gradients=True,
            shards_parameters=True,
            casts_weights=True,
        ),
        _fully_sharded("fsdp2"),
        _fully_sharded("fsdp2_qlora", four_bit_only=True),
        _fully_sharded("hsdp"),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedBytes:
    """What one rank holds for the parameters that train."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int


def trained_bytes(
    engine: Engine, num_parameters: int, num_shards: int, element_bytes: int
) -> TrainedBytes:
    """Weights, gradients and AdamW of `num_parameters` on one rank.

    Without DeepSpeed all of it is fp32: 4 + 4 + 8 bytes a parameter. DeepSpeed holds weights and
    gradients in the compute dtype and adds a copy of the weights in fp32 to the optimizer's state,
    in fp32 runs too. `buffers`: DDP's buckets are a second copy of the gradients; DeepSpeed
    allocates its whole reduction bucket, however few parameters train.
    """

    def share(size: int, divided: bool) -> int:
        return math.ceil(size / num_shards) if divided else size

    held = element_bytes if engine.casts_weights else FP32
    master = FP32 if engine.casts_weights else 0
    buffers = 0
    if engine.is_deepspeed:
        buffers = ZERO_BUCKET * held
    elif engine.name == "ddp":
        buffers = num_parameters * FP32
    return TrainedBytes(
        weights=share(num_parameters * held, engine.shards_parameters),
        gradients=share(num_parameters * held, engine.shards_gradients),
        optimizer=share(num_parameters * (master + ADAM_BYTES), engine.shards_optimizer),
        buffers=buffers,
    )


def gathered_in_update(
    engine: Engine, *, layer: int, outside_layers: int, num_layers: int, elements: int
) -> int:
    """Bytes of parameters that a rank holds whole at once while it trains.

    FSDP2 gathers what stands outside the decoder layers for the whole pass, and the next layer
    while one computes. ZeRO-3 keeps what it will use again within its limit of live elements:
    `elements` is the number it counts, in which packed 4-bit weights are half as many.
    """
    if not engine.shards_parameters:
        return 0
    whole = outside_layers + layer * num_layers
    if engine.is_fsdp:
        return min(whole, outside_layers + 2 * layer)
    limit = ZERO3_MAX_LIVE + ZERO3_PREFETCH
    return whole if elements <= limit else math.ceil(whole * limit / elements)
