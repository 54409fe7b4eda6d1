"""The nouns of the audit: scope, cause, difference, finding, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

DOCS = "docs/errors.md"
SHOWN = 8


class Scope(StrEnum):
    """What the audit looks at; `scopes` selects among them."""

    TRAINABLE = "trainable"
    GRADIENTS = "gradients"
    FROZEN = "frozen"
    QUANTIZATION = "quantization"
    BUFFERS = "buffers"
    OPTIMIZER = "optimizer"
    ROLES = "roles"
    RNG = "rng"


class Cause(StrEnum):
    """Why ranks parted; docs/errors.md has a section for each."""

    INIT_MISMATCH = "init_mismatch"
    GRADIENT_NOT_REDUCED = "gradient_not_reduced"
    GRADIENT_SCALED_DIFFERENTLY = "gradient_scaled_differently"
    OPTIMIZER_DIVERGED = "optimizer_diverged"
    STALE_REPLICA = "stale_replica"
    EDITED_OUTSIDE_STEP = "edited_outside_step"
    FROZEN_CHANGED = "frozen_changed"
    QUANTIZATION_CHANGED = "quantization_changed"
    NEVER_UPDATED = "never_updated"
    NOT_IN_OPTIMIZER = "not_in_optimizer"
    ROLE_VIOLATION = "role_violation"
    STRUCTURE_MISMATCH = "structure_mismatch"
    STEP_SKEW = "step_skew"
    RANK_MISSING = "rank_missing"
    MANIFEST_MISMATCH = "manifest_mismatch"
    NOT_DISTRIBUTED = "not_distributed"
    # Never fatal: batch statistics differ by design, others seldom matter.
    BUFFERS_DIFFER = "buffers_differ"


ADVICE = {
    Cause.INIT_MISMATCH: "Was it created or loaded after the model was wrapped, on one rank only, "
    "or with a seed per rank?",
    Cause.GRADIENT_NOT_REDUCED: "Was the forward run on the unwrapped model, the last micro-batch "
    "under no_sync, or the parameter unfrozen, replaced or added after wrapping?",
    Cause.GRADIENT_SCALED_DIFFERENTLY: "Does each rank decide by itself on clipping or "
    "loss scaling?",
    Cause.OPTIMIZER_DIVERGED: "Compare learning rate, optimizer state and options across ranks.",
    Cause.STALE_REPLICA: "Was the optimizer step skipped there, by a condition that only this rank "
    "met?",
    Cause.EDITED_OUTSIDE_STEP: "Something wrote to it between two optimizer steps: a callback, a "
    "weight sync, a merge, or faulty memory.",
    Cause.FROZEN_CHANGED: "Frozen tensors must never move: was an adapter merged and unmerged, or "
    "the base written to?",
    Cause.QUANTIZATION_CHANGED: "Was the weight quantized again, or an adapter merged into it?",
    Cause.NEVER_UPDATED: "Does the optimizer hold another copy of it?",
    Cause.NOT_IN_OPTIMIZER: "It requires gradients but nothing updates it: was it added or "
    "unfrozen after the optimizer was made?",
    Cause.ROLE_VIOLATION: "Call .eval() and .requires_grad_(False) on the frozen model and keep "
    "it out of the optimizer.",
    Cause.STRUCTURE_MISMATCH: "Ranks must build the same model: is an adapter or a layer added "
    "under a condition?",
    Cause.STEP_SKEW: "Ranks must take the same optimizer steps: is one taken under a condition, or "
    "do ranks have different numbers of batches?",
    Cause.RANK_MISSING: "",  # the evidence says what to do
    Cause.MANIFEST_MISMATCH: "The state is not the one that was saved.",
    Cause.NOT_DISTRIBUTED: "Every rank trains alone and nothing is averaged.",
    Cause.BUFFERS_DIFFER: "",  # a warning
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where `rank` parts from `reference_rank` in one tensor.

    `index` is the first element that differs, `bits` and `reference_bits` its bit patterns in hex.
    `factor` is set if the whole tensor is one multiple of the reference's.
    """

    rank: int
    reference_rank: int
    index: tuple[int, ...]
    bits: str
    reference_bits: str
    num_different: int
    num_elements: int
    max_abs_difference: float
    factor: float | None

    def describe(self) -> str:
        text = (
            f"{self.num_different} of {self.num_elements} elements differ, first at "
            f"{list(self.index)}: 0x{self.bits} on rank {self.rank}, 0x{self.reference_bits} on "
            f"rank {self.reference_rank}; largest difference {self.max_abs_difference:.3g}"
        )
        if self.factor is not None:
            text += f"; all of it is {self.factor:.6g} times that of rank {self.reference_rank}"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, the same on every rank.

    `tensor` is the first one concerned of `num_tensors`; `ranks` are those that depart from the
    rest, or all that differ where neither number nor history tells who is right. `holders` lists
    who holds which checksum. `replicas` are the ranks that hold the same shard, where only they
    were compared. A finding that is not `fatal` is only warned about.
    """

    cause: Cause
    step: int
    ranks: tuple[int, ...]
    scope: Scope | None = None
    tensor: str | None = None
    role: str | None = None
    num_tensors: int = 1
    holders: tuple[tuple[tuple[int, ...], str], ...] = ()
    last_equal_step: int | None = None
    evidence: str = ""
    difference: Difference | None = None
    fatal: bool = True
    replicas: tuple[int, ...] = ()

    def describe(self) -> str:
        """The message: where, who holds what, since when, why, and what to try."""
        kind = "" if self.fatal else "warning: "
        first = f"{kind}step {self.step}, {self._where()}: {self._who()}{self._since()}"
        lines = [first if first.endswith("...") else f"{first}."]
        if self.num_tensors > 1:
            lines.append(f"{self.num_tensors - 1} more tensor(s) with the same cause.")
        if self.replicas:
            shared = ",".join(map(str, self.replicas))
            lines.append(f"Compared are the ranks {shared}, which hold the same shard of it.")
        if self.difference is not None:
            lines.append(f"{self.difference.describe()}.")
        cause = f"Cause: {self.cause}."
        # A warning's evidence says why it is none of the usual reasons.
        for part in (self.evidence, ADVICE[self.cause] if self.fatal else ""):
            cause += f" {part}" if part else ""
        lines.append(f"{cause} See {DOCS}#{self.cause}")
        return "\n".join(lines)

    def _where(self) -> str:
        place = self.tensor or (f"scope {self.scope}" if self.scope else "this run")
        return f"{place} (role {self.role})" if self.role else place

    def _who(self) -> str:
        if len(self.holders) > 1:
            shown = [f"{_ranks(ranks)} {digest}" for ranks, digest in self.holders[:SHOWN]]
            more = len(self.holders) - SHOWN
            return ", ".join(shown) + (f" and {more} other groups differ again" if more > 0 else "")
        plural = "rank" if len(self.ranks) == 1 else "ranks"
        return f"on {plural} {','.join(map(str, self.ranks))}"

    def _since(self) -> str:
        if self.last_equal_step is None:
            return ""
        if self.last_equal_step == 0:
            return " (last equal at the start)"
        return f" (last equal after step {self.last_equal_step})"

    def as_dict(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)


def _ranks(ranks: Sequence[int]) -> str:
    names = ",".join(map(str, ranks))
    return f"rank {names} holds" if len(ranks) == 1 else f"ranks {names} hold"


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """The outcome of one audit, the same on every rank but for `seconds`.

    `still_parted`: the ranks differ as they did in an earlier audit, which reported it.
    """

    step: int
    audit: int
    findings: tuple[Finding, ...]
    roots: dict[str, str]
    size_bytes: int
    seconds: float
    still_parted: bool = False

    @property
    def fatal(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.fatal)

    @property
    def equal(self) -> bool:
        """True if all ranks hold the same state and nothing fatal was found."""
        return not self.fatal and not self.still_parted

    def describe(self) -> str:
        """Every finding; the first fatal one first."""
        ordered = sorted(self.findings, key=lambda finding: not finding.fatal)
        return "\n\n".join(finding.describe() for finding in ordered)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSummary:
    """What the audit did in a run.

    `audits` counts all, those at start and end included; `desyncs` those that found something new
    and fatal. `size_bytes` were hashed on this rank. `seconds` were spent inside the audit, and are
    `share_of_step` (0 to 1) of the training time.
    """

    audits: int
    desyncs: int
    size_bytes: int
    seconds: float
    share_of_step: float

    def describe(self) -> str:
        found = f"{self.desyncs or 'no'} desync{'s' if self.desyncs > 1 else ''}"
        return (
            f"sync audit: {self.audits} audits, {found}, {self.size_bytes / 1e6:,.1f} MB hashed, "
            f"{self.seconds:.2f} s ({self.share_of_step:.2%} of training time)"
        )
