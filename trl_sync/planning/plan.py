"""Memory per GPU of one run of PPO, phase by phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trl_sync.planning import formulas
from trl_sync.planning.architecture import Architecture
from trl_sync.planning.engines import (
    ZERO3_PERSISTENT,
    TrainedBytes,
    gathered_in_update,
    trained_bytes,
)
from trl_sync.planning.formulas import FP32, Quantization, WeightBytes
from trl_sync.planning.options import PlanOptions

Lines = Mapping[str, int]
# What a GPU needs besides: the driver's context, NCCL, and the allocator's fragments. An allowance.
RESERVE_SHARE = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes per GPU by what needs them. What is in `static` stays; phases add to it.

    `loading` is a sum of its own: what a GPU holds while the models are loaded, before an engine
    has divided them.
    """

    options: PlanOptions
    static: Lines
    loading: Lines
    generation: Lines
    scoring: Lines
    update: Lines

    @property
    def static_bytes(self) -> int:
        return sum(self.static.values())

    @property
    def loading_bytes(self) -> int:
        return sum(self.loading.values())

    @property
    def rollout_peak_bytes(self) -> int:
        """The most that generating and scoring need."""
        added = max(sum(self.generation.values()), sum(self.scoring.values()))
        return self.static_bytes + added

    @property
    def update_peak_bytes(self) -> int:
        return self.static_bytes + sum(self.update.values())

    @property
    def peak_bytes(self) -> int:
        return max(self.loading_bytes, self.rollout_peak_bytes, self.update_peak_bytes)

    def fits(self, gpu_bytes: float) -> bool:
        """Whether a GPU of that size holds the peak and leaves the reserve."""
        return self.peak_bytes <= gpu_bytes * (1 - RESERVE_SHARE)


