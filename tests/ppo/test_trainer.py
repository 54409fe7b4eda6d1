"""The loop: what happens when, ratios, gradients, and what moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import runs
import tiny
from trl_sync.backbone.shared import SharedBackbone

EVENTS = ("train_begin", "epoch_begin", "step_begin", "substep_end", "pre_optimizer_step")
EVENTS += ("optimizer_step", "step_end", "log", "evaluate", "save", "epoch_end", "train_end")


class Recorder(TrainerCallback):
    """Writes down every event of training."""

    def __init__(self) -> None:
        self.events: list[str] = []
        for name in EVENTS:
            setattr(self, f"on_{name}", self._recorder(name))

    def _recorder(self, name: str) -> Any:
        def record(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The metrics of an evaluation and of the whole run are logged too.
            if name != "log" or "loss" in state.log_history[-1]:
                self.events.append(name)

        return record


def documented_events(iterations: int) -> list[str]:
    """The pseudo-code of trl_sync/ppo/__init__.py, for 2 iterations an epoch.

    2 PPO epochs of 2 mini-batches of 2 micro-batches; evaluation and save at every iteration's end.
    """
    events = ["train_begin"]
    for iteration in range(iterations):
        events += ["epoch_begin"] if iteration % 2 == 0 else []
        events += ["rollout"]
        for update in range(4):
            events += ["step_begin", "substep_end"]
            events += ["pre_optimizer_step", "optimizer_step", "step_end", "log"]
            # Evaluation rolls out too.
            events += ["rollout", "evaluate", "save"] if update == 3 else []
        last = iteration == iterations - 1
        events += ["epoch_end"] if iteration % 2 == 1 or last else []
    return [*events, "train_end"]


def test_events_come_in_the_documented_order(tmp_path: Path) -> None:
    recorder = Recorder()

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        recorder.events.append("rollout")
        return runs.count_e(prompts, completions)

    # 40 prompts are 2 batches of 16 a pass, and 5 batches end in the middle of the third pass.
    trainer = runs.make(
        tmp_path,
        reward=reward,
        prompts=tiny.prompts(40),
        eval_prompts=tiny.prompts(3),
        callbacks=[recorder],
        total_episodes=80,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    assert recorder.events == documented_events(5)
    # 5 rollout batches, each with 2 PPO epochs of 2 mini-batches, also the last of each pass.
    assert recorder.events.count("optimizer_step") == 5 * 2 * 2
    assert trainer.state.global_step == 20
    assert trainer.state.epoch == 2.5
    assert trainer.episodes == 80


def test_each_pass_takes_every_prompt_at_most_once(tmp_path: Path) -> None:
    seen: list[str] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(prompts)
        return runs.count_e(prompts, completions)

    runs.train(tmp_path, reward=reward, prompts=tiny.prompts(40), total_episodes=96)
    passes = [seen[start : start + 32] for start in (0, 32, 64)]
    for taken in passes:
        assert len(taken) == len(set(taken)) == 32
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_the_ratio_is_1_before_the_first_update_of_every_iteration(
    tmp_path: Path, precision: str
) -> None:
    trainer = runs.train(
        tmp_path,
        model=runs.base(tmp_path, precision),
        kind=runs.WatchedTrainer,
        response_length=16,
        temperature=0.7,
        local_rollout_forward_batch_size=6,  # other neighbours and padding than in training
    )
    first: dict[int, float] = {}
    later: dict[int, float] = {}
    lengths = set()
    for micro_batch in trainer.micro_batches:
        step = micro_batch["step"]
        kind = first if step % runs.UPDATES == 0 else later
        deviation = (micro_batch["ratio"] - 1).abs().max().item()
        kind[step] = max(kind.get(step, 0.0), deviation)
        lengths |= set(micro_batch["response_mask"].sum(1).tolist())
    assert sorted(first) == [0, 4, 8]
    assert max(first.values()) < 1e-5  # fp32; other padding moves a log-probability by 1e-6
    # The updates are large enough that a ratio of something else would show.
    assert len(later) == 9
    assert min(later.values()) > 1e-3
    assert len(lengths) > 2


def test_lora_dropout_runs_in_training_and_never_in_rollout_or_scoring(tmp_path: Path) -> None:
    def old_minus_evaluated(trainer: Any, inputs: dict[str, Tensor], mode: bool) -> float:
        trainer.backbone.train(mode)
        with torch.no_grad():
            outputs = trainer.backbone(
                inputs["input_ids"], inputs["attention_mask"], inputs["response_mask"]
            )
        differences = [
            outputs["policy"]["logprobs"] - inputs["old_logprobs"],
            outputs["value"]["values"] - inputs["old_values"],
        ]
        return max(d.abs().max().item() for d in differences)

    found = []

    class Trainer(runs.WatchedTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            in_training = self.backbone.training
            if self.state.global_step % runs.UPDATES == 0:
                evaluated = old_minus_evaluated(self, inputs, mode=False)
                found.append((evaluated, old_minus_evaluated(self, inputs, mode=True)))
            self.backbone.train(in_training)
            return super().compute_loss(model, inputs, *args, **kwargs)

    backbone = SharedBackbone(tiny.llama(), runs.lora(lora_dropout=0.5))
    runs.randomise(backbone)
    trainer = runs.train(tmp_path, model=backbone, kind=Trainer)
    assert len(found) == 3 * 2  # the first update of 3 iterations has 2 micro-batches
    for evaluated, with_dropout in found:
        assert evaluated < 1e-5  # fp32
        assert with_dropout > 0.01
    first_updates = [m for m in trainer.micro_batches if m["step"] % runs.UPDATES == 0]
    assert all((m["ratio"] - 1).abs().max() > 0.001 for m in first_updates)


def first_gradient(folder: Path, per_device: int) -> tuple[dict[str, Tensor], list[int]]:
    """The gradient of the first of 2 mini-batches of 16 episodes, and its micro-batches' tokens."""
    found: list[dict[str, Tensor]] = []

    def keep(state: Any, control: Any) -> None:
        found.append(runs.gradients(trainer))
        control.should_training_stop = True

    backbone = SharedBackbone(tiny.llama(), runs.lora())
    runs.randomise(backbone)
    trainer = runs.make(
        folder,
        model=backbone,
        kind=runs.WatchedTrainer,
        callbacks=[runs.At("on_pre_optimizer_step", keep)],
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=32 // per_device,
        response_length=24,
        max_grad_norm=0.0,
    )
    trainer.train()
    tokens = [int(m["response_mask"].sum()) for m in trainer.micro_batches if m["step"] == 0]
    return found[0], tokens


