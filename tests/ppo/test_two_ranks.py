"""Training on two gloo ranks: one launch, many checks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import runs
import tiny

EVAL_PROMPTS = 5  # 3 for one rank, 2 for the other
ROWS = 16


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """A score that depends on the prompt alone."""
    return [float(len(prompt)) for prompt in prompts]


def rank_and_size() -> tuple[int, int]:
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def mini_batch_gradient(folder: Path) -> dict[str, Any]:
    """This rank's gradient of one mini-batch of ROWS episodes, of which it has every n-th.

    The episodes, from a rollout with the same random numbers everywhere, are the same on any
    number of ranks.
    """
    from trl_sync import SharedBackbone
    from trl_sync.ppo.experience import make_experience
    from trl_sync.ppo.rollout import roll_out, seeded
    from trl_sync.ppo.score import score

    backbone = SharedBackbone(tiny.llama(), runs.lora())
    runs.randomise(backbone)
    trainer = runs.make(folder, model=backbone, reward=letters, response_length=24)
    rank, size = rank_and_size()
    with seeded(torch.device("cpu"), 1):
        prompts = trainer.train_dataset.batch(range(ROWS))
        device = torch.device("cpu")
        rollout = roll_out(backbone, prompts, trainer.sampling, batch_size=ROWS, device=device)
    scored = score(backbone, rollout, trainer.rewards, temperature=1.0, batch_size=ROWS)
    # One process would have all episodes, so nothing is added over ranks here.
    experience, _ = make_experience(scored, trainer.args, lambda tensor: tensor)
    lengths = experience.response_mask.sum(1)
    own = torch.arange(ROWS)[rank::size]
    model = trainer.accelerator.prepare(backbone)
    model.train()
    loss = trainer.compute_loss(model, experience.micro_batch(own, lengths.sum()))
    trainer.accelerator.backward(loss)
    return {"gradients": runs.gradients(trainer), "tokens": int(lengths[own].sum())}


def short_run(folder: Path) -> dict[str, Any]:
    """A run of 12 updates: initial and trained parameters, log, and every micro-batch."""
    rank, _ = rank_and_size()
    model = tiny.llama()
    torch.manual_seed(1000 + rank)  # what a script may have drawn before
    scores: list[float] = []
    rollouts: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        rollouts.append(prompts)
        scores.extend(runs.count_e(prompts, completions))
        return scores[-len(prompts) :]

    trainer = runs.make(
        folder,
        model=model,
        reward=reward,
        kind=runs.WatchedTrainer,
        stop_token=None,
        gradient_accumulation_steps=2,
        peft_config=runs.lora(lora_dropout=0.1),
    )
    initial = runs.trained(trainer)
    trainer.train()
    positions = []
    for number, batch in enumerate(trainer.micro_batches):
        prompts = rollouts[number // 4]
        found = [
            trainer.processing_class.decode(ids[mask][:-8]).replace(" ", "")
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        positions.append([[p.replace(" ", "") for p in prompts].index(text) for text in found])
    return {
        "initial": initial,
        "trained": runs.trained(trainer),
        "log": [
            {k: v for k, v in row.items() if not k.startswith(("time/", "eps"))}
            for row in runs.rows(trainer)
        ],
        "scores": scores,
        "prompts": rollouts,
        "positions": positions,
        "advantages": [batch["advantages"] for batch in trainer.micro_batches],
        "denominators": [float(batch["loss_denominator"]) for batch in trainer.micro_batches],
    }


def evaluation(folder: Path) -> dict[str, Any]:
    trainer = runs.make(
        folder,
        reward=letters,
        eval_prompts=tiny.prompts(EVAL_PROMPTS),
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
    )
    return {"metrics": trainer.evaluate(), "completions": trainer.completions()}


def nan_on_rank_1(folder: Path) -> str:
    """What a run says whose reward function returns nan on rank 1 only."""
    from trl_sync.errors import RewardError

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [math.nan if rank_and_size()[0] == 1 else 1.0] * len(prompts)

    trainer = runs.make(
        folder, reward=reward, gradient_accumulation_steps=2, eval_prompts=tiny.prompts(3)
    )
    said = []
    for action in (trainer.train, trainer.evaluate):
        try:
            action()
        except RewardError as error:
            said.append(str(error))
    return "\n".join(said)


def broken_rollout_on_rank_1(folder: Path) -> str:
    """What a run says in which generation fails on rank 1 only."""
    import runs

    trainer = runs.make(folder)
    if rank_and_size()[0] == 1:
        trainer.backbone.causal_model.generate = out_of_memory
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("the run went on")


def broken_completions_on_rank_1(folder: Path) -> str:
    """What `completions` says where generation fails on rank 1 only."""
    import runs

    trainer = runs.make(folder, eval_prompts=tiny.prompts(4))
    if rank_and_size()[0] == 1:
        trainer.backbone.causal_model.generate = out_of_memory
    try:
        trainer.completions()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("there were completions")


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    """Stands for a failure of one device, which cannot be had on demand."""
    raise RuntimeError("out of memory, says the test")


def everything(folder: Path) -> str:
    """All of the above; tensors do not outlive their process, so they go through a file."""
    found = {
        "gradient": mini_batch_gradient(folder / "gradient"),
        "run": short_run(folder / "run"),
        "evaluation": evaluation(folder / "evaluation"),
        "nan": nan_on_rank_1(folder / "nan"),
        "rollout": broken_rollout_on_rank_1(folder / "rollout"),
        "completions": broken_completions_on_rank_1(folder / "completions"),
    }
    file = folder / f"rank_{rank_and_size()[0]}.pt"
    torch.save(found, file)
    return str(file)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    files = ranks.run_on_ranks(everything, tmp_path_factory.mktemp("ranks"))
    return [torch.load(file, weights_only=False) for file in files]


def of(both: list[dict[str, Any]], part: str, name: str) -> list[Any]:
    return [result[part][name] for result in both]


pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def test_the_gradient_of_a_mini_batch_is_that_of_one_process(
    both: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = mini_batch_gradient(tmp_path)
    tokens = of(both, "gradient", "tokens")
    assert sum(tokens) == alone["tokens"]
    assert tokens[0] != tokens[1]  # so the mean of the ranks' means would be another number
    first, second = of(both, "gradient", "gradients")
    assert runs.same(first, second)
    for name, expected in alone["gradients"].items():
        # fp32: sums of about 300 tokens in another order, relative to the largest entry.
        scale = expected.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(first[name], expected, rtol=0, atol=2e-5 * scale)


def test_adapters_are_drawn_alike_and_stay_alike(both: list[dict[str, Any]]) -> None:
    assert runs.same(*of(both, "run", "initial"))
    assert runs.same(*of(both, "run", "trained"))
    for result in both:
        assert not runs.same(result["run"]["initial"], result["run"]["trained"])


def test_each_rank_has_its_own_prompts_and_the_same_order(both: list[dict[str, Any]]) -> None:
    first, second = of(both, "run", "prompts")
    assert len(first) == len(second) == 3
    taken = [prompt for rank in (first, second) for batch in rank for prompt in batch]
    assert len(taken) == len(set(taken)) == 48
    # Both cut their halves of the batch into mini-batches in the same way, anew in every pass.
    # Inside a mini-batch each rank sorts its rows by their own lengths.
    positions = [[sorted(part) for part in parts] for parts in of(both, "run", "positions")]
    assert positions[0] == positions[1]
    parts = positions[0]
    passes = [parts[start] + parts[start + 1] for start in range(0, 12, 2)]
    assert all(sorted(order) == list(range(8)) for order in passes)
    assert len({tuple(order) for order in passes}) > 1


def test_metrics_are_the_same_on_all_ranks_and_span_them(both: list[dict[str, Any]]) -> None:
    first, second = of(both, "run", "log")
    assert first == second
    assert len(first) == 12
    scores = of(both, "run", "scores")
    assert scores[0] != scores[1]
    logged = [row["objective/scores"] for row in first if "objective/scores" in row]
    for number, value in enumerate(logged):
        of_batch = [s for rank in scores for s in rank[8 * number : 8 * number + 8]]
        assert value == pytest.approx(sum(of_batch) / 16)
    assert [row["episode"] for row in first] == [16] * 4 + [32] * 4 + [48] * 4


def test_advantages_are_whitened_over_all_ranks(both: list[dict[str, Any]]) -> None:
    # The first pass of the first iteration: 2 mini-batches of 4 episodes on each rank.
    own = [torch.cat(batches[:2]).double() for batches in of(both, "run", "advantages")]
    together = torch.cat(own)
    assert together.shape == (16, 8)
    assert together.mean().item() == pytest.approx(0, abs=1e-6)  # stored in fp32
    assert together.var().item() == pytest.approx(1, abs=1e-5)
    assert all(abs(part.mean().item()) > 1e-3 for part in own)
    # 8 episodes of 8 tokens in a global mini-batch.
    assert of(both, "run", "denominators") == [[64.0] * 12] * 2


def test_evaluation_with_an_uneven_number_of_prompts(both: list[dict[str, Any]]) -> None:
    metrics = of(both, "evaluation", "metrics")
    # The prompts have 3, 4, 5, 6 and 7 letters.
    for found in metrics:
        assert found["eval_objective/scores"] == pytest.approx(5.0)
    shared = [k for k in metrics[0] if k.startswith("eval_objective")]
    assert [metrics[0][k] for k in shared] == [metrics[1][k] for k in shared]


def test_completions_are_gathered_on_every_rank(both: list[dict[str, Any]]) -> None:
    first, second = of(both, "evaluation", "completions")
    assert first == second
    texts = [text.replace(" ", "") for text in first["query"]]
    assert sorted(texts) == sorted(p.replace(" ", "") for p in tiny.prompts(5)["prompt"])
    assert sorted(first["score"]) == [3, 4, 5, 6, 7]


def test_a_score_that_is_nan_on_one_rank_stops_both(both: list[dict[str, Any]]) -> None:
    on_0, on_1 = (result["nan"].splitlines() for result in both)
    assert len(on_0) == len(on_1) == 2  # in training and in evaluation
    assert all("failed on 1 other process" in text for text in on_0)
    assert all("reward gave episode 0 the score nan" in text for text in on_1)


@pytest.mark.parametrize("part", ["rollout", "completions"])
def test_generation_that_fails_on_one_rank_stops_both(
    both: list[dict[str, Any]], part: str
) -> None:
    on_0, on_1 = (result[part] for result in both)
    assert on_0.startswith("Rolling out or scoring failed on 1 other process(es)")
    assert on_1 == "out of memory, says the test"
