"""PPO under every engine: the same updates as in one process, generation, saving and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import engine_runs
import engine_table
import engines
import tiny
from trl_sync.backbone.export import ADAPTER_WEIGHTS

pytestmark = [pytest.mark.engines, pytest.mark.ranks]

SLOW = pytest.mark.slow
RUNS = [
    pytest.param(("ddp", 2), id="ddp-2", marks=SLOW),
    pytest.param(("ddp", 4), id="ddp-4", marks=SLOW),
    pytest.param(("zero1", 2), id="zero1-2", marks=SLOW),
    pytest.param(("zero2", 2), id="zero2-2"),
    pytest.param(("zero3", 2), id="zero3-2"),
    pytest.param(("fsdp2", 2), id="fsdp2-2"),
    pytest.param(("hsdp", 4), id="hsdp-4", marks=SLOW),
]
NAMES = {"zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "ddp": "DDP"}


@pytest.fixture(scope="module", params=RUNS)
def outcome(request: Any, tmp_path_factory: Any) -> tuple[str, int, Path, list[dict[str, Any]]]:
    engine, ranks = request.param
    folder = tmp_path_factory.mktemp(f"{engine}_{ranks}")
    tiny.llama().save_pretrained(folder / "base")
    answers = engines.run_on_engine(
        engine, engine_runs.everything, engine, str(folder), num_ranks=ranks, deadline_s=400
    )
    engine_table.note(engine, ranks, updates=answers[0]["updates"])
    return engine, ranks, folder, answers


@pytest.fixture(scope="module")
def single(tmp_path_factory: Any) -> Any:
    """The parameters of one process, by number of ranks whose mini-batches it imitates."""
    folder = tmp_path_factory.mktemp("single")
    tiny.llama().save_pretrained(folder / "base")
    known: dict[tuple[str, int], dict[str, Tensor]] = {}

    def parameters(name: str, ranks: int) -> dict[str, Tensor]:
        if (name, ranks) not in known:
            precision, optimizer = {
                "sgd": ("fp32", engine_runs.SGD),
                "adam": ("nf4", engine_runs.ADAM),
            }[name]
            known[name, ranks] = engine_runs.as_one_process(folder, precision, ranks, **optimizer)
        return known[name, ranks]

    return parameters


# Relative to the largest change of any parameter. A gradient is a sum of a few hundred terms in
# another order: relative error about sqrt(500) x 6e-8 = 1.3e-6 of its largest entry; 8 updates
# whose errors add. Adam divides by the root of squares plus 1e-3, which only makes it smaller.
TOLERANCE = 8 * 1.5e-6


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_parameters_equal_those_of_one_process(outcome: Any, single: Any, name: str) -> None:
    engine, ranks, folder, answers = outcome
    assert all(answer[name] == answers[0][name] for answer in answers), "ranks differ"
    ours = torch.load(folder / f"{engine}_{name}.pt", weights_only=True)
    expected = single(name, ranks)
    assert ours.keys() == expected.keys()
    start = initial_parameters()
    moved = max(float((expected[n] - start[n]).abs().max()) for n in expected)
    difference = max(float((ours[n] - expected[n]).abs().max()) for n in expected)
    print(f"{engine} {ranks} {name}: moved {moved:.3g}, differs {difference:.3g}")
    assert moved > 1e-3  # it trained
    assert difference <= TOLERANCE * moved
    engine_table.note(engine, ranks, **{f"difference_{name}": difference / moved})


def initial_parameters() -> dict[str, Tensor]:
    backbone = engine_runs.runs.SharedBackbone(tiny.llama(), engine_runs.runs.lora())
    engine_runs.runs.randomise(backbone)
    return {n: p.detach() for n, p in backbone.named_parameters() if p.requires_grad}


def test_empty_responses_were_among_them(outcome: Any) -> None:
    *_, answers = outcome
    counts = [answer["empty"] for answer in answers]
    assert sum(counts) > 0
    assert len(set(counts)) > 1  # and not as many on each rank


def test_gradients_are_the_mean_of_those_of_the_ranks(outcome: Any) -> None:
    engine, ranks, folder, _ = outcome
    held = [
        torch.load(folder / f"{engine}_gradient_{rank}.pt", weights_only=True)
        for rank in range(ranks)
    ]
    for name, moved in held[0]["moved"].items():
        own = [part["own"][name] for part in held]
        mean = torch.stack(own).mean(0)
        # fp32; the update subtracts it from a parameter of about 0.3: 6e-8 x 0.3, twice
        torch.testing.assert_close(moved, mean, rtol=1e-5, atol=1e-7)
        if mean.abs().max() > 1e-6:
            assert not torch.allclose(own[0], mean, rtol=1e-3, atol=0)  # ranks had other episodes


def test_the_engine_is_the_one_asked_for(outcome: Any) -> None:
    engine, _, _, answers = outcome
    assert {answer["engine"] for answer in answers} == {NAMES.get(engine, "FSDP2")}


def test_a_resumed_run_equals_the_uninterrupted_one(outcome: Any) -> None:
    engine, ranks, _, answers = outcome
    assert all(answer["resumed_equal"] for answer in answers)
    engine_table.note(engine, ranks, resumed_equal=True)


def test_every_update_was_audited(outcome: Any) -> None:
    engine, ranks, _, answers = outcome
    # At the start, after each of 8 updates, at two saves and at the end, where they are due.
    assert {answer["audits"] for answer in answers} == {answers[0]["audits"]}
    assert answers[0]["audits"] >= 1 + 8 + 1
    engine_table.note(engine, ranks, audits=answers[0]["audits"])


def test_what_was_saved_is_whole(outcome: Any) -> None:
    """The policy in `final` and in the last checkpoint is what the ranks ended with."""
    _, _, folder, answers = outcome
    for place in (folder / "final", folder / "out" / "checkpoint-8"):
        saved = load_file(place / ADAPTER_WEIGHTS)
        plain = {name.replace(".weight", ".policy.weight"): t for name, t in saved.items()}
        found = engine_runs.checksums({f"peft_model.{name}": t for name, t in plain.items()})
        expected = {n: c for n, c in answers[0]["final"].items() if ".policy." in n}
        assert found == expected


def test_ranks_generate_different_lengths_without_waiting(outcome: Any) -> None:
    _, _, _, answers = outcome
    assert [answer["lengths"] for answer in answers] == [48] + [2] * (len(answers) - 1)
    assert all(answer["unchanged"] for answer in answers)


def test_evaluation_with_prompts_for_some_ranks_only(outcome: Any) -> None:
    _, _, _, answers = outcome
    assert {answer["answers_before"] for answer in answers} == {5}
    assert len({answer["evaluated"] for answer in answers}) == 1


def test_each_rank_holds_its_share_of_the_4_bit_base(outcome: Any) -> None:
    engine, _, _, answers = outcome
    shards = {"zero3": 2, "fsdp2": 2, "hsdp": 2}.get(engine, 1)
    for answer in answers:
        share = answer["frozen"]["local"] * shards / answer["frozen"]["whole"]
        assert 1 <= share < 1.01  # padding
        gathers = engine in ("zero3", "fsdp2", "hsdp")
        assert (answer["gathered_bytes"] is not None) == gathers
        if gathers:
            assert answer["gathered_bytes"] > answer["frozen"]["whole"]
