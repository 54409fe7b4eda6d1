"""The options that TRL's trainer does not have, in whole runs; by hand where that is possible."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import audit_log
import runs
import tiny
from trl_sync import PPOTrainer, SyncAuditCallback
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError
from trl_sync.ppo.batch import PromptBatch, Rollout, ScoredRollout
from trl_sync.ppo.experience import make_experience
from trl_sync.ppo.summary import summarize
from trl_sync.ppo.updates import check_optimizers, skip_rest_of_iteration, split_off

SAVES = {"save_strategy": "steps", "save_steps": 4}
# Far below what one update of the tiny runs does, far above the rounding of a ratio of 1.
TINY_KL = 1e-10


class Steps(TrainerCallback):
    """The global step at the beginning of each update, and the learning rate it used."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.rates: list[float] = []
        self.evaluated: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun.append(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(state.global_step)


def of_role(trainer: Any, role: str) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.backbone.role_parameters(role)}


def comparable(trainer: Any) -> list[dict[str, Any]]:
    """The training log without what the clock decides."""
    clock = ("time/", "eps")
    return [{k: v for k, v in r.items() if not k.startswith(clock)} for r in runs.rows(trainer)]


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run without any option."""
    return runs.train(tmp_path_factory.mktemp("default"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_kl": 1e9},
        {"ratio_threshold": 1e9},
        {"cliprange_high": 0.2},
        {"value_learning_rate": 1e-3},
        {"value_lam": 0.95},
        {"generation_kwargs": {"top_k": 0}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_asks_for_nothing_changes_no_bit(
    tmp_path: Path, default: Any, options: dict[str, Any]
) -> None:
    trainer = runs.train(tmp_path, **options)
    assert runs.same(runs.trained(trainer), runs.trained(default))
    for row, expected in zip(comparable(trainer), comparable(default), strict=True):
        assert {name: row[name] for name in expected} == expected


def test_the_options_log_nothing_unless_they_are_set(default: Any) -> None:
    names = {"policy/skipped_updates", "policy/skipped_micro_batches", "value_lr"}
    assert not names & {name for row in runs.rows(default) for name in row}


# --- kl_coef=0: the reference has nothing to say


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_without_a_penalty_training_does_not_ask_the_reference(
    tmp_path: Path, kl_coef: float
) -> None:
    trainer = runs.make(tmp_path, kl_coef=kl_coef, eval_prompts=tiny.prompts(4))
    asked: list[tuple[str, ...]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        asked.append(tuple(kwargs["roles"]))

    trainer.backbone.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    updates, rollouts = ("policy", "value"), ("policy", "reference", "value")
    assert set(asked) == {updates} | ({rollouts} if kl_coef else set())
    found = [row for row in runs.rows(trainer) if "objective/scores" in row]
    assert all(("objective/kl" in row) == (kl_coef > 0) for row in found)
    if not kl_coef:
        assert all(row["objective/rlhf_reward"] == row["objective/scores"] for row in found)
    assert (summarize(trainer, wall_s=1.0)["kl_last"] is None) == (kl_coef == 0)
    # An evaluation tells how far the policy has gone in any case.
    assert "eval_objective/kl" in trainer.evaluate()


# --- target_kl: the rest of an iteration is skipped

# 2 iterations an epoch, 5 in all: passes of 2, 2 and 1 iterations of 4 updates.
TWO_AND_A_HALF_PASSES = {"prompts": tiny.prompts(40), "total_episodes": 80}


def test_an_update_that_went_too_far_is_the_last_of_its_iteration(tmp_path: Path) -> None:
    seen: list[str] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(prompts)
        return runs.count_e(prompts, completions)

    steps = Steps()
    trainer = runs.train(
        tmp_path, target_kl=TINY_KL, reward=reward, callbacks=[steps], **TWO_AND_A_HALF_PASSES
    )
    # The first update of an iteration starts from ratio 1, the second finds what the first did.
    assert steps.begun == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17]
    # Linear decay over 20 steps: the rate stays a function of the step.
    assert steps.rates == pytest.approx([1e-3 * (20 - step) / 20 for step in steps.begun])
    assert trainer.state.global_step == trainer.state.max_steps == 20
    assert trainer.state.epoch == 2.5
    assert trainer.episodes == len(seen) == 80
    for start, stop in ((0, 32), (32, 64), (64, 80)):
        assert len(set(seen[start:stop])) == stop - start
    rows = runs.rows(trainer)
    assert [row["step"] for row in rows] == [1, 4, 5, 8, 9, 12, 13, 16, 17, 20]
    assert [row.get("policy/skipped_updates") for row in rows] == [None, 2.0] * 5
    assert [row["episode"] for row in rows] == [n for n in (16, 32, 48, 64, 80) for _ in (1, 2)]
    assert all(row["policy/approxkl_avg"] > 1.5 * TINY_KL for row in rows[1::2])
    assert all(row["policy/approxkl_avg"] < 1.5 * TINY_KL for row in rows[::2])


def test_already_the_first_update_may_be_the_last(tmp_path: Path) -> None:
    # With dropout the ratio is not 1 in the first update.
    backbone = SharedBackbone(tiny.llama(), runs.lora(lora_dropout=0.5))
    runs.randomise(backbone)
    steps = Steps()
    trainer = runs.train(tmp_path, model=backbone, target_kl=TINY_KL, callbacks=[steps])
    assert steps.begun == [0, 4, 8]
    assert trainer.state.global_step == 12
    assert [row["policy/skipped_updates"] for row in runs.rows(trainer)] == [3.0] * 3


def test_only_what_exceeds_one_and_a_half_times_the_target_is_skipped(
    tmp_path: Path, default: Any
) -> None:
    found = [row["policy/approxkl_avg"] for row in runs.rows(default)][:4]
    assert found[0] < found[1]
    # The second update lies just above 1.5 times the one target and just below that of the other.
    lengths = []
    for number, target in enumerate((found[1] / 1.51, found[1] / 1.49)):
        steps = Steps()
        runs.train(tmp_path / str(number), target_kl=target, callbacks=[steps])
        lengths.append(len([step for step in steps.begun if step < 4]))
    # With the second target the third update ends the iteration, or the fourth with nothing left.
    assert lengths == [2, 3 if found[2] > 1.5 * found[1] / 1.49 else 4]


def test_nothing_is_skipped_after_the_last_update_of_an_iteration(default: Any) -> None:
    state = dataclasses.replace(default.state, global_step=8)
    control = dataclasses.replace(default.control, should_log=False)
    scheduler = default.lr_scheduler
    before = scheduler.state_dict()
    assert skip_rest_of_iteration(default.plan, default.args, state, control, scheduler) == 0
    assert state.global_step == 8
    assert not control.should_log
    assert scheduler.state_dict() == before


def test_what_is_due_at_a_skipped_step_happens_at_the_end_of_the_iteration(tmp_path: Path) -> None:
    steps = Steps()
    trainer = runs.train(
        tmp_path,
        target_kl=TINY_KL,
        callbacks=[steps],
        eval_prompts=tiny.prompts(3),
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    # Updates begin at 0, 1, 4, 5, 8 and 9. Step 3 is skipped and due at 4; the update that ends at
    # 6 goes too far, so 6 is due at 8; 9 is due at 9, but its save waits for the end, 12.
    assert [row["step"] for row in runs.rows(trainer)] == [4, 8, 9, 12]
    assert steps.evaluated == [4, 8, 9, 12]
    saved = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == [4, 8, 12]


def test_a_run_resumes_after_a_skip_bit_for_bit(tmp_path: Path) -> None:
    options = {"target_kl": TINY_KL, "peft_config": runs.lora(lora_dropout=0.1), **SAVES}
    options |= TWO_AND_A_HALF_PASSES
    whole = runs.train(tmp_path, **options)
    expected = runs.trained(whole), whole.optimizer.state_dict(), comparable(whole)
    for step in (4, 8):  # inside the first pass, and at its end
        resumed = runs.make(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert runs.same(runs.trained(resumed), expected[0])
        assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
        for name, state in resumed.optimizer.state_dict()["state"].items():
            assert runs.same(state, expected[1]["state"][name])
        assert comparable(resumed) == expected[2]


# --- ratio_threshold


def test_micro_batches_above_the_ratio_threshold_move_nothing(tmp_path: Path) -> None:
    trainer = runs.make(tmp_path, ratio_threshold=0.5)  # below every ratio
    before = runs.trained(trainer)
    trainer.train()
    assert runs.same(runs.trained(trainer), before)
    rows = runs.rows(trainer)
    # 2 micro-batches an update.
    assert [row["policy/skipped_micro_batches"] for row in rows] == [2.0] * 12
    assert [row["loss/policy_avg"] for row in rows] == [0.0] * 12
    assert [row["val/ratio"] for row in rows] == pytest.approx([1.0] * 12, abs=1e-6)  # fp32


# --- cliprange_high


def test_the_upper_clip_range_reaches_the_loss(tmp_path: Path, default: Any) -> None:
    trainer = runs.train(tmp_path, cliprange_high=1e-4)
    clipped = [row["policy/clipfrac_avg"] for row in runs.rows(trainer)]
    plain = [row["policy/clipfrac_avg"] for row in runs.rows(default)]
    assert clipped[0] == plain[0] == 0.0
    assert sum(clipped[1:4]) > sum(plain[1:4]) + 0.1


# --- value_learning_rate


def first_step(folder: Path, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the first update of plain gradient descent moved, and its gradients."""
    gradients: list[dict[str, Tensor]] = []

    def keep(state: Any, control: Any) -> None:
        gradients.append(runs.gradients(trainer))

    def stop(state: Any, control: Any) -> None:
        control.should_training_stop = True

    backbone = SharedBackbone(tiny.llama(), runs.lora())
    runs.randomise(backbone)
    callbacks = [runs.At("on_pre_optimizer_step", keep), runs.At("on_step_end", stop)]
    trainer = runs.make(
        folder,
        model=backbone,
        callbacks=callbacks,
        optim="sgd",
        max_grad_norm=0.0,
        **changes,
    )
    before = runs.trained(trainer)
    trainer.train()
    after = runs.trained(trainer)
    return {name: after[name] - before[name] for name in after}, gradients[0]


