"""Parameters that have gradients and a learning rate and still do not move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor

from trl_sync.audit.sharding import local_tensor

# Updates in a row: one may be lost to rounding, an overflow or a clipped outlier.
UPDATES = 3
# Adam divides by |g| + 1e-8: far above that its update is about the learning rate.
CLEAR_GRADIENT = 1e-6
PIECE = 1 << 15


class Motion(Enum):
    """What the coming update should do to a parameter."""

    NOTHING = 0
    UNDERFLOW = 1
    MOVE = 2


class Liveness:
    """Counts, for each trainable parameter, the updates that should have moved it and did not."""

    def __init__(self) -> None:
        self._suspects: set[str] = set()
        self._counts: dict[Motion, dict[str, int]] = {Motion.MOVE: {}, Motion.UNDERFLOW: {}}

    def expect(
        self,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        learning_rates: Callable[[], Mapping[int, float]],
    ) -> dict[str, Motion]:
        """What the coming update should do to the suspects; ask when gradients are final.

        A parameter that the optimizer does not hold itself has no rate: the largest one counts.
        """
        if not self._suspects:
            return {}
        rates = learning_rates()
        largest = max(rates.values(), default=0.0)
        return {
            name: expected_motion(parameter, rates.get(id(parameter), largest))
            for name, parameter in zip(names, parameters, strict=True)
            if name in self._suspects
        }

    def observe(
        self, names: Sequence[str], unmoved: frozenset[str], expected: Mapping[str, Motion]
    ) -> tuple[list[str], list[str]]:
        """Who stood still for `UPDATES` updates in a row: wrongly, and by underflow.

        `unmoved` are those of `names` whose bytes the last update left as they were.
        """
        self._suspects = set(unmoved)
        for motion, counts in self._counts.items():
            kept = {name: count for name, count in counts.items() if name in unmoved}
            for name in unmoved:
                if expected.get(name) is motion:
                    kept[name] = kept.get(name, 0) + 1
            self._counts[motion] = kept
        stuck, underflowed = (
            # In the order of the model, which is the same on every rank.
            [name for name in names if self._counts[motion].get(name, 0) >= UPDATES]
            for motion in (Motion.MOVE, Motion.UNDERFLOW)
        )
        return stuck, underflowed


def expected_motion(parameter: Tensor, learning_rate: float) -> Motion:
    """What a usual update with this gradient does to `parameter`.

    Usual: at least `learning_rate * min(1, |gradient|)` in some element, as SGD's, and Adam's once
    the gradient is clear of its epsilon. Where that is less than the rounding of the parameter, a
    16-bit one stands still by underflow, and one of full precision says nothing.
    """
    # Of shards, each rank judges its own part.
    gradient, parameter = local_tensor(parameter.grad), local_tensor(parameter)
    if gradient is None or gradient.is_sparse or learning_rate <= 0.0:
        return Motion.NOTHING
    if not parameter.dtype.is_floating_point or not parameter.numel():
        return Motion.NOTHING
    number = torch.finfo(parameter.dtype)
    is_clear = False
    with torch.no_grad():
        # In pieces: a whole embedding would need several temporaries of its size.
        pieces = (gradient.detach().reshape(-1), parameter.detach().reshape(-1))
        # On a GPU every answer waits for the device: one question there.
        length = PIECE if parameter.device.type == "cpu" else max(parameter.numel(), 1)
        for slope, value in zip(*(whole.split(length) for whole in pieces), strict=True):
            size = slope.abs().float()
            clear_mask = size > CLEAR_GRADIENT
            step = learning_rate * size.clamp(max=1.0)
            if bool((clear_mask & (step > 4 * number.eps * value.abs().float())).any()):
                return Motion.MOVE
            is_clear = is_clear or bool(clear_mask.any())
    return Motion.UNDERFLOW if is_clear and number.bits == 16 else Motion.NOTHING
