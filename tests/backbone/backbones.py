"""Parts for the backbone tests: ragged batches, random adapters, and roles computed by PEFT itself.

What a role computes is found here without the code under test: PEFT's own `set_adapter` and
`disable_adapter` on a second copy of the model, one pass for each role.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Prompts padded on the left, responses padded on the right, no two rows alike."""

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def ragged_batch(vocabulary_size: int = 64, num_rows: int = 3, seed: int = 0) -> Batch:
    """Rows with 5, 4, 3, ... prompt tokens of 5, and 6, 4, 2, ... response tokens of 6."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary_size, (num_rows, 11), generator=generator)
    # The padding token of the tiny models may also be part of a text.
    ids[0, 2] = 0
    mask = torch.ones(num_rows, 11, dtype=torch.bool)
    for row in range(num_rows):
        mask[row, :row] = False
        mask[row, 11 - 2 * row :] = False
    return Batch(input_ids=ids, attention_mask=mask, response_mask=mask[:, 5:].clone())


def load(folder: str | Path, precision: str) -> PreTrainedModel:
    """The causal LM in `folder`, in fp32 or with NF4 weights that compute in fp32."""
    if precision == "fp32":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )


def lora(**changes: Any) -> LoraConfig:
    """LoRA on all attention projections of the Llama family."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION)}
    return LoraConfig(**(options | {"task_type": "CAUSAL_LM"} | changes))


def randomise_adapters(model: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Every LoRA parameter is drawn anew: as made, B is zero and the adapters do nothing.

    The draw depends on the parameter's name in the causal LM only, so an adapter gets the same
    numbers in every model that has it.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                plain = name.rpartition("base_model.model.")[2]
                generator = torch.Generator().manual_seed(zlib.crc32(plain.encode()) + seed)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def peft_model(base: PreTrainedModel, adapters: dict[str, LoraConfig], seed: int = 0) -> PeftModel:
    """`base` with random adapters of the given names, all of them trainable."""
    for module in base.modules():
        # On some CPUs bitsandbytes would repack 4-bit weights in evaluation mode and compute in
        # bf16 from then on (test_shared.py); here both sides compute in fp32.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    names = list(adapters)
    model = get_peft_model(base, adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, adapters[name])
    randomise_adapters(model, seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def each_by_peft(
    model: PeftModel, adapters: Sequence[str | None], step: Callable[[int], Tensor]
) -> list[Tensor]:
    """Per adapter, `step(index)` with that adapter as PEFT's active one, and its backward pass.

    The detached results are returned; the gradients add up in the parameters. `requires_grad` is
    as before afterwards, because `set_adapter` changes it.
    """
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    results = []
    for index, adapter in enumerate(adapters):
        if adapter is None:
            with model.disable_adapter():
                results.append(step(index).detach())
        else:
            model.set_adapter(adapter)
            result = step(index)
            result.sum().backward()
            results.append(result.detach())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    return results


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of two tensors of one name, relative to the expected norm."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected
    )


def bytes_of(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors
    }