def test_the_value_model_has_its_own_rate(tmp_path: Path) -> None:
    moved, gradients = first_step(tmp_path, learning_rate=0.5, value_learning_rate=2.0)
    kinds = set()
    for name, gradient in gradients.items():
        rate = 2.0 if ".value." in name or name.startswith("value_head") else 0.5
        kinds.add(rate)
        # fp32: the difference of two numbers near 0.1.
        torch.testing.assert_close(moved[name], -rate * gradient, rtol=1e-4, atol=1e-7)
    assert kinds == {2.0, 0.5}


def test_both_rates_follow_the_schedule_and_are_logged(tmp_path: Path) -> None:
    trainer = runs.train(tmp_path, value_learning_rate=5e-3, weight_decay=0.1)
    rows = runs.rows(trainer)
    shares = [(12 - step) / 12 for step in range(12)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * share for share in shares])
    assert [row["value_lr"] for row in rows] == pytest.approx([5e-3 * share for share in shares])
    # Every parameter has one group; biases still have no weight decay.
    groups = trainer.optimizer.param_groups
    found = [id(p) for group in groups for p in group["params"]]
    trained = {id(p): n for n, p in trainer.backbone.named_parameters() if p.requires_grad}
    assert sorted(found) == sorted(trained)
    undecayed = [trained[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]]
    assert undecayed == ["value_head.bias"]


