"""Counts -> bytes. Every formula of the plan stands here, with its source; all are pure.

`element_bytes` is 2 for bf16 (computing under autocast) and 4 for fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trl_sync.backbone.logprob import CHUNK_BYTES
from trl_sync.planning.architecture import Architecture, Linear

Quantization = Literal["nf4", "8bit", "none"]

FP32 = 4
# bitsandbytes 0.50: one scale for 64 weights, itself quantized to a byte, whose own scale (fp32)
# stands for 256 of them. 4 + 8/64 + 32/(64 x 256) = 4.127 bits a weight.
NF4_BLOCK = 64
NF4_NESTED_BLOCK = 256
# AdamW keeps two moments in fp32 for each parameter.
ADAM_BYTES = 2 * FP32


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """The bytes of a frozen model, by what engines can do with them.

    `linear`: linear layers, packed if quantized. `dense`: embeddings, LM head, norms. `state`: what
    turns packed weights into numbers; it is neither parameter nor buffer, so no engine divides it.
    """

    linear: int
    dense: int
    state: int

    @property
    def total(self) -> int:
        return self.linear + self.dense + self.state


def weight_bytes(
    architecture: Architecture,
    quantization: Quantization,
    element_bytes: int,
    *,
    classifier: bool = False,
) -> WeightBytes:
    """A whole model; as a `classifier` it has a row of weights in place of the LM head."""
    dense = architecture.dense_parameters
    if classifier:
        dense += architecture.hidden - architecture.head
    linear, state = linear_bytes(architecture.linears, quantization, element_bytes)
    return WeightBytes(linear=linear, dense=dense * element_bytes, state=state)


def layer_bytes(architecture: Architecture, quantization: Quantization, element_bytes: int) -> int:
    """The parameters of the largest decoder layer, without quantization state."""
    linear, _ = linear_bytes(architecture.layer_linears, quantization, element_bytes)
    return linear + architecture.layer_small_parameters * element_bytes


def linear_bytes(
    linears: Sequence[Linear], quantization: Quantization, element_bytes: int
) -> tuple[int, int]:
    """The weights of linear layers, and their quantization state."""
    if quantization == "none":
        return sum(linear.size for linear in linears) * element_bytes, 0
    if quantization == "8bit":
        # LLM.int8(): one byte a weight, one fp32 scale for each output.
        return sum(x.size for x in linears), sum(x.outputs for x in linears) * FP32
    packed = sum(math.ceil(x.size / 2) for x in linears)
    return packed, sum(_nf4_state_bytes(linear.size) for linear in linears)


def _nf4_state_bytes(size: int) -> int:
    blocks = math.ceil(size / NF4_BLOCK)
    return blocks + math.ceil(blocks / NF4_NESTED_BLOCK) * FP32


def lora_parameters(linears: Sequence[Linear], rank: int) -> int:
    """One adapter: for each layer A (rank x inputs) and B (outputs x rank). Hu et al. 2021."""
    return sum(rank * (linear.inputs + linear.outputs) for linear in linears)


def small_lora_parameters(linears: Sequence[Linear], rank: int, most: int) -> int:
    """Of one adapter, what lies in factors of at most `most` elements."""
    factors = [rank * size for linear in linears for size in (linear.inputs, linear.outputs)]
    return sum(factor for factor in factors if factor <= most)


def kv_cache_bytes(architecture: Architecture, num_tokens: int, element_bytes: int) -> int:
    """Keys and values of all layers for `num_tokens`; a sliding window would need less."""
    per_token = 2 * architecture.num_layers * architecture.key_value_size
    return per_token * num_tokens * element_bytes


def layer_activation_bytes(
    architecture: Architecture,
    element_bytes: int,
    *,
    lora_rank: int | None,
    lora_dropout: bool = False,
    dropout_mask_bytes: int = 1,
) -> int:
    """What one decoder layer keeps for its backward pass, per token.

    Counted from the operations of transformers' Llama: two norms keep their input in fp32;
    attention its queries, keys and values (repeated for grouped heads), and output; the
    feed-forward block its pre-activations; each adapted layer its input once (layers that read the
    same tensor share it, dropout gives each its own and a mask, of one byte an element on a GPU)
    and its low-rank product. Without `lora_rank` the layer itself trains, and its norms keep their
    output too.
    """
    a = architecture
    norms = 2 * FP32 * a.hidden
    attention = 4 * a.query_size * element_bytes
    feed_forward = (3 if a.is_gated else 1) * a.intermediate * element_bytes
    shared_inputs = (2 * a.hidden + a.query_size + a.intermediate) * element_bytes
    if lora_rank is None:
        trained = 2 * a.hidden * element_bytes
        return norms + attention + feed_forward + shared_inputs + trained
    low_rank = len(a.layer_linears) * lora_rank * element_bytes
    if lora_dropout:
        own_inputs = sum(x.inputs for x in a.layer_linears) * (element_bytes + dropout_mask_bytes)
        return norms + attention + feed_forward + own_inputs + low_rank
    return norms + attention + feed_forward + shared_inputs + low_rank


def layer_transient_bytes(architecture: Architecture, element_bytes: int) -> int:
    """What a layer has in memory at once in a pass that keeps nothing, per token.

    The widest moment is in the feed-forward block: its two projections and the activation of one,
    beside the residual, the norm with its output, and a copy in fp32.
    """
    a = architecture
    wide = max(3 * a.intermediate, 4 * a.query_size + 2 * a.key_value_size)
    return (wide + 4 * a.hidden) * element_bytes


def head_activation_bytes(
    architecture: Architecture, stacked_tokens: int, response_tokens: int, element_bytes: int
) -> int:
    """What the last norm and the heads keep: hidden states of all tokens, then of the response.

    The norm keeps its input in fp32; the value head reads its states in fp32.
    """
    states = stacked_tokens * architecture.hidden * (FP32 + element_bytes)
    return states + response_tokens * architecture.hidden * (FP32 + element_bytes)


def logits_bytes(
    architecture: Architecture,
    num_tokens: int,
    element_bytes: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> int:
    """The logits of one chunk with the copies that `backbone.logprob` makes of them.

    The head's output in the compute dtype; scaled in fp32; its softmax, and an eighth of that for
    the entropy.
    """
    chunk = min(num_tokens, max(1, chunk_bytes // (FP32 * architecture.vocabulary)))
    return chunk * architecture.vocabulary * (8 * element_bytes + 17 * FP32) // 8


def sampling_bytes(architecture: Architecture, num_rows: int, element_bytes: int) -> int:
    """The last token's logits of every row, and what sampling makes of them, all fp32 but one."""
    return num_rows * architecture.vocabulary * (element_bytes + 3 * FP32)


def dequantized_bytes(
    architecture: Architecture, quantization: Quantization, element_bytes: int
) -> int:
    """The largest quantized weight in the compute dtype: it is unpacked for each product."""
    if quantization == "none":
        return 0
    return max(linear.size for linear in architecture.linears) * element_bytes
