"""The diagnosis of hand-made evidence: who departs, why, since when, and what comes first."""

from __future__ import annotations

from typing import Any

import pytest

from trl_sync.audit.diagnose import Context, Evidence, diagnose, majority
from trl_sync.audit.findings import Cause, Finding, Scope
from trl_sync.audit.roles import LocalFinding
from trl_sync.audit.snapshot import Kind, Slot

NAMES = ("layers.0.lora_A", "layers.0.lora_B")
CONTEXT = Context(
    step=118,
    expected_updates=1,
    last_equal_step=117,
    was_equal=True,
    role_of={NAMES[0]: "policy", NAMES[1]: "value"},
)


def evidence(rank: int, **changes: Any) -> Evidence:
    defaults: dict[str, Any] = {
        "kind": Kind.UPDATE,
        "step": 118,
        "updates": 1,
        "audit": 119,
        "algorithm": "xxh3",
        "learning_rates": (0.01,),
    }
    return Evidence(rank=rank, **(defaults | changes))


def ranks_that_hold(
    slot: Slot, letters: str, names: tuple[str, ...] = NAMES[:1], **changes: Any
) -> list[Evidence]:
    """One rank for each letter; equal letters stand for equal bytes of all `names`."""
    return [
        evidence(rank, digests={slot: dict.fromkeys(names, letter.encode() * 16)}, **changes)
        for rank, letter in enumerate(letters)
    ]


def only(
    ranks: list[Evidence],
    slots: set[Slot] | None = None,
    counters: set[str] | None = None,
    context: Context = CONTEXT,
) -> Finding:
    """The one finding of a diagnosis."""
    if slots is None:
        slots = {slot for item in ranks for slot in item.digests}
    (finding,) = diagnose(ranks, counters or set(), slots, context)
    return finding


def changed(**changes: Any) -> Context:
    fields = {name: getattr(CONTEXT, name) for name in Context.__slots__}
    return Context(**(fields | changes))


# Who departs.