def test_the_value_rate_continues_after_resuming(tmp_path: Path) -> None:
    options = {"value_learning_rate": 5e-3, **SAVES}
    whole = runs.train(tmp_path, **options)
    resumed = runs.make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert runs.same(runs.trained(resumed), runs.trained(whole))
    assert comparable(resumed) == comparable(whole)


def test_a_ready_made_optimizer_and_a_value_rate_exclude_each_other(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = tiny.config(tmp_path, value_learning_rate=1e-4)
    with pytest.raises(ConfigError, match=r"value_learning_rate=0.0001 .* made already"):
        check_optimizers(config, (optimizer, None))
    check_optimizers(config, (None, None))
    check_optimizers(tiny.config(tmp_path), (optimizer, None))


def test_an_optimizer_without_the_value_models_parameters_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match="SGD has 0 of the value model's 1 parameters"):
        split_off(optimizer, [torch.nn.Parameter(torch.zeros(2))], 1e-4)


# --- value_lam


def scored_by_hand() -> ScoredRollout:
    """Three tokens and one of padding; KL 0, score 4."""
    mask = torch.tensor([[True, True, True, False]])
    rollout = Rollout(
        prompts=PromptBatch(prompts=["a"], token_ids=[[5]], columns={}),
        prompt_ids=torch.tensor([[5]]),
        prompt_mask=torch.tensor([[True]]),
        response_ids=torch.tensor([[6, 7, 1, 0]]),
        response_mask=mask,
        stopped=torch.tensor([True]),
    )
    logprobs = torch.tensor([[-1.0, -2.0, -1.0, 0.0]])
    return ScoredRollout(
        rollout=rollout,
        logprobs=logprobs,
        reference_logprobs=logprobs,
        entropies=torch.ones(1, 4),
        values=torch.tensor([[1.0, 2.0, 2.0, 0.0]]),
        scores=torch.tensor([4.0]),
    )


