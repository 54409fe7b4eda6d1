"""Evaluation, completions and the best model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback

import runs
import tiny
from trl_sync.errors import ConfigError

METRICS = {"scores", "kl", "response_length", "stopped"}


class Scripted:
    """A reward whose n-th evaluation gives the n-th of `scores` to every prompt.

    Rows of the evaluation set are told apart by their column `split`.
    """

    __name__ = "scripted"

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def __call__(self, prompts: list[str], completions: list[str], split: list[str]) -> list[float]:
        if split[0] == "train":
            return runs.count_e(prompts, completions)
        return [self.scores.pop(0)] * len(prompts)


def split(name: str, number: int) -> Dataset:
    return tiny.prompts(number).add_column("split", [name] * number)


def length(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


def test_metrics_are_means_over_all_prompts_and_repeat_exactly(tmp_path: Path) -> None:
    # 5 prompts in batches of 2: the last batch is smaller.
    trainer = runs.train(
        tmp_path,
        reward=length,
        eval_prompts=tiny.prompts(5),
        per_device_eval_batch_size=2,
        stop_token=None,
        learning_rate=0.01,
        peft_config=runs.lora(lora_dropout=0.5),
    )
    assert trainer.backbone.training
    first = trainer.evaluate()
    for module in trainer.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # had it been active, the second time would differ
    trainer.backbone.train()
    second = trainer.evaluate()
    assert {f"eval_objective/{name}" for name in METRICS} <= first.keys()
    for name in METRICS:
        assert first[f"eval_objective/{name}"] == second[f"eval_objective/{name}"]
    # The prompts "a a", "bb a" ... "eeeee a" have 3, 4 ... 7 letters.
    expected = sum(len(prompt) for prompt in tiny.prompts(5)["prompt"]) / 5
    assert expected == 5
    assert first["eval_objective/response_length"] == 8
    assert first["eval_objective/stopped"] == 0
    assert first["eval_objective/kl"] != 0
    assert [row["eval_objective/kl"] for row in runs.rows(trainer, "eval_objective/kl")] == [
        first["eval_objective/kl"],
        second["eval_objective/kl"],
    ]


def test_scores_are_weighted_by_prompt_not_by_batch(tmp_path: Path) -> None:
    def first_letter(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(ord(prompt[0]) - ord("a")) for prompt in prompts]

    trainer = runs.make(
        tmp_path,
        reward=first_letter,
        eval_prompts=tiny.prompts(5),
        per_device_eval_batch_size=2,
    )
    # a to e count 0 to 4; the mean of the batches' means would be (0.5 + 2.5 + 4) / 3.
    assert trainer.evaluate()["eval_objective/scores"] == pytest.approx(2.0)
    assert trainer.evaluate(tiny.prompts(2))["eval_objective/scores"] == pytest.approx(0.5)
    assert trainer.evaluate(metric_key_prefix="test")["test_objective/scores"] == pytest.approx(2)


def test_several_evaluation_sets_at_their_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = runs.train(
        tmp_path,
        eval_prompts={"few": tiny.prompts(2), "more": tiny.prompts(7)},
        eval_strategy="steps",
        eval_steps=5,
        num_sample_generations=1,
    )
    for name in ("few", "more"):
        found = runs.rows(trainer, f"eval_{name}_objective/scores")
        assert [row["step"] for row in found] == [5, 10, 12]  # the last one at the end
    output = capsys.readouterr().out
    assert "step 12, few" in output
    assert "step 12, more" in output


def test_evaluation_and_completions_leave_training_as_it_is(tmp_path: Path) -> None:
    options: dict[str, Any] = {"peft_config": runs.lora(lora_dropout=0.2)}
    plain = runs.train(tmp_path / "plain", **options)
    watched = runs.train(
        tmp_path / "watched",
        **options,
        eval_prompts=tiny.prompts(5),
        eval_strategy="steps",
        eval_steps=1,
        num_sample_generations=3,
    )
    assert len(runs.rows(watched, "eval_objective/scores")) == 12
    assert runs.same(runs.trained(plain), runs.trained(watched))


@pytest.mark.parametrize("number, printed", [(3, [4, 8, 12]), (1, [12]), (0, [])])
def test_completions_are_printed_as_often_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, printed: list[int]
) -> None:
    runs.train(tmp_path, eval_prompts=tiny.prompts(3), num_sample_generations=number)
    output = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"^step (\d+)$", output, re.MULTILINE)] == printed
    assert ("model response" in output) == (number > 0)


def test_completions_answer_every_prompt_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = runs.make(tmp_path, eval_prompts=tiny.prompts(7), per_device_eval_batch_size=3)
    columns = trainer.completions()
    assert list(columns) == ["query", "model response", "score"]
    tokenizer = tiny.tokenizer()
    texts = [tokenizer.decode(tokenizer(p)["input_ids"]) for p in tiny.prompts(7)["prompt"]]
    assert columns["query"] == texts
    assert columns["score"] == runs.count_e([], columns["model response"])
    assert columns == trainer.completions()
    assert columns["model response"] != trainer.completions(greedy=True)["model response"]
    assert len(trainer.completions(num_batches=1)["query"]) == 3
    trainer.generate_completions()
    printed = capsys.readouterr().out
    assert all(f"query: {' '.join(text.split())}\n" in printed for text in texts)


def test_without_evaluation_prompts_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    trainer = runs.train(tmp_path, num_sample_generations=3)
    for evaluate in (trainer.evaluate, trainer.completions):
        with pytest.raises(ConfigError, match="pass eval_dataset"):
            evaluate()


def best_run(folder: Path, *scores: float, **changes: Any) -> tuple[Any, dict[int, Any]]:
    """A trained trainer and the weights at each evaluation."""
    seen: dict[int, Any] = {}

    def keep(state: Any, control: Any) -> None:
        seen[state.global_step] = runs.trained(trainer)

    trainer = runs.make(
        folder,
        reward=Scripted(*scores),
        prompts=split("train", 64),
        eval_prompts=split("eval", 3),
        callbacks=[runs.At("on_evaluate", keep)],
        eval_strategy="steps",
        metric_for_best_model="objective/scores",
        **changes,
    )
    trainer.train()
    return trainer, seen


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in (folder / "out").glob("checkpoint-*"))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer, seen = best_run(
        tmp_path,
        *(1, 3, 2),
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=4,
        eval_steps=4,
    )
    assert list(seen) == [4, 8, 12]
    assert trainer.state.best_metric == 3
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-8"
    assert runs.same(runs.trained(trainer), seen[8])
    assert not runs.same(seen[8], seen[12])


def test_only_the_best_is_saved_and_evaluations_wait_for_the_end_of_an_iteration(
    tmp_path: Path,
) -> None:
    # Due at 3, 6, 9 and 12.
    trainer, seen = best_run(
        tmp_path, *(1, 3, 2), save_strategy="best", eval_steps=3, logging_steps=5
    )
    assert list(seen) == [4, 8, 12]
    assert checkpoints(tmp_path) == [4, 8]
    assert trainer.state.best_metric == 3
    # A checkpoint holds no metrics that wait for the next log line, so they are logged before.
    assert [row["step"] for row in runs.rows(trainer)] == [4, 5, 8, 10, 12]


def test_evaluations_that_decide_on_nothing_happen_when_due(tmp_path: Path) -> None:
    trainer = runs.train(
        tmp_path, eval_prompts=tiny.prompts(2), eval_strategy="steps", eval_steps=3
    )
    steps = [row["step"] for row in runs.rows(trainer, "eval_objective/scores")]
    assert steps == [3, 6, 9, 12]


# Six evaluations would fit; the best is the second, the fourth is the second one after it.
BEST_IS_SECOND: dict[str, Any] = {
    "total_episodes": 96,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "load_best_model_at_end": True,
}


def stopped_early(folder: Path, *scores: float, eval_prompts: Any, metric: str) -> Any:
    """A trainer whose run ended early, with the best weights."""
    seen: dict[int, Any] = {}

    def keep(state: Any, control: Any) -> None:
        seen[state.global_step] = runs.trained(trainer)

    trainer = runs.make(
        folder,
        reward=Scripted(*scores),
        prompts=split("train", 64),
        eval_prompts=eval_prompts,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), runs.At("on_save", keep)],
        metric_for_best_model=metric,
        **BEST_IS_SECOND,
    )
    trainer.train()
    assert trainer.state.global_step == 16
    assert trainer.state.best_metric == 3
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-8"
    assert list(seen) == [4, 8, 12, 16]
    assert runs.same(runs.trained(trainer), seen[8])
    assert not runs.same(seen[8], seen[16])
    return trainer


@pytest.mark.parametrize("metric", ["eval_objective/scores", "objective/scores"])
def test_training_stops_early_when_the_scores_no_longer_rise(tmp_path: Path, metric: str) -> None:
    trainer = stopped_early(tmp_path, 1, 3, 2, 2, eval_prompts=split("eval", 3), metric=metric)
    scores = [row["eval_objective/scores"] for row in runs.rows(trainer, "eval_objective/scores")]
    assert scores == [1, 3, 2, 2]


def test_training_stops_early_by_one_of_several_evaluation_sets(tmp_path: Path) -> None:
    few, more = split("eval", 2), split("eval", 5)
    trainer = stopped_early(
        tmp_path,
        *(1, 7, 3, 8, 2, 9, 2, 10),  # of `few` and `more` in turn
        eval_prompts={"few": few, "more": more},
        metric="eval_few_objective/scores",
    )
    for name, expected in (("few", [1, 3, 2, 2]), ("more", [7, 8, 9, 10])):
        metric = f"eval_{name}_objective/scores"
        assert [row[metric] for row in runs.rows(trainer, metric)] == expected


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_no_evaluation_prompt_is_dropped(tmp_path: Path, batch_size: int) -> None:
    seen: list[str] = []

    def keep(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(prompts)

    sets = {"few": tiny.prompts(2), "more": tiny.prompts(7)}
    trainer = runs.make(
        tmp_path, reward=keep, eval_prompts=sets, per_device_eval_batch_size=batch_size
    )
    trainer.evaluate()
    assert sorted(seen) == sorted([*tiny.prompts(2)["prompt"], *tiny.prompts(7)["prompt"]])
