"""Every setting of the configuration takes effect in the trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import runs
import tiny
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.ppo import experience

# The names that TRL's PPOTrainer logs.
TRL_METRICS = {
    *("eps", "objective/kl", "objective/entropy", "objective/non_score_reward"),
    *("objective/rlhf_reward", "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg"),
    *("policy/entropy_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio"),
    *("val/ratio_var", "val/num_eos_tokens", "lr", "episode", "epoch"),
}


def test_all_metrics_of_trl_are_logged(tmp_path: Path) -> None:
    trainer = runs.train(tmp_path)
    first = runs.rows(trainer)[0]
    assert first.keys() >= TRL_METRICS
    assert all(math.isfinite(first[name]) for name in TRL_METRICS)
    assert [row["episode"] for row in runs.rows(trainer)] == [16] * 4 + [32] * 4 + [48] * 4
    # 64 prompts are 4 iterations of 4 updates.
    assert [row["epoch"] for row in runs.rows(trainer)] == [step / 16 for step in range(1, 13)]


def test_metrics_are_means_since_the_last_log_line(tmp_path: Path) -> None:
    every = runs.rows(runs.train(tmp_path / "every", logging_steps=1))
    third = runs.rows(runs.train(tmp_path / "third", logging_steps=3))
    assert [row["step"] for row in third] == [3, 6, 9, 12]
    for name in ("loss", "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "val/ratio"):
        for number, row in enumerate(third):
            parts = [e[name] for e in every[3 * number : 3 * number + 3]]
            # The loss is summed in fp32.
            assert row[name] == pytest.approx(sum(parts) / 3, rel=1e-5, abs=1e-7), name
    rollouts = [row["objective/scores"] for row in every if "objective/scores" in row]
    # The rollouts come before the updates 1, 5 and 9, so the fourth line has none.
    assert [row.get("objective/scores") for row in third] == [*rollouts, None]
    # Linear decay over 12 updates from 1e-3; the line shows the rate of its last update.
    assert [row["lr"] for row in third] == pytest.approx([1e-3 * k / 12 for k in (10, 7, 4, 1)])


def gradient_norms(folder: Path, **changes: Any) -> tuple[list[float], list[float]]:
    """The norms at each optimizer step, and the logged ones."""
    found: list[float] = []
    trainer = runs.make(
        folder,
        callbacks=[
            runs.At(
                "on_pre_optimizer_step",
                lambda *_: found.append(runs.norm(runs.gradients(trainer).values())),
            )
        ],
        **changes,
    )
    trainer.train()
    return found, [row["grad_norm"] for row in runs.rows(trainer)]


def test_gradients_are_clipped(tmp_path: Path) -> None:
    free, free_logged = gradient_norms(tmp_path / "free", max_grad_norm=0.0)
    clipped, logged = gradient_norms(tmp_path / "clipped", max_grad_norm=0.01)
    assert min(free) > 0.05
    assert clipped == pytest.approx([0.01] * 12, rel=1e-3)  # clipping adds 1e-6 to the norm
    # Logged is what the gradient was before.
    assert logged[0] == pytest.approx(free[0], rel=1e-5)
    assert free_logged == pytest.approx(free, rel=1e-5)


def test_gradient_checkpointing_recomputes_and_changes_no_number(tmp_path: Path) -> None:
    def run(checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        calls = [0]
        trainer = runs.make(
            tmp_path / str(checkpointing),
            kind=runs.WatchedTrainer,
            gradient_checkpointing=checkpointing,
            peft_config=runs.lora(lora_dropout=0.1),
        )

        def count(*_: Any) -> None:
            calls[0] += trainer.backbone.training and torch.is_grad_enabled()

        # The MLP sits inside a checkpointed layer, whose recomputation ends where the MLP's last
        # layer begins; scoring and generation run in evaluation mode.
        trainer.backbone.causal_model.model.layers[0].mlp.register_forward_pre_hook(count)
        trainer.train()
        assert len(trainer.micro_batches) == 24
        return runs.trained(trainer), calls[0]

    (plain, once), (checkpointed, twice) = run(False), run(True)
    assert once == 24
    assert twice == 48
    assert runs.same(plain, checkpointed)  # the same operations with the same dropout


def test_bf16_reaches_generation_scoring_rewards_and_training(tmp_path: Path) -> None:
    phases = ("generate", "score", "reward", "train")

    def dtypes(bf16: bool) -> tuple[dict[str, set[torch.dtype]], Any]:
        found: dict[str, set[torch.dtype]] = {phase: set() for phase in phases}
        reward = tiny.reward_llama()
        trainer = runs.make(
            tmp_path / str(bf16),
            reward=reward,
            kind=runs.WatchedTrainer,
            eval_prompts=tiny.prompts(3),
            bf16=bf16,
            total_episodes=32,
        )
        causal, generating = trainer.backbone.causal_model, [False]
        generate = causal.generate

        def watched(*args: Any, **kwargs: Any) -> Any:
            generating[0] = True
            try:
                return generate(*args, **kwargs)
            finally:
                generating[0] = False

        def keep(layer: Any, args: Any, output: Tensor) -> None:
            phase = "train" if trainer.backbone.training else "score"
            found["generate" if generating[0] else phase].add(output.dtype)

        causal.generate = watched
        causal.model.layers[0].self_attn.q_proj.register_forward_hook(keep)
        reward.model.layers[0].self_attn.q_proj.register_forward_hook(
            lambda layer, args, output: found["reward"].add(output.dtype)
        )
        trainer.evaluate()  # before accelerate prepares the model
        trainer.completions()
        trainer.train()
        assert all(p.dtype == torch.float32 for p in runs.trained(trainer).values())
        return found, trainer

    plain, _ = dtypes(False)
    assert plain == {phase: {torch.float32} for phase in phases}
    half, trainer = dtypes(True)
    assert half == {phase: {torch.bfloat16} for phase in phases}
    first = [m["ratio"] for m in trainer.micro_batches if m["step"] % runs.UPDATES == 0]
    # bf16 has 8 bits: other padding moves a log-probability by up to 4e-3 (docs of the design).
    assert max((ratio - 1).abs().max().item() for ratio in first) < 0.02


def test_weight_decay_and_learning_rate_are_those_of_adamw(tmp_path: Path) -> None:
    def one_update(weight_decay: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        backbone = SharedBackbone(tiny.llama(), runs.lora())
        runs.randomise(backbone)
        trainer = runs.make(
            tmp_path / str(weight_decay),
            model=backbone,
            weight_decay=weight_decay,
            learning_rate=0.01,
            num_ppo_epochs=1,
            num_mini_batches=1,
            total_episodes=16,
            max_grad_norm=0.0,
        )
        before = runs.trained(trainer)
        trainer.train()
        return before, runs.trained(trainer)

    before, plain = one_update(0.0)
    _, decayed = one_update(2.0)
    for name, tensor in before.items():
        decay = 0.0 if name.endswith("bias") else 0.01 * 2.0  # biases do not decay
        # AdamW takes lr * weight_decay * p off, apart from the gradient. fp32.
        torch.testing.assert_close(plain[name] - decayed[name], decay * tensor, rtol=0, atol=1e-6)
        # Its first step is lr * sign(gradient), but where the gradient is as small as epsilon.
        step = (plain[name] - tensor).abs()
        assert step.max() <= 0.01 * 1.001
        assert step.median() == pytest.approx(0.01, rel=0.01)


def test_a_callback_can_stop_training_inside_an_iteration(tmp_path: Path) -> None:
    def stop(state: Any, control: Any) -> None:
        control.should_training_stop = state.global_step == 5

    trainer = runs.train(tmp_path, callbacks=[runs.At("on_step_end", stop)])
    assert trainer.state.global_step == 5
    assert len(runs.rows(trainer, "objective/scores")) == 2


def returns_of_one_batch(folder: Path, **changes: Any) -> tuple[list[float], list[float]]:
    """The return at the first token and the score of each of 16 episodes of 8 tokens, sorted.

    The policy is still the reference, so there is no KL penalty, and lambda is 1.
    """
    scores: list[float] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        scores.extend(float(len(text)) for text in completions)
        return scores

    trainer = runs.train(
        folder,
        reward=reward,
        kind=runs.WatchedTrainer,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        num_ppo_epochs=1,
        num_mini_batches=1,
        total_episodes=16,
        stop_token=None,
        lam=1.0,
        **changes,
    )
    (batch,) = trainer.micro_batches
    return sorted(batch["returns"][:, 0].tolist()), sorted(scores)


def test_rewards_are_whitened_only_when_asked(tmp_path: Path) -> None:
    plain, scores = returns_of_one_batch(tmp_path / "plain")
    assert plain == pytest.approx(scores)  # all values are 0 as yet
    assert len(set(scores)) > 2
    whitened, scores = returns_of_one_batch(tmp_path / "whitened", whiten_rewards=True)
    # 16 x 8 tokens, each score on the last of its row and 0 elsewhere; the mean is not shifted.
    mean = sum(scores) / 128
    squares = sum((s - mean) ** 2 for s in scores) + (128 - 16) * mean**2
    scale = 1 / math.sqrt(squares / 127)
    expected = [(s - mean) * scale + mean + 7 * (mean - mean * scale) for s in scores]
    assert whitened == pytest.approx(expected, rel=1e-4)


def test_the_kl_estimator_is_used(tmp_path: Path) -> None:
    def kls(estimator: str) -> list[float]:
        trainer = runs.train(tmp_path / estimator, kl_estimator=estimator, learning_rate=0.01)
        return [row["objective/kl"] for row in runs.rows(trainer, "objective/kl")]

    k1, k3 = kls("k1"), kls("k3")
    assert k1[0] == k3[0] == pytest.approx(0, abs=1e-4)  # nothing is trained yet
    assert min(k1) < -1e-3  # of samples it may be negative, k3 never
    assert min(k3[1:]) > 1e-3


def test_without_a_stop_token_every_response_has_full_length(tmp_path: Path) -> None:
    trainer = runs.train(tmp_path, stop_token=None, kind=runs.WatchedTrainer, response_length=12)
    assert all(m["response_mask"].all() for m in trainer.micro_batches)
    assert all(m["response_mask"].shape[1] == 12 for m in trainer.micro_batches)
    # Ends of sequence do occur.
    assert any((m["input_ids"][:, -12:] == 1).any() for m in trainer.micro_batches)
    for row in runs.rows(trainer, "objective/scores"):
        assert row["objective/response_length"] == 12
        assert row["objective/stopped"] == row["val/num_eos_tokens"] == 0


def test_a_missing_end_of_sequence_costs_the_penalty(tmp_path: Path) -> None:
    trainer = runs.train(
        tmp_path,
        reward=lambda prompts, completions: [1.0] * len(prompts),
        missing_eos_penalty=0.5,
        response_length=24,
    )
    shares = set()
    for row in runs.rows(trainer, "objective/scores"):
        stopped = row["objective/stopped"]
        assert row["objective/scores"] == pytest.approx(1 - 0.5 * (1 - stopped))
        assert row["val/num_eos_tokens"] == 16 * stopped
        shares.add(stopped)
    assert 0 < min(shares) <= max(shares) < 1


@pytest.mark.parametrize("reward", [runs.count_e, "model"])
def test_a_padding_token_that_is_the_end_of_sequence_changes_nothing(
    tmp_path: Path, reward: Any
) -> None:
    def run(name: str, tokenizer: Any) -> Any:
        return runs.train(
            tmp_path / name,
            reward=tiny.reward_llama() if reward == "model" else reward,
            tokenizer=tokenizer,
            response_length=24,
        )

    apart, together = tiny.tokenizer(), tiny.tokenizer()
    together.pad_token = together.eos_token
    first, second = run("apart", apart), run("together", together)
    assert runs.same(runs.trained(first), runs.trained(second))
    stopped = [row["objective/stopped"] for row in runs.rows(second, "objective/stopped")]
    assert all(0 < share < 1 for share in stopped)


@pytest.mark.parametrize("kept", [0, 5])
def test_empty_responses_train_nothing_and_break_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    # Generation always gives a token, so responses without one come from a changed rollout.
    roll_out = experience.roll_out

    def emptied(*args: Any, **kwargs: Any) -> Any:
        rollout = roll_out(*args, **kwargs)
        rollout.response_mask[kept:] = False
        rollout.stopped[kept:] = False
        return rollout

    monkeypatch.setattr(experience, "roll_out", emptied)
    trainer = runs.make(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=16)
    before = runs.trained(trainer)
    trainer.train()
    after = runs.trained(trainer)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert runs.same(before, after) == (kept == 0)
    for row in runs.rows(trainer):
        assert all(math.isfinite(value) for value in row.values())
    assert runs.rows(trainer)[0]["objective/response_length"] <= kept * 8 / 16


def test_the_saved_policy_is_a_plain_peft_adapter(tmp_path: Path) -> None:
    trainer = runs.train(tmp_path, learning_rate=0.05, total_episodes=96)
    prompts = tiny.prompts(6)
    own = trainer.completions(prompts, greedy=True)
    trainer.save_model(str(tmp_path / "saved"))

    tokenizer = tiny.tokenizer()
    encoded = tokenizer(list(prompts["prompt"]), return_tensors="pt", padding=True)
    model = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "saved")).eval()

    def greedy(model: Any) -> list[str]:
        ids = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=8,
            do_sample=False,
        )
        new = ids[:, encoded["input_ids"].shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True)

    assert own["query"] == tokenizer.batch_decode(encoded["input_ids"], skip_special_tokens=True)
    assert own["model response"] == greedy(model)
    assert own["score"] == runs.count_e([], own["model response"])
    # The adapter says something: the base alone answers otherwise.
    assert own["model response"] != greedy(tiny.llama().eval())