@pytest.mark.parametrize(
    ("value_lam", "returns"),
    [
        # gamma 0.5; rewards 0, 0, 4; delta: 0 + 1 - 1 = 0; 0 + 1 - 2 = -1; 4 - 2 = 2
        # lambda 0.5: A = 2; -1 + 0.25 * 2 = -0.5; 0 + 0.25 * -0.5 = -0.125; G = A + V
        (None, [0.875, 1.5, 4.0, 0.0]),
        (0.5, [0.875, 1.5, 4.0, 0.0]),
        # lambda 1: the discounted sum of rewards, whatever the values: 4; 2; 1
        (1.0, [1.0, 2.0, 4.0, 0.0]),
        # lambda 0: one step and the next value: 0.5 * 2 = 1; 0.5 * 2 = 1; 4
        (0.0, [1.0, 1.0, 4.0, 0.0]),
    ],
)
def test_decoupled_gae_by_hand(tmp_path: Path, value_lam: float | None, returns: Any) -> None:
    config = tiny.config(tmp_path, gamma=0.5, lam=0.5, value_lam=value_lam)
    found, _ = make_experience(scored_by_hand(), config, lambda tensor: tensor)
    assert found.returns.tolist() == [returns]
    # The advantages -0.125, -0.5, 2 have mean 1.375 / 3 and keep lam = 0.5: whitened.
    advantages = torch.tensor([-0.125, -0.5, 2.0], dtype=torch.float64)
    expected = (advantages - advantages.mean()) / advantages.std()
    torch.testing.assert_close(found.advantages[0, :3].double(), expected, atol=1e-6, rtol=0)


# --- value_warmup_steps