def test_the_gradient_does_not_depend_on_the_cut_into_micro_batches(tmp_path: Path) -> None:
    whole, tokens = first_gradient(tmp_path / "16", 16)
    assert len(tokens) == 1
    for per_device in (8, 4, 1):
        cut, parts = first_gradient(tmp_path / str(per_device), per_device)
        assert len(parts) == 16 // per_device
        assert sum(parts) == tokens[0]
        assert len(set(parts)) > 1  # a mean of the micro-batches' means would be another number
        for name, expected in whole.items():
            # fp32: sums of about 300 tokens in another order, relative to the largest entry.
            scale = expected.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(cut[name], expected, rtol=0, atol=2e-5 * scale)


def base_tensors(model: Any) -> dict[str, Tensor]:
    """All that the base consists of, each constant of its quantization by a name of its own."""
    found = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    found |= dict(model.named_buffers())
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            found |= {f"{name}.absmax": state.absmax, f"{name}.code": state.code}
            found |= {f"{name}.absmax2": state.state2.absmax, f"{name}.code2": state.state2.code}
            found[f"{name}.offset"] = torch.as_tensor(state.offset)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def test_training_moves_policy_value_adapter_and_value_head_and_nothing_else(
    tmp_path: Path,
) -> None:
    trainer = runs.make(tmp_path, model=runs.base(tmp_path, "nf4"))
    causal = trainer.backbone.causal_model
    base, adapters = base_tensors(causal), runs.trained(trainer)
    assert sum(name.endswith(".absmax2") for name in base) == 14  # 7 linear layers in 2 blocks
    trainer.train()
    assert runs.same(base_tensors(causal), base)
    after = runs.trained(trainer)
    assert after.keys() == adapters.keys()
    for name, tensor in after.items():
        assert not torch.equal(tensor, adapters[name]), name
    kinds = (".policy.", ".value.", "value_head.")
    assert {kind for name in after for kind in kinds if kind in name} == set(kinds)
    assert all(sum(kind in name for kind in kinds) == 1 for name in after)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    def run(name: str, seed: int, drawn_before: int) -> Any:
        model = tiny.llama()
        torch.manual_seed(drawn_before)
        lora = runs.lora(lora_dropout=0.2)
        return runs.train(tmp_path / name, model=model, seed=seed, peft_config=lora)

    first, again = run("first", 1, drawn_before=1), run("again", 1, drawn_before=2)
    other = run("other", 2, drawn_before=1)
    assert runs.same(runs.trained(first), runs.trained(again))
    scores = [[r["objective/kl"] for r in runs.rows(t, "objective/kl")] for t in (first, again)]
    assert scores[0] == scores[1]
    assert not any(
        torch.equal(tensor, runs.trained(other)[name])
        for name, tensor in runs.trained(first).items()
    )


def test_rollouts_do_not_depend_on_what_else_is_drawn(tmp_path: Path) -> None:
    def draw(state: Any, control: Any) -> None:
        torch.rand(3)

    plain = runs.train(tmp_path / "plain")
    other = runs.train(tmp_path / "other", callbacks=[runs.At("on_substep_end", draw)])
    assert runs.same(runs.trained(plain), runs.trained(other))


def test_it_learns(tmp_path: Path) -> None:
    trainer = runs.train(
        tmp_path,
        # A random model's hidden states say little: without its head it could hardly learn.
        peft_config=runs.lora(target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], r=8),
        per_device_train_batch_size=8,
        total_episodes=32 * 14,
        learning_rate=3e-2,
        kl_coef=0.0,
    )
    scores = [row["objective/scores"] for row in runs.rows(trainer, "objective/scores")]
    assert len(scores) == 14
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    # A random model writes 8/64 letters e in 8 tokens; one that has learned writes little else.
    assert first < 0.5
    assert last > 4


def test_a_run_can_be_followed_by_another_with_the_same_trainer(tmp_path: Path) -> None:
    trainer = runs.make(tmp_path)
    trainer.train()
    after_one = runs.trained(trainer)
    trainer.train()
    assert trainer.state.global_step == 12
    assert not runs.same(runs.trained(trainer), after_one)
    assert len(runs.rows(trainer, "objective/scores")) == 3
