"""What is to be planned: a model, an engine and the sizes of a run, checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

from trl_sync.backbone.logprob import CHUNK_BYTES
from trl_sync.errors import ConfigError
from trl_sync.planning.architecture import Architecture
from trl_sync.planning.engines import ENGINES, Engine
from trl_sync.planning.formulas import Quantization

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
DEFAULT_GPUS = 8
DEFAULT_RANK = 16
# That of the recipes (TRL's ModelConfig).
DEFAULT_DROPOUT = 0.05
# Of the replicas of HSDP, where nothing else is said.
DEFAULT_REPLICAS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """One run of PPO. Sizes are per GPU; those of batches are sequences.

    `num_shards` GPUs share one copy under HSDP, and there are `num_gpus / num_shards` copies; the
    other engines that divide anything do so among all GPUs. `batch` is a micro-batch of training,
    `rollout_batch` what one GPU generates or scores at once. With `separate` policy and value
    model are whole models that train, and the reference a third one. `reward` is a function (no
    memory), an adapter on the shared base, or a model of its own, which no engine divides.

    None stands for what depends on the others: `num_gpus` 1 without an engine, else 8; `num_shards`
    half of the GPUs; `quantization` nf4, none with `separate`; `lora_rank` 16, `lora_dropout` 0.05.

    Raises:
        ConfigError: what the package or the engine refuses, or a size that is not positive.
    """

    model: Architecture
    engine: str = "none"
    num_gpus: int | None = None
    num_shards: int | None = None
    batch: int = 8
    rollout_batch: int = 64
    prompt_tokens: int = 512
    response_tokens: int = 53
    lora_rank: int | None = None
    lora_dropout: float | None = None
    quantization: str | None = None
    dtype: str = "bf16"
    reward: str | Architecture = "function"
    reward_in_4bit: bool = False
    separate: bool = False
    gradient_checkpointing: bool = True
    logprob_chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        _check_names(self)
        _check_engine(self)
        if self.separate:
            _check_separate(self)
        elif not self.model.knows_head:
            raise ConfigError(
                f"A model of type {self.model.model_type!r} cannot be a shared base: its LM head "
                "is not known (docs/loop.md). Plan for models of their own with --separate."
            )

    @property
    def resolved_engine(self) -> Engine:
        return ENGINES[self.engine]

    @property
    def gpus(self) -> int:
        if self.num_gpus is not None:
            return self.num_gpus
        return 1 if self.engine == "none" else DEFAULT_GPUS

    @property
    def shards(self) -> int:
        """The number of GPUs among which an engine divides what it divides."""
        if self.engine == "hsdp":
            return self.num_shards or self.gpus // DEFAULT_REPLICAS
        return self.gpus

    @property
    def base_quantization(self) -> Quantization:
        if self.quantization is not None:
            return cast(Quantization, self.quantization)
        return "none" if self.separate else "nf4"

    @property
    def rank(self) -> int:
        return DEFAULT_RANK if self.lora_rank is None else self.lora_rank

    @property
    def has_dropout(self) -> bool:
        dropout = DEFAULT_DROPOUT if self.lora_dropout is None else self.lora_dropout
        return dropout > 0

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        """The tokens of one sequence."""
        return self.prompt_tokens + self.response_tokens


def _check_names(options: PlanOptions) -> None:
    known = {
        "engine": tuple(ENGINES),
        "quantization": (None, "nf4", "8bit", "none"),
        "dtype": tuple(DTYPE_BYTES),
    }
    if isinstance(options.reward, str):
        known["reward"] = ("function", "adapter")
    for name, values in known.items():
        found = getattr(options, name)
        if found not in values:
            expected = ", ".join(str(value) for value in values if value is not None)
            raise ConfigError(f"--{name} {found} is not known; expected one of {expected}.")
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"{field.name}={value}: expected a positive number.")
    if options.lora_dropout is not None and not 0 <= options.lora_dropout < 1:
        raise ConfigError(f"lora_dropout={options.lora_dropout}: expected 0, or a share below 1.")


def _check_engine(options: PlanOptions) -> None:
    engine, gpus = options.resolved_engine, options.gpus
    if engine.name == "none" and gpus > 1:
        raise ConfigError(f"--engine none runs on one GPU, not on {gpus}: choose an engine.")
    if engine.name != "none" and gpus < 2:
        raise ConfigError(f"--engine {engine.name} needs at least 2 GPUs, not {gpus}.")
    if engine.name != "hsdp" and options.num_shards is not None:
        raise ConfigError(
            f"--shards is for --engine hsdp; {engine.name} divides among all GPUs or not at all."
        )
    if engine.name == "hsdp" and (
        gpus % options.shards or options.shards < 2 or gpus // options.shards < 2
    ):
        raise ConfigError(
            f"--engine hsdp with {gpus} GPUs and {options.shards} shards: expected at least 2 "
            "copies of at least 2 shards each, and a number of GPUs that the shards divide."
        )
    if engine.four_bit_only and options.base_quantization != "nf4":
        raise ConfigError(
            f"--engine {engine.name} is for a 4-bit base, but the quantization is "
            f"{options.base_quantization}: choose fsdp2."
        )
    if engine.is_fsdp and options.base_quantization == "8bit":
        raise ConfigError(
            f"--engine {engine.name} cannot divide an 8-bit base: its scales are tied to whole "
            "weights. Choose --quantization nf4 or none."
        )


def _check_separate(options: PlanOptions) -> None:
    refused = {
        "--quantization": options.base_quantization != "none",
        "--lora-rank": options.lora_rank is not None,
        "--lora-dropout": options.lora_dropout is not None,
        "--reward adapter": options.reward == "adapter",
    }
    for name, given in refused.items():
        if given:
            raise ConfigError(
                f"{name} does not go with --separate, which plans for whole models that train: "
                "leave one of them out."
            )
