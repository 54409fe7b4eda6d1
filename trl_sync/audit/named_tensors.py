"""Tensors with their names and layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trl_sync.audit.sharding import PLAIN, Layout, Reach, own_bytes


@dataclass(slots=True, kw_only=True)
class NamedTensors:
    """Tensors with their names, in the same order on every rank, and how they are spread."""

    names: list[str] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    is_plain: bool = True
    _reaches: list[Reach] | None = None

    def add(self, name: str, tensor: Tensor | None, layout: Layout = PLAIN) -> None:
        self.names.append(name)
        self.tensors.append(tensor)
        self.layouts.append(layout)
        self.is_plain &= layout is PLAIN
        self._reaches = None

    def items(self) -> Iterator[tuple[str, Any]]:
        return zip(self.names, self.tensors, strict=True)

    def own(self) -> Sequence[Tensor | None]:
        """What this rank holds of each tensor: itself if nothing is sharded."""
        if self.is_plain:
            return self.tensors
        pairs = zip(self.tensors, self.layouts, strict=True)
        return [own_bytes(tensor, layout.form) for tensor, layout in pairs]

    def reaches(self) -> list[Reach] | None:
        """Whom each tensor is compared with; None: all of them with all ranks."""
        if self.is_plain:
            return None
        if self._reaches is None:
            self._reaches = [layout.reach for layout in self.layouts]
        return self._reaches

    def __len__(self) -> int:
        return len(self.names)