def make_plan(options: PlanOptions) -> MemoryPlan:
    """The plan; all of it follows from `options`."""
    models = _Models.of(options)
    engine, shards = options.resolved_engine, options.shards
    trained = trained_bytes(engine, models.num_trained, shards, options.element_bytes)
    reward = _reward_weights(options)
    return MemoryPlan(
        options=options,
        static=_static(options, models, trained, reward),
        loading=_loading(options, models, reward),
        generation=_generation(options, models),
        scoring=_scoring(options, models),
        update=_update(options, models, trained),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Models:
    """What the module that an engine wraps consists of.

    `frozen`: the base that roles share, or with separate models the reference. `num_trained`
    parameters train; `num_small` of them lie in tensors that ZeRO-3 leaves whole.
    """

    frozen: WeightBytes
    num_trained: int
    num_small: int

    @classmethod
    def of(cls, options: PlanOptions) -> _Models:
        model = options.model
        frozen = formulas.weight_bytes(model, options.base_quantization, options.element_bytes)
        small = sum(size for size in model.small if size <= ZERO3_PERSISTENT)
        if options.separate:
            value = model.parameters - model.head + model.hidden
            return cls(frozen=frozen, num_trained=model.parameters + value, num_small=2 * small)
        adapters = 2 * formulas.lora_parameters(model.linears, options.rank)
        factors = formulas.small_lora_parameters(model.linears, options.rank, ZERO3_PERSISTENT)
        head = model.hidden + 1  # the value head with its bias
        return cls(frozen=frozen, num_trained=adapters + head, num_small=2 * factors + head)


def _static(
    options: PlanOptions, models: _Models, trained: TrainedBytes, reward: Lines
) -> dict[str, int]:
    frozen, engine = models.frozen, options.resolved_engine
    linear, dense = _local(options, frozen.linear), _local(options, frozen.dense)
    if engine.name == "zero3" and options.base_quantization == "8bit":
        linear += frozen.linear  # the layers keep a second reference to the whole of it
    who = "reference" if options.separate else "base"
    what = "models" if options.separate else "adapters, value head"
    lines = {f"{who}: linear layers": linear, f"{who}: embeddings, head, norms": dense}
    if frozen.state:
        lines[f"{who}: quantization state"] = frozen.state
    lines |= {
        f"trained {what}: weights": trained.weights,
        f"trained {what}: gradients": trained.gradients,
        f"trained {what}: AdamW": trained.optimizer,
    }
    if engine.name == "ddp":
        lines["DDP's buckets"] = trained.buffers
    if engine.name == "zero3":
        # Frozen norms stay whole too, beside their shards.
        small = sum(size for size in options.model.small if size <= ZERO3_PERSISTENT)
        lines["DeepSpeed's reduction bucket"] = trained.buffers
        lines["parameters that ZeRO-3 keeps whole"] = options.element_bytes * (
            small + models.num_small
        )
    return lines | dict(reward)


def _local(options: PlanOptions, size: int) -> int:
    divided = options.resolved_engine.shards_parameters
    return math.ceil(size / options.shards) if divided else size


def _reward_weights(options: PlanOptions) -> dict[str, int]:
    if isinstance(options.reward, Architecture):
        quantization: Quantization = "nf4" if options.reward_in_4bit else "none"
        found = formulas.weight_bytes(options.reward, quantization, 2, classifier=True)
        return {"reward model": found.total}
    if options.reward == "adapter":
        size = formulas.lora_parameters(options.model.linears, options.rank)
        return {"reward adapter": _local(options, (size + options.model.hidden) * FP32)}
    return {}


def _loading(options: PlanOptions, models: _Models, reward: Lines) -> dict[str, int]:
    """A quantized base comes to the GPU whole; any other one in host memory, to be divided."""
    whole = options.base_quantization != "none"
    frozen = models.frozen
    base = frozen.total if whole else _local(options, frozen.total)
    adapters = models.num_trained * FP32
    return {"frozen": base, "trained": adapters if whole else _local(options, adapters)} | dict(
        reward
    )


def _gathered_in_rollout(options: PlanOptions, models: _Models) -> int:
    """Generating needs every layer at every token, so all weights are gathered once a rollout."""
    if not options.resolved_engine.shards_parameters:
        return 0
    gathered = models.frozen.dense + models.num_trained * options.element_bytes
    is_whole = options.base_quantization == "8bit"  # and stands in static memory
    return gathered if is_whole else gathered + models.frozen.linear


def _gathered_layers(options: PlanOptions, models: _Models) -> int:
    model, element_bytes = options.model, options.element_bytes
    quantization = options.base_quantization
    if quantization == "8bit":
        return _gathered_in_rollout(options, models)  # little else than what is outside layers
    if options.separate:
        copies, trained = 3, 0  # whose parameters are those of the architecture
    else:
        copies, trained = 1, models.num_trained
    packed = 2 if quantization == "nf4" else 1
    adapters = trained // model.num_layers * element_bytes
    return gathered_in_update(
        options.resolved_engine,
        layer=formulas.layer_bytes(model, quantization, element_bytes) + adapters,
        outside_layers=copies * (model.embedding + model.head) * element_bytes,
        num_layers=copies * model.num_layers,
        elements=copies * (model.linear_parameters // packed + model.dense_parameters) + trained,
    )


def _generation(options: PlanOptions, models: _Models) -> dict[str, int]:
    model, rows, element_bytes = options.model, options.rollout_batch, options.element_bytes
    prefill = formulas.layer_transient_bytes(model, element_bytes) * rows * options.prompt_tokens
    return _without_zeros(
        {
            "gathered weights": _gathered_in_rollout(options, models),
            "KV cache": formulas.kv_cache_bytes(model, rows * options.tokens, element_bytes),
            "prompts' pass": prefill,
            "sampling": formulas.sampling_bytes(model, rows, element_bytes),
            "one weight unpacked": _unpacked(options),
        }
    )


def _scoring(options: PlanOptions, models: _Models) -> dict[str, int]:
    """Policy, reference, value model (and reward adapter) in one pass; separate ones in turn.

    All that share a pass are together at most a rollout batch of rows.
    """
    model, element_bytes = options.model, options.element_bytes
    roles = 1 if options.separate else 3 + (options.reward == "adapter")
    rows = max(1, options.rollout_batch // roles)
    transient = formulas.layer_transient_bytes(model, element_bytes) * rows * roles * options.tokens
    if isinstance(options.reward, Architecture):
        # It scores after the others have, a whole rollout batch at once.
        tokens = options.rollout_batch * options.tokens
        transient = max(transient, formulas.layer_transient_bytes(options.reward, 2) * tokens)
    return _without_zeros(
        {
            "gathered weights": _gathered_in_rollout(options, models),
            "pass without gradients": transient,
            "logits": _logits(options, rows),
            "one weight unpacked": _unpacked(options),
        }
    )


def _update(options: PlanOptions, models: _Models, trained: TrainedBytes) -> dict[str, int]:
    model, element_bytes = options.model, options.element_bytes
    engine = options.resolved_engine
    response = options.batch * options.response_tokens
    stacked = 2 * options.batch * options.tokens  # policy and value model
    layer = stacked * formulas.layer_activation_bytes(
        model,
        element_bytes,
        lora_rank=None if options.separate else options.rank,
        lora_dropout=options.has_dropout,
    )
    inputs = stacked * model.hidden * element_bytes * model.num_layers
    lines = {
        "gathered weights": _gathered_layers(options, models),
        "inputs of checkpointed layers": inputs if options.gradient_checkpointing else 0,
        "activations": layer * (1 if options.gradient_checkpointing else model.num_layers),
        "hidden states of the heads": formulas.head_activation_bytes(
            model, stacked, response, element_bytes
        ),
        "logits": _logits(options, options.batch),
        "one weight unpacked": _unpacked(options),
    }
    if engine.name in ("none", "ddp") and options.dtype == "bf16":
        lines["trained weights in bf16 (autocast)"] = models.num_trained * element_bytes
    if engine.name in ("zero1", "zero2"):
        lines["DeepSpeed's reduction bucket"] = trained.buffers
    if engine.is_deepspeed and options.dtype == "bf16":
        lines["gradients in fp32 for the step"] = math.ceil(
            models.num_trained * FP32 / options.shards
        )
    return _without_zeros(lines)


def _logits(options: PlanOptions, rows: int) -> int:
    return formulas.logits_bytes(
        options.model,
        rows * options.response_tokens,
        options.element_bytes,
        options.logprob_chunk_bytes,
    )


def _unpacked(options: PlanOptions) -> int:
    return formulas.dequantized_bytes(
        options.model, options.base_quantization, options.element_bytes
    )


def _without_zeros(lines: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in lines.items() if size}
