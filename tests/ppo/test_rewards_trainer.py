"""Reward sources inside a trainer: adapters on the base, several sources, scaled scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ranks
import runs
import tiny
from trl_sync import (
    DesyncError,
    PPOTrainer,
    SharedBackbone,
    SyncAuditCallback,
    load_shared_backbone,
)
from trl_sync.errors import ConfigError
from trl_sync.ppo.rewards import AdapterReward, ModelReward, WeightedRewards
from trl_sync.ppo.summary import model_state_bytes


def save_base_and_adapter(folder: Path) -> tuple[str, str]:
    """A causal LM, and a reward adapter with a trained head on it."""
    base = str(folder / "base")
    tiny.llama().save_pretrained(base)
    return base, save_adapter(base, str(folder / "judge"))


def save_adapter(base: str, adapter: str, **changes: Any) -> str:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.manual_seed(3)
    options = {"task_type": "SEQ_CLS", "init_lora_weights": False} | changes
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **options)
    )
    nn.init.normal_(adapted.base_model.model.score.modules_to_save["default"].weight)
    adapted.save_pretrained(adapter)
    return adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_base_and_adapter(tmp_path_factory.mktemp("models"))


def base_of(saved: tuple[str, str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(saved[0])


def backbone_of(saved: tuple[str, str], reward_adapter: str | None) -> SharedBackbone:
    torch.manual_seed(0)
    return load_shared_backbone(saved[0], runs.lora(), reward_adapter=reward_adapter)


def log_of(trainer: Any) -> list[dict[str, float]]:
    clock = ("time/", "eps")
    rows = runs.rows(trainer)
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def scores_of(trainer: Any) -> list[float]:
    return [row["objective/scores"] for row in runs.rows(trainer, "objective/scores")]


# --- An adapter on the shared base


def test_the_path_of_an_adapter_of_this_base_is_put_on_it(
    saved: tuple[str, str], tmp_path: Path
) -> None:
    trainer = runs.make(tmp_path, model=base_of(saved), reward=saved[1])
    assert isinstance(trainer.rewards, AdapterReward)
    assert trainer.backbone.reward_adapter_path == saved[1]
    before = trainer.backbone.reward_fingerprint()
    trainer.train()
    assert trainer.backbone.reward_fingerprint() == before

    # The same adapter on a base of its own: a model of another name is not this base.
    renamed = base_of(saved)
    renamed.config._name_or_path = "another"
    other = runs.make(tmp_path / "other", model=renamed, reward=saved[1])
    assert isinstance(other.rewards, ModelReward)
    other.train()
    # rel: fp32 scores of order 10, the same to about 1e-6, averaged over 16 episodes; learning
    # from them spreads what is left.
    assert scores_of(trainer) == pytest.approx(scores_of(other), rel=1e-4)
    sizes, others = model_state_bytes(trainer), model_state_bytes(other)
    # LoRA of rank 4 on q_proj (64 to 64) and up_proj (64 to 128) of two layers, and the head.
    assert sizes["reward"] == 4 * (2 * 4 * (64 + 64 + 64 + 128) + 64)
    # A second base, all but the LM head of 64 by 64.
    assert others["reward"] >= sizes["base"] - 4 * 64 * 64
    assert sizes["base"] == others["base"]


def test_an_adapter_that_cannot_share_the_base_gets_its_own(
    saved: tuple[str, str], tmp_path: Path
) -> None:
    adapter = save_adapter(saved[0], str(tmp_path / "dora"), use_dora=True)
    trainer = runs.make(tmp_path, model=base_of(saved), reward=adapter)
    assert isinstance(trainer.rewards, ModelReward)


def test_a_backbone_with_a_reward_adapter_needs_no_reward(
    saved: tuple[str, str], tmp_path: Path
) -> None:
    given = runs.train(tmp_path / "given", model=backbone_of(saved, saved[1]), reward=None)
    named = runs.train(tmp_path / "named", model=backbone_of(saved, None), reward=saved[1])
    both = runs.train(tmp_path / "both", model=backbone_of(saved, saved[1]), reward=saved[1])
    assert log_of(given) == log_of(named) == log_of(both)
    assert runs.same(runs.trained(given), runs.trained(named))
    assert runs.same(runs.trained(given), runs.trained(both))


def test_without_a_reward_adapter_a_reward_is_needed(
    saved: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="No reward source"):
        runs.make(tmp_path, model=backbone_of(saved, None), reward=None)


def test_two_adapters_of_this_base_are_refused(saved: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Several reward adapters of this base"):
        runs.make(tmp_path, model=base_of(saved), reward=[saved[1], saved[1]])


def test_an_adapter_and_a_function_are_added_up_and_logged(
    saved: tuple[str, str], tmp_path: Path
) -> None:
    seen: list[float] = []

    def length(completions: list[str], trainer_state: Any) -> list[float | None]:
        assert trainer_state.global_step % runs.UPDATES == 0
        found = [float(len(text)) if i % 3 else None for i, text in enumerate(completions)]
        seen[:] = [value for value in found if value is not None]
        return found

    trainer = runs.train(
        tmp_path,
        model=base_of(saved),
        reward=[saved[1], length],
        reward_weights=[0.5, 2.0],
        total_episodes=16,
        eval_prompts=tiny.prompts(5),
    )
    assert isinstance(trainer.rewards, WeightedRewards)
    row = runs.rows(trainer, "objective/scores")[0]
    assert 1 < len(seen) < 16  # or leaving episodes out would not be seen
    values = torch.tensor(seen)
    assert row["rewards/length/mean"] == pytest.approx(float(values.mean()))
    assert row["rewards/length/std"] == pytest.approx(float(values.std()), rel=1e-5)
    weighted = 0.5 * row["rewards/judge/mean"] * 16 + 2.0 * float(values.sum())
    assert row["objective/scores"] * 16 == pytest.approx(weighted, rel=1e-5)
    metrics = trainer.evaluate()
    assert {"eval_rewards/judge/mean", "eval_rewards/length/std"} <= set(metrics)
    completions = trainer.completions()
    # Scores of completions come from a pass of their own, with no other role.
    assert len(completions["score"]) == 5
    assert all(math.isfinite(score) for score in completions["score"])


def test_weights_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reward_weights has 2 entries, but there are 1"):
        runs.make(tmp_path, reward_weights=[1.0, 2.0])


def test_the_audit_watches_the_reward_adapter_as_a_frozen_role(
    saved: tuple[str, str], tmp_path: Path
) -> None:
    def disturb(state: Any, control: Any) -> None:
        if disturbed and state.global_step == 2:
            with torch.no_grad():
                dict(trainer.backbone.role_parameters("reward"))["score_head.weight"].add_(1.0)

    for disturbed in (False, True):
        folder = tmp_path / str(disturbed)
        callbacks = [runs.At("on_step_end", disturb), SyncAuditCallback(frozen_cover_steps=1)]
        trainer = runs.make(folder, model=base_of(saved), reward=saved[1], callbacks=callbacks)
        if disturbed:
            with pytest.raises(DesyncError, match=r"score_head\.weight"):
                trainer.train()
        else:
            trainer.train()


def test_separate_models_take_every_kind_of_reward(saved: tuple[str, str], tmp_path: Path) -> None:
    policy = base_of(saved)
    trainer = PPOTrainer(
        tiny.config(tmp_path / "out", reward_weights=[1.0, 2.0], total_episodes=16),
        tiny.tokenizer(),
        policy,
        reward_model=[saved[1], runs.count_e],
        train_dataset=tiny.prompts(),
        value_model=tiny.reward_llama(),
    )
    # The policy trains in full, so an adapter on what it was needs a base of its own.
    assert isinstance(trainer.rewards.sources[0], ModelReward)
    trainer.train()
    assert "rewards/judge/mean" in runs.rows(trainer, "objective/scores")[0]


# --- Rewards on tokens


def test_rewards_on_tokens_reach_the_loss(tmp_path: Path) -> None:
    def ones(completion_ids: list[list[int]]) -> list[list[float]]:
        return [[1.0] * len(ids) for ids in completion_ids]

    trainer = runs.make(
        tmp_path, reward=ones, kl_coef=0.0, gamma=1.0, lam=1.0, kind=runs.WatchedTrainer
    )
    with torch.no_grad():
        trainer.backbone.value_head.weight.zero_()
    trainer.train()
    batch = trainer.micro_batches[0]
    # Values are 0, so the return of a token counts it and the tokens behind it.
    mask = batch["response_mask"]
    behind = mask.flip(1).cumsum(1).flip(1).float().masked_fill(~mask, 0.0)
    assert torch.equal(batch["returns"], behind)


# --- Scaled scores


def test_scores_are_scaled_by_the_moments_of_the_run(tmp_path: Path) -> None:
    raw: list[list[float]] = []

    def counted(prompts: list[str], completions: list[str]) -> list[float]:
        raw.append([5.0 + value for value in runs.count_e(prompts, completions)])
        return raw[-1]

    trainer = runs.make(
        tmp_path,
        reward=counted,
        use_score_scaling=True,
        use_score_norm=True,
        eval_prompts=tiny.prompts(5),
        per_device_eval_batch_size=5,
    )
    trainer.train()
    seen = torch.tensor(raw).double()
    for number, row in enumerate(runs.rows(trainer, "objective/raw_scores")):
        so_far = seen[: number + 1].flatten()
        expected = (seen[number].mean() - so_far.mean()) / so_far.std()
        assert row["objective/raw_scores"] == pytest.approx(float(seen[number].mean()))
        # abs: fp32 scores of order 1.
        assert row["objective/scores"] == pytest.approx(float(expected), abs=1e-5)
    state = trainer.score_moments.state_dict()
    metrics = trainer.evaluate()
    # Evaluation scales with them, and leaves them as they are.
    assert trainer.score_moments.state_dict() == state
    expected = (torch.tensor(raw[-1]).mean() - state["mean"]) / state["std"]
    assert metrics["eval_objective/scores"] == pytest.approx(float(expected), abs=1e-5)
    assert metrics["eval_objective/raw_scores"] == pytest.approx(sum(raw[-1]) / 5)


def test_a_run_with_scaled_scores_continues_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"use_score_scaling": True, "score_clip": 2.0}
    saving = {"save_strategy": "steps", "save_steps": runs.UPDATES}
    whole = runs.train(tmp_path / "whole", **settings)
    runs.train(tmp_path / "cut", **settings, **saving)
    resumed = runs.make(tmp_path / "cut", **settings, **saving)
    checkpoint = tmp_path / "cut" / "out" / f"checkpoint-{runs.UPDATES}"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert runs.same(runs.trained(whole), runs.trained(resumed))
    assert whole.score_moments.state_dict() == resumed.score_moments.state_dict()
    assert whole.score_moments.count == 48


# --- Two ranks


def letters(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if len(prompt) == 5 else float(len(prompt)) for prompt in prompts]


def on_a_rank(folder: Path, base: str, adapter: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(base)
    seen: list[float | None] = []

    def recorded(prompts: list[str], completions: list[str]) -> list[float | None]:
        seen.extend(letters(prompts, completions))
        return letters(prompts, completions)

    trainer = runs.train(
        folder,
        model=model,
        reward=[adapter, recorded],
        gradient_accumulation_steps=2,
        total_episodes=16,
        use_score_scaling=True,
    )
    return {
        "seen": seen,
        "row": runs.rows(trainer, "objective/scores")[0],
        "moments": trainer.score_moments.state_dict(),
        "trained": {name: p.tolist() for name, p in runs.trained(trainer).items()},
    }


@pytest.mark.ranks
def test_sources_are_logged_and_scaled_over_all_ranks(
    saved: tuple[str, str], tmp_path: Path
) -> None:
    first, second = ranks.run_on_ranks(on_a_rank, tmp_path, *saved)
    assert first["moments"] == second["moments"]
    assert first["moments"]["count"] == 16
    assert first["trained"] == second["trained"]
    values = torch.tensor([v for v in [*first["seen"], *second["seen"]] if v is not None])
    assert 1 < len(values) < 16
    assert first["row"]["rewards/recorded/mean"] == pytest.approx(float(values.mean()))
    assert first["row"]["rewards/recorded/std"] == pytest.approx(float(values.std()), rel=1e-5)
    assert first["row"]["objective/raw_scores"] == pytest.approx(first["moments"]["mean"], rel=1e-5)
