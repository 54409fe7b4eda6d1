"""The options on two gloo ranks: one launch, many checks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import ranks
import runs
import tiny

BATCH = {"gradient_accumulation_steps": 2}  # 2 ranks x 2 micro-batches of 4: 16 episodes


class Steps(TrainerCallback):
    """The global step at the beginning of each update."""

    def __init__(self) -> None:
        self.begun: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun.append(state.global_step)


def outcome(trainer: Any) -> dict[str, Any]:
    clock = ("time/", "eps")
    log = [{k: v for k, v in r.items() if not k.startswith(clock)} for r in runs.rows(trainer)]
    return {"trained": runs.trained(trainer), "log": log, "step": trainer.state.global_step}


def early_stop(folder: Path) -> dict[str, Any]:
    """A run whose target lies between what the two ranks find in the second update."""
    watched = runs.train(folder / "free", kind=runs.WatchedTrainer, **BATCH)
    second = [m["ratio"] for m in watched.micro_batches if m["step"] == 1]
    own = 0.5 * torch.cat(second).double().log().pow(2).mean().item()
    found = runs.rows(watched)[1]["policy/approxkl_avg"]
    steps = Steps()
    options = BATCH | {"target_kl": 0.999 * found / 1.5, "callbacks": [steps]}
    options |= {"save_strategy": "steps", "save_steps": 4}
    trainer = runs.train(folder / "stopped", **options)
    resumed = runs.make(folder / "stopped", **options)
    checkpoint = folder / "stopped" / "out" / "checkpoint-4"
    whole = outcome(trainer) | {"begun": list(steps.begun)}
    resumed.train(resume_from_checkpoint=str(checkpoint))
    return {"own": own, "found": found, "whole": whole, "resumed": outcome(resumed)}


def all_else(folder: Path) -> dict[str, Any]:
    """A run with the other options, and the prompts this rank was given."""
    seen: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        seen.append(prompts)
        return runs.count_e(prompts, completions)

    trainer = runs.make(
        folder,
        reward=reward,
        prompts=tiny.prompts(10),
        num_generations=4,
        kl_target=0.01,
        kl_horizon=64.0,
        value_warmup_steps=5,
        value_learning_rate=5e-3,
        value_lam=1.0,
        cliprange_high=0.3,
        ratio_threshold=1.0001,
        learning_rate=1e-2,
        **BATCH,
    )
    policy = {n: p.detach().clone() for n, p in trainer.backbone.role_parameters("policy")}
    still: list[bool] = []

    def look(state: Any, control: Any) -> None:
        now = {n: p.detach().clone() for n, p in trainer.backbone.role_parameters("policy")}
        still.append(runs.same(policy, now))

    trainer.add_callback(runs.At("on_step_end", look))
    trainer.train()
    coefficient = trainer.kl_control.coefficient
    return outcome(trainer) | {"seen": seen, "still": still, "coefficient": coefficient}


def everything(folder: Path) -> str:
    """All of the above; tensors do not outlive their process, so they go through a file."""
    from accelerate import PartialState

    found = {"stop": early_stop(folder / "stop"), "else": all_else(folder / "else")}
    file = folder / f"rank_{PartialState().process_index}.pt"
    torch.save(found, file)
    return str(file)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    files = ranks.run_on_ranks(everything, tmp_path_factory.mktemp("ranks"))
    return [torch.load(file, weights_only=False) for file in files]


pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def test_all_ranks_skip_by_what_they_find_together(both: list[dict[str, Any]]) -> None:
    first, second = (result["stop"] for result in both)
    assert first["found"] == second["found"]
    # One rank alone would have gone on, the other would have stopped.
    low, high = sorted([first["own"], second["own"]])
    assert low < 0.999 * first["found"] < high
    assert first["whole"]["begun"] == second["whole"]["begun"]
    assert first["whole"]["begun"][:3] == [0, 1, 4]
    for part in ("whole", "resumed"):
        assert runs.same(first[part]["trained"], second[part]["trained"])
        assert first[part]["log"] == second[part]["log"]
        assert first[part]["step"] == 12


def test_a_run_on_two_ranks_resumes_after_a_skip_bit_for_bit(both: list[dict[str, Any]]) -> None:
    for result in both:
        whole, resumed = result["stop"]["whole"], result["stop"]["resumed"]
        assert runs.same(whole["trained"], resumed["trained"])
        assert whole["log"] == resumed["log"]


def test_ranks_stay_alike_under_all_other_options(both: list[dict[str, Any]]) -> None:
    first, second = (result["else"] for result in both)
    assert runs.same(first["trained"], second["trained"])
    assert first["log"] == second["log"]
    assert first["coefficient"] == second["coefficient"]
    assert first["still"] == second["still"]
    assert first["still"][:5] == [True] * 5
    assert first["still"][-1] is False
    counted = [row["policy/skipped_micro_batches"] for row in first["log"]]
    # 2 micro-batches on each of 2 ranks; the policy stands still at first, so none is left out.
    assert counted[:5] == [0.0] * 5
    assert max(counted) <= 4
    assert sum(counted) > 0


def test_the_samples_of_a_prompt_go_round_the_ranks(both: list[dict[str, Any]]) -> None:
    for batch in zip(*(result["else"]["seen"] for result in both), strict=True):
        for part in batch:
            assert sorted(Counter(part).values()) == [2, 2, 2, 2]
        numbers = Counter(prompt for part in batch for prompt in part)
        assert sorted(numbers.values()) == [4, 4, 4, 4]