class Watch(TrainerCallback):
    """Policy and value parameters after every update."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.policy: list[dict[str, Tensor]] = []
        self.value: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.policy.append(of_role(self.trainer, "policy"))
        self.value.append(of_role(self.trainer, "value"))


def test_the_policy_stands_still_while_the_value_model_warms_up(tmp_path: Path) -> None:
    backbone = SharedBackbone(tiny.llama(), runs.lora())
    runs.randomise(backbone)
    watch = Watch()
    trainer = runs.make(
        tmp_path, model=backbone, callbacks=[watch], value_warmup_steps=5, weight_decay=0.1
    )
    watch.trainer = trainer
    before = of_role(trainer, "policy")
    trainer.train()
    still = [runs.same(before, now) for now in watch.policy]
    assert still == [True] * 5 + [False] * 7
    # From then on every parameter moves, as it would have from the start.
    assert not any(torch.equal(before[name], watch.policy[5][name]) for name in before)
    for earlier, later in zip(watch.value[:-1], watch.value[1:], strict=True):
        assert not any(torch.equal(earlier[name], later[name]) for name in earlier)
    rows = runs.rows(trainer)
    assert [row["policy/approxkl_avg"] < 1e-9 for row in rows[:6]] == [True] * 6
    assert rows[7]["policy/approxkl_avg"] > 1e-7


def test_the_norm_that_clips_is_the_value_models_alone_during_the_warmup(tmp_path: Path) -> None:
    found: list[float] = []

    def keep(state: Any, control: Any) -> None:
        if state.global_step == 11:  # the only update in which the policy learns
            return
        # The policy's gradients are gone by now, or zero.
        gradients = [p.grad for _, p in trainer.backbone.role_parameters("value")]
        assert all(p.grad is None for _, p in trainer.backbone.role_parameters("policy"))
        found.append(runs.norm(gradients))

    trainer = runs.make(
        tmp_path,
        callbacks=[runs.At("on_pre_optimizer_step", keep)],
        value_warmup_steps=11,
        max_grad_norm=0.0,
    )
    trainer.train()
    logged = [row["grad_norm"] for row in runs.rows(trainer)][:11]
    assert logged == pytest.approx(found, rel=1e-5)


def test_the_warmup_goes_on_after_resuming(tmp_path: Path) -> None:
    options = {"value_warmup_steps": 6, **SAVES}
    whole = runs.train(tmp_path, **options)
    resumed = runs.make(tmp_path, **options)
    before = of_role(resumed, "policy")
    watch = Watch()
    watch.trainer = resumed
    resumed.add_callback(watch)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert [runs.same(before, now) for now in watch.policy] == [True] * 2 + [False] * 6
    assert runs.same(runs.trained(resumed), runs.trained(whole))


# --- num_generations


def collect(seen: list[Any]) -> Callable[..., list[float]]:
    def reward(prompts: list[str], completions: list[str], number: list[int]) -> list[float]:
        seen.append(list(zip(prompts, completions, number, strict=True)))
        return runs.count_e(prompts, completions)

    return reward


def numbered(rows: int) -> Any:
    return tiny.prompts(rows).add_column("number", list(range(rows)))


def test_each_prompt_is_answered_several_times(tmp_path: Path) -> None:
    seen: list[Any] = []
    # 10 prompts, 4 a batch: 2 iterations a pass.
    options = {"prompts": numbered(10), "num_generations": 4, "total_episodes": 64, **SAVES}
    trainer = runs.train(tmp_path, reward=collect(seen), **options)
    assert trainer.plan.iterations_per_epoch == 2
    assert trainer.state.global_step == 16
    assert trainer.state.epoch == 2.0
    assert trainer.episodes == 64
    for batch in seen:
        assert Counter(Counter(number for _, _, number in batch).values()) == {4: 4}
        for number in {number for _, _, number in batch}:
            group = [row for row in batch if row[2] == number]
            assert len({prompt for prompt, _, _ in group}) == 1
            # 64^8 responses are about equally likely.
            assert len({completion for _, completion, _ in group}) == 4
    passes = [{row[2] for batch in seen[i : i + 2] for row in batch} for i in (0, 2)]
    assert [len(numbers) for numbers in passes] == [8, 8]
    resumed = runs.make(tmp_path, reward=collect([]), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert runs.same(runs.trained(resumed), runs.trained(trainer))


# --- Four models


def test_the_options_hold_for_separate_models_too(tmp_path: Path) -> None:
    watch = Watch()
    model = tiny.llama()
    model.generation_config.repetition_penalty = 5.0
    trainer = PPOTrainer(
        tiny.config(
            tmp_path,
            target_kl=TINY_KL,
            value_warmup_steps=5,
            value_learning_rate=5e-4,
            num_generations=2,
            learning_rate=1e-4,
            weight_decay=0.1,
        ),
        tiny.tokenizer(),
        model,
        reward_model=runs.count_e,
        train_dataset=tiny.prompts(),
        value_model=tiny.reward_llama(),
        callbacks=[watch],
    )
    watch.trainer = trainer
    before = of_role(trainer, "policy")
    value_before = of_role(trainer, "value")
    trainer.train()
    # 4 updates, then 3 (the policy moves in the second, the third finds it), then 2.
    assert [runs.same(before, now) for now in watch.policy[:5]] == [True] * 5
    assert not any(torch.equal(before[name], watch.policy[-1][name]) for name in before)
    assert not runs.same(value_before, watch.value[0])
    rows = runs.rows(trainer)
    assert rows[-1]["step"] == 12
    assert [row["policy/skipped_updates"] for row in rows if "policy/skipped_updates" in row] == [
        *(0.0, 1.0, 2.0)
    ]
    shares = [(13 - step) / 12 for step in (1, 2, 3, 4, 5, 6, 7, 9, 10)]
    assert [row["value_lr"] for row in rows] == pytest.approx([5e-4 * share for share in shares])
    # Inherited by sampling, the penalty would bend the first ratio.
    assert rows[0]["val/ratio"] == pytest.approx(1, abs=1e-6)


# --- Under the audit


def test_the_audit_finds_nothing_in_skips_warmup_and_frozen_micro_batches(tmp_path: Path) -> None:
    audit = SyncAuditCallback()
    with audit_log.logged() as said:
        trainer = runs.train(
            tmp_path,
            callbacks=[audit],
            target_kl=TINY_KL,
            value_warmup_steps=5,
            value_learning_rate=5e-3,
            total_episodes=96,
            **SAVES,
        )
    assert trainer.state.global_step == 24
    summary = audit.summary()
    assert summary.desyncs == 0
    assert summary.audits > 12
    assert said == []
