"""What all ranks saw -> what is wrong, where and why. Pure: the same on every rank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from trl_sync.audit.findings import Cause, Finding, Scope
from trl_sync.audit.roles import LocalFinding
from trl_sync.audit.snapshot import Kind, Slot

# Statistics that every rank gathers from its own data.
BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# What may be declared, and must then happen on all ranks.
DECLARABLE = (Cause.FROZEN_CHANGED, Cause.QUANTIZATION_CHANGED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one rank knows; gathered from all of them only when something differs.

    `digests` are those of the slots that differ, by tensor. Of the trainable parameters, `edited`
    differ before the update from what they were after the last one, `added` were not there then,
    and `unmoved` were left alone by the update. `gradient_norms` are 0 for absent gradients.

    `replicas` are the ranks with the same shards as this one, `replica_slots` the slots in which
    they differ, `replica_digests` the checksums of these. `edited_shards` are those of `edited`
    that no other rank holds, `empty_shards` parameters of which this rank holds nothing.
    """

    rank: int
    kind: Kind
    step: int
    updates: int
    audit: int
    algorithm: str
    last_equal_step: int | None = None
    schema: tuple[tuple[str, str, str, tuple[int, ...]], ...] = ()
    digests: Mapping[Slot, Mapping[str, bytes]] = field(default_factory=dict)
    edited: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()
    unmoved: frozenset[str] = frozenset()
    gradient_norms: Mapping[str, float] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    local: tuple[LocalFinding, ...] = ()
    replicas: tuple[int, ...] = ()
    replica_slots: frozenset[Slot] = frozenset()
    replica_digests: Mapping[Slot, Mapping[str, bytes]] = field(default_factory=dict)
    edited_shards: frozenset[str] = frozenset()
    empty_shards: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all ranks know alike; `step` is that of the rank that is least far.

    `was_equal`: the last audit found the ranks equal; a difference that stays was reported then.
    """

    step: int
    expected_updates: int
    last_equal_step: int | None
    was_equal: bool
    role_of: Mapping[str, str]


def diagnose(
    evidence: Sequence[Evidence], counters: set[str], slots: set[Slot], context: Context
) -> list[Finding]:
    """Everything that is wrong, in the order in which it came about.

    `counters` and `slots` are the numbers and checksums of the header on which ranks differ.
    """
    if "algorithm" in counters:
        return [_different_algorithms(evidence, context)]
    # Which tensors there are comes before how often they moved: an audit that one rank lacks
    # shifts everything after it.
    if counters & {"schema", "num_tensors"}:
        return [_structure(evidence, context)]
    if counters & {"kind", "step", "updates", "audit"}:
        return [_skew(evidence, context)]
    # Of the replicas of shards, each group is looked at like all ranks of what is replicated.
    parted: list[tuple[Sequence[Evidence], set[Slot], tuple[int, ...]]]
    parted = [(evidence, slots, ()), *_replica_groups(evidence)]
    findings = _edited_shards(evidence, context)
    for group, differing, ranks in parted:
        findings += _among(ranks, _parameters_before(group, differing, context))
    findings += _local(evidence, context)
    causes = {finding.cause for finding in findings if finding.fatal}
    for group, differing, ranks in parted:
        found = [f for f in _frozen(group, differing, context) if f.cause not in causes]
        findings += _among(ranks, found)
    if not findings or not any(Slot.BEFORE in differing for _, differing, _ in parted):
        for group, differing, ranks in parted:
            findings += _among(ranks, _update(group, differing, context))
    for group, differing, ranks in parted:
        findings += _among(ranks, _buffers(group, differing, context))
    if "rates" in counters and not any(finding.fatal for finding in findings):
        findings.append(_different_rates(evidence, context))
    return findings


def _replica_groups(
    evidence: Sequence[Evidence],
) -> Iterator[tuple[Sequence[Evidence], set[Slot], tuple[int, ...]]]:
    """What the ranks of each group know that hold the same shards and differ: with the checksums of
    these shards, the slots in which they differ, and who they are.
    """
    for ranks in sorted({item.replicas for item in evidence if item.replica_slots}):
        group = [
            replace(item, digests=item.replica_digests)
            for item in evidence
            if item.replicas == ranks
        ]
        yield group, set(group[0].replica_slots), ranks


def _among(ranks: tuple[int, ...], findings: Iterable[Finding]) -> list[Finding]:
    return [replace(finding, replicas=ranks) for finding in findings]


def _edited_shards(evidence: Sequence[Evidence], context: Context) -> list[Finding]:
    """Shards that nobody else holds, edited between two updates on some of the ranks only."""
    names: dict[str, tuple[int, ...]] = {}
    for name in sorted({name for item in evidence for name in item.edited_shards}):
        ranks = tuple(item.rank for item in evidence if name in item.edited_shards)
        holders = [item.rank for item in evidence if name not in item.empty_shards]
        if set(ranks) != set(holders):
            names[name] = ranks
    if not names:
        return []
    first = next(iter(names))
    ranks = tuple(sorted({rank for members in names.values() for rank in members}))
    return [
        Finding(
            cause=Cause.EDITED_OUTSIDE_STEP,
            step=context.step,
            ranks=ranks,
            scope=Scope.TRAINABLE,
            tensor=first,
            role=context.role_of.get(first),
            num_tensors=len(names),
            last_equal_step=context.last_equal_step,
            evidence=f"Its shard on {_named(names[first])} changed after the last update. Was it "
            "meant, such as clamping values or zeroing a row? Then call auditor.expect_edits() on "
            "every rank right after it.",
        )
    ]


def _different_rates(evidence: Sequence[Evidence], context: Context) -> Finding:
    groups = _groups(evidence, lambda item: ", ".join(f"{r:.6g}" for r in item.learning_rates))
    return Finding(
        cause=Cause.OPTIMIZER_DIVERGED,
        step=context.step,
        ranks=_odd(groups, len(evidence)),
        scope=Scope.TRAINABLE,
        last_equal_step=context.last_equal_step,
        evidence="Each rank updates a part of the parameters, with another learning rate: "
        f"{_listing(groups)}.",
    )


def majority(groups: Mapping[object, Sequence[int]], num_ranks: int) -> tuple[int, ...] | None:
    """The ranks of the group that holds more than half of all, if there is one."""
    largest = max(groups.values(), key=len)
    return tuple(largest) if 2 * len(largest) > num_ranks else None


def _different_algorithms(evidence: Sequence[Evidence], context: Context) -> Finding:
    groups = _groups(evidence, lambda item: item.algorithm)
    return Finding(
        cause=Cause.STRUCTURE_MISMATCH,
        step=context.step,
        ranks=_odd(groups, len(evidence)),
        evidence="Ranks run different versions or settings of the audit: " + _listing(groups) + ".",
        holders=_holders(groups, str),
    )


def _structure(evidence: Sequence[Evidence], context: Context) -> Finding:
    # One look for all ranks with the same schema: of thousands, most have it.
    alike = dict.fromkeys(e.schema for e in evidence)
    by_schema = {schema: {(s, n): form for s, n, *form in schema} for schema in alike}
    schemas = list(by_schema.values())
    keys = list(dict.fromkeys(key for schema in schemas for key in schema))
    different = [key for key in keys if len({str(schema.get(key)) for schema in schemas}) > 1]
    if not different:
        groups = _groups(evidence, lambda item: item.schema)
        return Finding(
            cause=Cause.STRUCTURE_MISMATCH,
            step=context.step,
            ranks=_odd(groups, len(evidence)),
            evidence="The tensors are the same, but in another order.",
        )
    scope, name = different[0]
    forms = {e.rank: by_schema[e.schema].get((scope, name)) for e in evidence}
    groups = _groups(evidence, lambda item: str(forms[item.rank]))
    present = [rank for rank, form in forms.items() if form is not None]
    if len(present) < len(evidence):
        elsewhere = [str((s, n)) for s, n in different if n == name and s != scope]
        moved = "in another scope on the others" if elsewhere else "not on the others"
        text = f"It is {scope} on {_named(present)} and {moved}."
    else:
        text = f"Type or shape differ: {_listing(groups)}."
    odd = _odd(groups, len(evidence))
    if len(odd) == len(evidence) and 0 < len(present) < len(evidence):
        odd = tuple(present)
    return Finding(
        cause=Cause.STRUCTURE_MISMATCH,
        step=context.step,
        ranks=odd,
        scope=Scope(scope),
        tensor=name,
        num_tensors=len({name for _, name in different}),
        last_equal_step=context.last_equal_step,
        evidence=text,
    )


def _skew(evidence: Sequence[Evidence], context: Context) -> Finding:
    def place(item: Evidence) -> str:
        return (
            f"step {item.step}, {item.updates} optimizer step(s) since the last audit "
            f"({item.kind.name.lower()} audit {item.audit})"
        )

    groups = _groups(evidence, place)
    beginning = all(item.kind is Kind.BEGIN for item in evidence)
    wrong = tuple(e.rank for e in evidence if e.updates != _expected_updates(e, context))
    odd = wrong if 0 < len(wrong) < len(evidence) else _odd(groups, len(evidence))
    return Finding(
        # Ranks that begin at different steps loaded different checkpoints, or one loaded none.
        cause=Cause.INIT_MISMATCH if beginning else Cause.STEP_SKEW,
        step=context.step,
        ranks=_odd(groups, len(evidence)) if beginning else odd,
        last_equal_step=context.last_equal_step,
        evidence=f"Ranks are at different places: {_listing(groups)}.",
    )


def _expected_updates(item: Evidence, context: Context) -> int:
    """One audit an update leaves none over for a full audit."""
    full_after_each = item.kind is not Kind.UPDATE and context.expected_updates == 1
    return 0 if full_after_each else context.expected_updates


def _parameters_before(
    evidence: Sequence[Evidence], slots: set[Slot], context: Context
) -> list[Finding]:
    if Slot.BEFORE not in slots:
        return []
    names = _different(evidence, Slot.BEFORE)
    added = [n for n in names if any(n in e.added for e in evidence)]
    beginning = evidence[0].kind is Kind.BEGIN
    if beginning or added:
        return [_finding(Cause.INIT_MISMATCH, Slot.BEFORE, added or names, evidence, context)]
    edited = [name for name in names if any(name in e.edited for e in evidence)]
    if not edited:
        return _parted_unseen(names, evidence, slots, context) if context.was_equal else []
    ranks = tuple(e.rank for e in evidence if e.edited.intersection(edited))
    text = f"It changed on {_named(ranks)} after the last update."
    return [
        _finding(
            Cause.EDITED_OUTSIDE_STEP,
            Slot.BEFORE,
            edited,
            evidence,
            context,
            ranks=ranks,
            text=text,
        )
    ]


def _parted_unseen(
    names: Sequence[str], evidence: Sequence[Evidence], slots: set[Slot], context: Context
) -> list[Finding]:
    """Ranks parted in updates that were not audited; gradients now hint at why."""
    text = "Ranks parted in an update that was not audited."
    if Slot.GRADIENTS in slots:
        return [_gradients(evidence, context, text=text)]
    return [_finding(Cause.OPTIMIZER_DIVERGED, Slot.BEFORE, names, evidence, context, text=text)]


def _local(evidence: Sequence[Evidence], context: Context) -> list[Finding]:
    """What ranks found by themselves, one finding for each cause and role."""
    grouped: dict[tuple[Cause, str | None, bool], list[tuple[int, LocalFinding]]] = {}
    for item in evidence:
        for local in item.local:
            key = (local.cause, local.role, local.fatal)
            grouped.setdefault(key, []).append((item.rank, local))
    findings = []
    for (cause, role, fatal), members in grouped.items():
        names = list(dict.fromkeys(name for _, local in members for name in local.tensors))
        ranks = tuple(dict.fromkeys(rank for rank, _ in members))
        first = members[0][1]
        # A declared move that only some ranks made is none, if all would have seen it now.
        together = cause in DECLARABLE and not any(local.in_parts for _, local in members)
        fatal = fatal or (together and len(ranks) < len(evidence))
        findings.append(
            Finding(
                cause=cause,
                step=context.step,
                ranks=ranks,
                scope=first.scope,
                tensor=names[0] if names else None,
                role=role or (context.role_of.get(names[0]) if names else None),
                num_tensors=max(1, len(names)),
                last_equal_step=first.last_equal_step,
                evidence=first.evidence,
                fatal=fatal,
            )
        )
    return findings


def _frozen(evidence: Sequence[Evidence], slots: set[Slot], context: Context) -> list[Finding]:
    causes = {
        Slot.FROZEN: Cause.FROZEN_CHANGED,
        Slot.QUANTIZATION: Cause.QUANTIZATION_CHANGED,
    }
    findings = []
    for slot, cause in causes.items():
        if slot in slots:
            beginning = evidence[0].kind is Kind.BEGIN
            cause = Cause.INIT_MISMATCH if beginning else cause
            names = _different(evidence, slot)
            found = _finding(cause, slot, names, evidence, context)
            # Checksums are of pieces; the tensor is what the user knows.
            tensors = list(dict.fromkeys(name.partition("[")[0] for name in names))
            findings.append(
                replace(
                    found,
                    tensor=tensors[0],
                    num_tensors=len(tensors),
                    role=context.role_of.get(tensors[0]),
                )
            )
    return findings


def _update(evidence: Sequence[Evidence], slots: set[Slot], context: Context) -> list[Finding]:
    """The first of gradients, parameters and optimizer state that differs explains the rest."""
    beginning = evidence[0].kind is Kind.BEGIN
    if Slot.BEFORE in slots and not beginning:
        # Parted before this update, and reported then.
        return []
    if Slot.GRADIENTS in slots:
        return [_gradients(evidence, context)]
    if Slot.AFTER in slots:
        return [_after(evidence, context)]
    if Slot.OPTIMIZER in slots:
        cause = Cause.INIT_MISMATCH if beginning else Cause.OPTIMIZER_DIVERGED
        names = _different(evidence, Slot.OPTIMIZER)
        return [_finding(cause, Slot.OPTIMIZER, names, evidence, context)]
    return []


def _gradients(
    evidence: Sequence[Evidence],
    context: Context,
    text: str = "Gradients already differed before the step.",
) -> Finding:
    names = _different(evidence, Slot.GRADIENTS)
    unlike = _not_scaled_alike(names, evidence)
    if 0 < len(unlike) < len(names) / 2:
        # One gradient that was not reduced changes the norm that all are clipped by.
        text += f" {len(names) - len(unlike)} others differ by one factor only, as from clipping."
        names = unlike
    zero = tuple(e.rank for e in evidence if not e.gradient_norms.get(names[0]))
    ranks = None
    if 0 < len(zero) < len(evidence):
        ranks = zero
        text += f" On {_named(zero)} the gradient is zero or absent."
    # Told apart by norms here, and by every element where the gradients are still there.
    scaled = len(names) > 1 and not unlike and not zero
    return _finding(
        Cause.GRADIENT_SCALED_DIFFERENTLY if scaled else Cause.GRADIENT_NOT_REDUCED,
        Slot.GRADIENTS,
        names,
        evidence,
        context,
        ranks=ranks,
        text=text,
    )


def _not_scaled_alike(names: Sequence[str], evidence: Sequence[Evidence]) -> list[str]:
    """The gradients whose norms are not in the ratio that most others have between two ranks."""
    unlike: dict[str, None] = {}
    reference = evidence[0].gradient_norms
    for item in evidence[1:]:
        ratios = {
            name: item.gradient_norms.get(name, 0.0) / reference[name]
            if reference.get(name)
            else math.inf
            for name in names
        }
        usual = statistics.median_low(ratios.values())
        for name, ratio in ratios.items():
            # Norms of 16-bit gradients that were scaled agree to about three digits.
            if not math.isclose(ratio, usual, rel_tol=2e-3):
                unlike[name] = None
    return [name for name in names if name in unlike]


def _after(evidence: Sequence[Evidence], context: Context) -> Finding:
    names = _different(evidence, Slot.AFTER)
    still = tuple(e.rank for e in evidence if e.unmoved.issuperset(names))
    if 0 < len(still) < len(evidence):
        text = f"Gradients were equal, but the update did not happen on {_named(still)}."
        return _finding(
            Cause.STALE_REPLICA, Slot.AFTER, names, evidence, context, ranks=still, text=text
        )
    text = "Parameters and gradients were equal before the step."
    rates = _groups(evidence, lambda item: ", ".join(f"{rate:.6g}" for rate in item.learning_rates))
    if len(rates) > 1:
        text += f" Learning rates: {_listing(rates)}."
    return _finding(Cause.OPTIMIZER_DIVERGED, Slot.AFTER, names, evidence, context, text=text)


def _buffers(evidence: Sequence[Evidence], slots: set[Slot], context: Context) -> list[Finding]:
    if Slot.BUFFERS not in slots:
        return []
    names = [
        name
        for name in _different(evidence, Slot.BUFFERS)
        if name.rpartition(".")[2] not in BATCH_STATISTICS
    ]
    if not names:
        return []
    text = "Buffers are not trained; DDP sends those of rank 0 to all at the next forward."
    found = _finding(Cause.BUFFERS_DIFFER, Slot.BUFFERS, names, evidence, context, text=text)
    return [replace(found, fatal=False, last_equal_step=None)]


def _finding(
    cause: Cause,
    slot: Slot,
    names: Sequence[str],
    evidence: Sequence[Evidence],
    context: Context,
    *,
    ranks: tuple[int, ...] | None = None,
    text: str = "",
) -> Finding:
    first = names[0]
    groups = _groups(evidence, lambda item: item.digests[slot].get(first, b"").hex())
    owner = first.rpartition(".")[0] if slot is Slot.OPTIMIZER else first
    return Finding(
        cause=cause,
        step=context.step,
        ranks=ranks if ranks is not None else _odd(groups, len(evidence)),
        scope=slot.scope,
        tensor=first,
        role=context.role_of.get(owner),
        num_tensors=len(names),
        holders=_holders(groups, lambda digest: f"{digest[:12]}..." if digest else "nothing"),
        last_equal_step=context.last_equal_step,
        evidence=text,
    )


def _different(evidence: Sequence[Evidence], slot: Slot) -> list[str]:
    # One look for all equal tables.
    distinct = {(tuple(t), tuple(t.values())): t for t in (e.digests[slot] for e in evidence)}
    tables = list(distinct.values())
    names = dict.fromkeys(name for table in tables for name in table)
    return [name for name in names if len({table.get(name) for table in tables}) > 1]


def _groups(
    evidence: Iterable[Evidence], key: Callable[[Evidence], object]
) -> dict[object, list[int]]:
    groups: dict[object, list[int]] = {}
    for item in evidence:
        groups.setdefault(key(item), []).append(item.rank)
    return groups


def _odd(groups: Mapping[object, Sequence[int]], num_ranks: int) -> tuple[int, ...]:
    """The minority; without a majority nobody knows who is right, so everybody."""
    right = set(majority(groups, num_ranks) or ())
    return tuple(r for members in groups.values() for r in members if r not in right)


def _holders(
    groups: Mapping[object, Sequence[int]], shown: Callable[[str], str]
) -> tuple[tuple[tuple[int, ...], str], ...]:
    return tuple((tuple(members), shown(str(value))) for value, members in groups.items())


def _listing(groups: Mapping[object, Sequence[int]]) -> str:
    return "; ".join(f"{value} on {_named(members)}" for value, members in groups.items())


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ",".join(map(str, ranks))
