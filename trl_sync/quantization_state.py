"""bitsandbytes quantization state by name: neither parameters nor buffers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

# What QuantState.as_dict calls its tensors (bitsandbytes 0.50.2), without its conversions.
_FOUR_BIT = {"absmax": "absmax", "quant_map": "code", "nested_offset": "offset"}
_NESTED = {"nested_absmax": "absmax", "nested_quant_map": "code"}


def quantization_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that turn packed weights into numbers, as `<weight>.<part>`.

    4-bit weights carry `absmax`, `quant_map` and, with double quantization, `nested_absmax`,
    `nested_quant_map` and `nested_offset`; 8-bit weights carry `SCB`. None of them is in
    `named_parameters()` or `named_buffers()`, so no first broadcast reaches them either.
    """
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts = {part: getattr(state, field, None) for part, field in _FOUR_BIT.items()}
            nested = getattr(state, "state2", None)
            parts |= {part: getattr(nested, field, None) for part, field in _NESTED.items()}
            for part, value in sorted(parts.items()):
                if isinstance(value, Tensor):
                    yield f"{name}.{part}", value
        # 8-bit layers keep the row scales beside the weight, and from their first forward on ...
        scales = getattr(parameter, "SCB", None)
        if isinstance(scales, Tensor):
            yield f"{name}.SCB", scales
    for name, module in model.named_modules():
        # ... in a state of their own.
        scales = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(scales, Tensor):
            yield f"{name}.weight.SCB", scales