@pytest.mark.parametrize(
    "letters, odd",
    [
        ("ab", (0, 1)),  # two ranks: nobody knows who is right
        ("aab", (2,)),
        ("aba", (1,)),
        ("baa", (0,)),
        ("abc", (0, 1, 2)),
        ("aaab", (3,)),
        ("aabb", (0, 2, 1, 3)),
        ("aabc", (0, 1, 2, 3)),  # half of all is no majority
        ("aaaabaaa", (4,)),
        ("abababaa", (1, 3, 5)),
        ("aaaabbbb", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("abcdefgh", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
@pytest.mark.parametrize("slot", [Slot.AFTER, Slot.GRADIENTS, Slot.OPTIMIZER, Slot.FROZEN])
def test_the_minority_departs(slot: Slot, letters: str, odd: tuple[int, ...]) -> None:
    finding = only(ranks_that_hold(slot, letters))
    assert sorted(finding.ranks) == sorted(odd)
    assert len(finding.ranks) == len(odd)
    groups = [tuple(i for i, x in enumerate(letters) if x == y) for y in dict.fromkeys(letters)]
    assert [ranks for ranks, _ in finding.holders] == groups


@pytest.mark.parametrize(
    "groups, num_ranks, expected",
    [
        ({"a": [0, 1]}, 2, (0, 1)),
        ({"a": [0], "b": [1]}, 2, None),
        ({"a": [0, 2], "b": [1]}, 3, (0, 2)),
        ({"a": [0, 1], "b": [2, 3]}, 4, None),
        ({"a": [0], "b": [1, 2], "c": [3, 4]}, 5, None),
    ],
)
def test_a_majority_is_more_than_half(groups: Any, num_ranks: int, expected: Any) -> None:
    assert majority(groups, num_ranks) == expected


# Why.


def test_a_rank_that_the_update_left_alone_is_stale() -> None:
    ranks = ranks_that_hold(Slot.AFTER, "ab", NAMES)
    ranks[1] = evidence(1, digests=ranks[1].digests, unmoved=frozenset(NAMES))
    finding = only(ranks)
    assert (finding.cause, finding.ranks) == (Cause.STALE_REPLICA, (1,))
    assert "the update did not happen on rank 1" in finding.evidence


def test_a_rank_whose_update_left_one_of_two_alone_is_not_stale() -> None:
    ranks = ranks_that_hold(Slot.AFTER, "ab", NAMES)
    ranks[1] = evidence(1, digests=ranks[1].digests, unmoved=frozenset(NAMES[:1]))
    assert only(ranks).cause is Cause.OPTIMIZER_DIVERGED


def test_other_learning_rates_are_told() -> None:
    ranks = ranks_that_hold(Slot.AFTER, "ab")
    ranks[1] = evidence(1, digests=ranks[1].digests, learning_rates=(0.02,))
    finding = only(ranks)
    assert finding.cause is Cause.OPTIMIZER_DIVERGED
    assert "Learning rates: 0.01 on rank 0; 0.02 on rank 1." in finding.evidence
    assert "Learning rates" not in only(ranks_that_hold(Slot.AFTER, "ab")).evidence


@pytest.mark.parametrize(
    "zero_ranks, ranks, told",
    [((), (1,), False), ((1,), (1,), True), ((0,), (0,), True), ((0, 1, 2), (1,), False)],
)
def test_zero_gradients_tell_who_departs(zero_ranks: Any, ranks: Any, told: bool) -> None:
    items = [
        evidence(
            item.rank,
            digests=item.digests,
            gradient_norms={NAMES[0]: 0.0 if item.rank in zero_ranks else 3.0},
        )
        for item in ranks_that_hold(Slot.GRADIENTS, "aba")
    ]
    finding = only(items)
    assert (finding.cause, finding.ranks) == (Cause.GRADIENT_NOT_REDUCED, ranks)
    assert ("the gradient is zero or absent" in finding.evidence) is told


@pytest.mark.parametrize(
    "norms, name, text",
    [
        # "b" was not reduced; the clipping by another norm followed from it.
        ((0.7, 1.3, 0.7 * 9), "b", "2 others differ by one factor only"),
        # None is like another.
        ((1.1, 4.0, 10.0), "a", "Gradients already differed"),
    ],
)
def test_clipping_that_follows_from_another_gradient_is_not_the_cause(
    norms: tuple[float, ...], name: str, text: str
) -> None:
    names = ("a", "b", "c")[: len(norms)]
    reference = dict(zip(names, (1.0, 5.0, 9.0), strict=False))
    ranks = [
        evidence(item.rank, digests=item.digests, gradient_norms=own)
        for item, own in zip(
            ranks_that_hold(Slot.GRADIENTS, "ab", names),
            (reference, dict(zip(names, norms, strict=True))),
            strict=True,
        )
    ]
    finding = only(ranks)
    assert (finding.cause, finding.tensor) == (Cause.GRADIENT_NOT_REDUCED, name)
    assert text in finding.evidence


def test_norms_in_one_ratio_are_a_scaling() -> None:
    # Rank 1 clips: every gradient is 0.7 of rank 0's.
    names = ("a", "b", "c")
    ranks = [
        evidence(item.rank, digests=item.digests, gradient_norms=dict(zip(names, own, strict=True)))
        for item, own in zip(
            ranks_that_hold(Slot.GRADIENTS, "ab", names),
            ((1.0, 5.0, 9.0), (0.7, 3.5, 6.3)),
            strict=True,
        )
    ]
    finding = only(ranks)
    assert (finding.cause, finding.tensor) == (Cause.GRADIENT_SCALED_DIFFERENTLY, "a")
    assert finding.num_tensors == 3


def test_history_tells_which_of_two_was_edited() -> None:
    ranks = ranks_that_hold(Slot.BEFORE, "ab", NAMES)
    ranks[1] = evidence(1, digests=ranks[1].digests, edited=frozenset(NAMES[1:]))
    finding = only(ranks)
    assert (finding.cause, finding.ranks) == (Cause.EDITED_OUTSIDE_STEP, (1,))
    assert (finding.tensor, finding.role) == (NAMES[1], "value")
    assert "It changed on rank 1 after the last update." in finding.evidence


def test_a_tensor_that_was_not_there_differs_since_it_was_made() -> None:
    ranks = ranks_that_hold(Slot.BEFORE, "ab", NAMES, added=frozenset(NAMES[1:]))
    finding = only(ranks)
    assert (finding.cause, finding.tensor, finding.num_tensors) == (
        Cause.INIT_MISMATCH,
        NAMES[1],
        1,
    )


@pytest.mark.parametrize("slot", [Slot.BEFORE, Slot.FROZEN, Slot.QUANTIZATION, Slot.OPTIMIZER])
def test_what_differs_at_the_start_was_made_so(slot: Slot) -> None:
    finding = only(ranks_that_hold(slot, "aab", kind=Kind.BEGIN))
    assert (finding.cause, finding.scope) == (Cause.INIT_MISMATCH, slot.scope)


@pytest.mark.parametrize(
    "slots, cause",
    [
        ({Slot.BEFORE}, Cause.OPTIMIZER_DIVERGED),
        ({Slot.BEFORE, Slot.AFTER}, Cause.OPTIMIZER_DIVERGED),
        ({Slot.BEFORE, Slot.GRADIENTS}, Cause.GRADIENT_NOT_REDUCED),
    ],
)
def test_ranks_that_parted_in_an_update_that_was_not_audited(slots: Any, cause: Cause) -> None:
    digests = [{slot: {NAMES[0]: letter * 16} for slot in slots} for letter in (b"a", b"b")]
    ranks = [evidence(rank, digests=own) for rank, own in enumerate(digests)]
    finding = only(ranks, slots)
    assert finding.cause is cause
    assert "in an update that was not audited" in finding.evidence


def test_a_difference_that_was_reported_is_not_reported_again() -> None:
    ranks = ranks_that_hold(Slot.BEFORE, "ab")
    assert diagnose(ranks, set(), {Slot.BEFORE}, changed(was_equal=False)) == []


@pytest.mark.parametrize(
    "slot, label, cause",
    [
        (Slot.FROZEN, "lm_head.weight[1048576:2097152]", Cause.FROZEN_CHANGED),
        (Slot.QUANTIZATION, "q_proj.weight.absmax[0:64]", Cause.QUANTIZATION_CHANGED),
    ],
)
def test_frozen_pieces_are_named_by_their_tensor(slot: Slot, label: str, cause: Cause) -> None:
    name = label.partition("[")[0]
    ranks = ranks_that_hold(slot, "aab", (label, label.replace("[", "[1")))
    finding = only(ranks, context=changed(role_of={name: "base"}))
    assert (finding.cause, finding.tensor, finding.role) == (cause, name, "base")
    assert (finding.num_tensors, finding.ranks) == (1, (2,))


def test_buffers_are_warned_about_and_batch_statistics_are_not() -> None:
    finding = only(ranks_that_hold(Slot.BUFFERS, "ab", ("norm.running_mean", "rope.inv_freq")))
    assert (finding.cause, finding.tensor, finding.fatal) == (
        Cause.BUFFERS_DIFFER,
        "rope.inv_freq",
        False,
    )
    statistics = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    ranks = ranks_that_hold(Slot.BUFFERS, "ab", statistics)
    assert diagnose(ranks, set(), {Slot.BUFFERS}, CONTEXT) == []


# Structure and step.

WEIGHT = ("trainable", "weight", "torch.float32 on cpu", (2, 3))
HEAD = ("frozen", "head", "torch.float32 on cpu", (4,))


def structure(*schemas: Any) -> Finding:
    ranks = [evidence(rank, schema=schema) for rank, schema in enumerate(schemas)]
    return only(ranks, counters={"schema", "num_tensors", "updates", "step"})


@pytest.mark.parametrize(
    "schemas, ranks, text",
    [
        ([(WEIGHT,), (WEIGHT, HEAD)], (1,), "It is frozen on rank 1 and not on the others."),
        ([(WEIGHT, HEAD), (WEIGHT,)], (0,), "It is frozen on rank 0 and not on the others."),
        ([(WEIGHT, HEAD), (WEIGHT, HEAD), (WEIGHT,)], (2,), "It is frozen on ranks 0,1 and not"),
        (
            [(WEIGHT, HEAD), (WEIGHT, ("trainable", *HEAD[1:]))],
            (0,),
            "It is frozen on rank 0 and in another scope on the others.",
        ),
        (
            [(WEIGHT, HEAD), (WEIGHT, (*HEAD[:2], "torch.bfloat16 on cpu", (4,)))],
            (0, 1),
            "Type or shape differ: ['torch.float32 on cpu', (4,)] on rank 0; "
            "['torch.bfloat16 on cpu', (4,)] on rank 1.",
        ),
        ([(HEAD,), (HEAD,), ((*HEAD[:3], (2, 2)),)], (2,), "(2, 2)] on rank 2"),
    ],
)
def test_another_structure(schemas: Any, ranks: Any, text: str) -> None:
    finding = structure(*schemas)
    assert finding.cause is Cause.STRUCTURE_MISMATCH
    assert (finding.ranks, finding.tensor, finding.scope) == (ranks, "head", Scope.FROZEN)
    assert text in finding.evidence


def test_another_order_of_the_same_tensors() -> None:
    finding = structure((WEIGHT, HEAD), (HEAD, WEIGHT), (WEIGHT, HEAD))
    assert (finding.cause, finding.ranks) == (Cause.STRUCTURE_MISMATCH, (1,))
    assert finding.tensor is None
    assert "another order" in finding.evidence


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_the_rank_with_one_update_more_is_named(num_ranks: int) -> None:
    ranks = [evidence(rank) for rank in range(num_ranks - 1)]
    ranks.append(evidence(num_ranks - 1, updates=2))
    finding = only(ranks, counters={"updates"})
    assert (finding.cause, finding.ranks) == (Cause.STEP_SKEW, (num_ranks - 1,))
    last = f"2 optimizer step(s) since the last audit (update audit 119) on rank {num_ranks - 1}"
    assert last in finding.evidence


@pytest.mark.parametrize(
    "field, values, ranks",
    [
        ("step", (118, 119), (0, 1)),
        ("step", (118, 119, 118), (1,)),
        ("audit", (7, 7, 8), (2,)),
        ("kind", (Kind.UPDATE, Kind.FULL), (1,)),  # nothing is left over for a full audit
    ],
)
def test_ranks_at_different_places(field: str, values: Any, ranks: Any) -> None:
    items = [evidence(rank, **{field: value}) for rank, value in enumerate(values)]
    finding = only(items, counters={field})
    assert (finding.cause, finding.ranks) == (Cause.STEP_SKEW, ranks)


def test_other_versions_come_before_all_else() -> None:
    ranks = [evidence(0), evidence(1, algorithm="sum64"), evidence(2)]
    finding = only(ranks, counters={"algorithm", "schema", "step"})
    assert (finding.cause, finding.ranks) == (Cause.STRUCTURE_MISMATCH, (1,))
    assert "xxh3 on ranks 0,2; sum64 on rank 1" in finding.evidence


# Several findings.


def stuck(**changes: Any) -> LocalFinding:
    fields: dict[str, Any] = {
        "cause": Cause.NEVER_UPDATED,
        "scope": Scope.TRAINABLE,
        "tensors": (NAMES[1],),
        "evidence": "Its bytes did not change.",
    }
    return LocalFinding(**(fields | changes))


def both_slots(first: Slot, second: Slot, **changes: Any) -> list[Evidence]:
    return [
        evidence(
            rank,
            digests={slot: {NAMES[0]: letter * 16} for slot in (first, second)},
            **changes,
        )
        for rank, letter in enumerate((b"a", b"b"))
    ]


@pytest.mark.parametrize(
    "first, second, causes",
    [
        (Slot.GRADIENTS, Slot.AFTER, [Cause.GRADIENT_NOT_REDUCED]),
        (Slot.AFTER, Slot.OPTIMIZER, [Cause.OPTIMIZER_DIVERGED]),
        (Slot.FROZEN, Slot.GRADIENTS, [Cause.FROZEN_CHANGED, Cause.GRADIENT_NOT_REDUCED]),
        (Slot.FROZEN, Slot.QUANTIZATION, [Cause.FROZEN_CHANGED, Cause.QUANTIZATION_CHANGED]),
        (Slot.AFTER, Slot.BUFFERS, [Cause.OPTIMIZER_DIVERGED, Cause.BUFFERS_DIFFER]),
    ],
)
def test_the_first_that_differs_comes_first(first: Slot, second: Slot, causes: Any) -> None:
    findings = diagnose(both_slots(first, second), set(), {first, second}, CONTEXT)
    assert [finding.cause for finding in findings] == causes


def test_an_edit_explains_all_that_follows_from_it() -> None:
    ranks = both_slots(Slot.BEFORE, Slot.AFTER, edited=frozenset(NAMES[:1]))
    findings = diagnose(ranks, set(), {Slot.BEFORE, Slot.AFTER}, CONTEXT)
    assert [finding.cause for finding in findings] == [Cause.EDITED_OUTSIDE_STEP]
    assert findings[0].ranks == (0, 1)


def test_what_a_rank_found_by_itself_is_said_once_for_all_that_found_it() -> None:
    ranks = [evidence(0, local=(stuck(),)), evidence(1), evidence(2, local=(stuck(),))]
    finding = only(ranks)
    assert (finding.cause, finding.ranks, finding.tensor) == (
        Cause.NEVER_UPDATED,
        (0, 2),
        NAMES[1],
    )
    assert finding.role == "value"


@pytest.mark.parametrize(
    "num_ranks_that_found, changes, fatal",
    [
        (3, {"cause": Cause.FROZEN_CHANGED}, False),
        (2, {"cause": Cause.FROZEN_CHANGED}, True),
        (1, {"cause": Cause.QUANTIZATION_CHANGED}, True),
        # Ranks that hold other parts see the move at other audits, or have none of it.
        (2, {"cause": Cause.FROZEN_CHANGED, "in_parts": True}, False),
        # One rank's part of a 16-bit parameter may stand still by itself.
        (1, {"cause": Cause.NEVER_UPDATED}, False),
    ],
)
def test_what_was_declared_is_fatal_only_if_not_all_did_it(
    num_ranks_that_found: int, changes: dict[str, Any], fatal: bool
) -> None:
    local = (stuck(fatal=False, **changes),)
    ranks = [evidence(r, local=local if r < num_ranks_that_found else ()) for r in range(3)]
    assert only(ranks).fatal is fatal


def test_a_warning_does_not_hide_a_difference() -> None:
    ranks = [
        evidence(item.rank, digests=item.digests, local=(stuck(fatal=False),))
        for item in ranks_that_hold(Slot.AFTER, "ab")
    ]
    findings = diagnose(ranks, set(), {Slot.AFTER}, CONTEXT)
    assert [(f.cause, f.fatal) for f in findings] == [
        (Cause.NEVER_UPDATED, False),
        (Cause.OPTIMIZER_DIVERGED, True),
    ]


# What it says.


def test_the_message_tells_all_that_is_known() -> None:
    finding = only(ranks_that_hold(Slot.GRADIENTS, "abab", NAMES))
    a, b = (letter.encode().hex() * 6 for letter in "ab")
    assert finding.describe() == (
        f"step 118, layers.0.lora_A (role policy): ranks 0,2 hold {a}..., "
        f"ranks 1,3 hold {b}... (last equal after step 117).\n"
        "1 more tensor(s) with the same cause.\n"
        "Cause: gradient_not_reduced. Gradients already differed before the step. "
        "Was the forward run on the unwrapped model, the last micro-batch under no_sync, or the "
        "parameter unfrozen, replaced or added after wrapping? "
        "See docs/errors.md#gradient_not_reduced"
    )


def test_every_rank_says_the_same() -> None:
    ranks = [
        evidence(item.rank, digests=item.digests, local=(stuck(fatal=False),))
        for item in ranks_that_hold(Slot.AFTER, "abca", NAMES)
    ]
    # Each rank gathers an equal list, unpickled: other objects, and sets in another order.
    said = {repr(diagnose(list(ranks), set(), {Slot.AFTER}, CONTEXT)) for _ in range(3)}
    assert len(said) == 1


# Shards.


def edits(letters: str) -> list[Evidence]:
    """One rank for each letter: "e" edited its shard, "-" did not, "0" holds nothing of it."""
    return [
        evidence(
            rank,
            edited_shards=frozenset(NAMES[:1] if letter == "e" else ()),
            empty_shards=frozenset(NAMES[:1] if letter == "0" else ()),
        )
        for rank, letter in enumerate(letters)
    ]


@pytest.mark.parametrize("letters, odd", [("-e", (1,)), ("e-e-", (0, 2)), ("e0-", (0,))])
def test_a_shard_edited_on_some_ranks(letters: str, odd: tuple[int, ...]) -> None:
    finding = only(edits(letters), counters={"edited"})
    assert (finding.cause, finding.tensor) == (Cause.EDITED_OUTSIDE_STEP, NAMES[0])
    assert (finding.ranks, finding.fatal) == (odd, True)


@pytest.mark.parametrize("letters", ["ee", "e0", "0e0e"])
def test_shards_edited_on_all_ranks_that_hold_them(letters: str) -> None:
    assert diagnose(edits(letters), {"edited"}, set(), CONTEXT) == []


def test_edits_of_other_shards_do_not_make_up_for_each_other() -> None:
    ranks = [evidence(rank, edited_shards=frozenset([NAMES[rank]])) for rank in (0, 1)]
    finding = only(ranks, counters={"edited"})
    assert (finding.ranks, finding.num_tensors, finding.tensor) == ((0, 1), 2, NAMES[0])
    assert finding.evidence.startswith("Its shard on rank 0")
    assert "call auditor.expect_edits() on every rank" in finding.evidence


def replicas(letters: str, slot: Slot, **changes: Any) -> list[Evidence]:
    """Four ranks of which 0 and 2, and 1 and 3, hold the same shards, by letter."""
    pairs = ((0, 2), (1, 3))
    return [
        evidence(
            rank,
            replicas=pairs[rank % 2],
            replica_slots=frozenset(
                [slot] if letters[pairs[rank % 2][0]] != letters[pairs[rank % 2][1]] else ()
            ),
            replica_digests={slot: {NAMES[0]: letter.encode() * 16}},
            **changes,
        )
        for rank, letter in enumerate(letters)
    ]


def test_replicas_of_one_shard_that_differ() -> None:
    # Shards of different groups always differ.
    finding = only(replicas("abac", Slot.AFTER), slots=set(), counters={"replicas"})
    assert finding.cause is Cause.OPTIMIZER_DIVERGED
    assert (finding.ranks, finding.replicas) == ((1, 3), (1, 3))
    assert [ranks for ranks, _ in finding.holders] == [(1,), (3,)]
    assert "Compared are the ranks 1,3, which hold the same shard of it." in finding.describe()


def test_every_group_of_replicas_is_named() -> None:
    found = diagnose(replicas("abcd", Slot.GRADIENTS), set(), set(), CONTEXT)
    assert [finding.replicas for finding in found] == [(0, 2), (1, 3)]
    assert {finding.cause for finding in found} == {Cause.GRADIENT_NOT_REDUCED}


def test_what_parted_before_the_update_explains_gradients_of_replicas() -> None:
    group = replicas("abac", Slot.GRADIENTS, added=frozenset(NAMES[1:]))
    ranks = [
        Evidence(
            **{name: getattr(item, name) for name in Evidence.__slots__}
            | {"digests": {Slot.BEFORE: {NAMES[1]: bytes([item.rank] * 16)}}}
        )
        for item in group
    ]
    finding = only(ranks, slots={Slot.BEFORE}, counters={"replicas"})
    assert (finding.cause, finding.tensor) == (Cause.INIT_MISMATCH, NAMES[1])


def test_learning_rates_that_differ_where_each_rank_updates_a_part() -> None:
    ranks = [evidence(rank, learning_rates=(rate,)) for rank, rate in enumerate((0.1, 0.1, 0.2))]
    finding = only(ranks, counters={"rates"})
    assert (finding.cause, finding.ranks) == (Cause.OPTIMIZER_DIVERGED, (2,))
    assert "0.1 on ranks 0,1; 0.2 on rank 2" in finding.evidence
