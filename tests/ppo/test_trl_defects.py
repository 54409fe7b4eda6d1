"""The defects of TRL 1.12's PPOTrainer that docs/migration.md lists, by their numbers there.

Each test runs both ways of holding the models where the defect could come back in both.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig, TrainerCallback

import runs
import tiny
from trl_sync import ConfigError, PPOTrainer
from trl_sync.ppo.advantage import place_rewards, whiten

KINDS = ("shared", "separate")


class Recorder(TrainerCallback):
    """The events of a run in their order, each with the optimizer updates done by then."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def named(self, name: str) -> list[int]:
        return [step for event, step in self.events if event == name]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("pre_optimizer_step", state.global_step))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("optimizer_step", state.global_step))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("evaluate", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.events.append(("log", state.global_step))


def make(kind: str, folder: Path, **options: Any) -> PPOTrainer:
    """A trainer on a shared base, or of four models."""
    arguments: dict[str, Any] = {
        "model": tiny.llama(),
        "reward_model": runs.count_e,
        "train_dataset": tiny.prompts(),
        "processing_class": tiny.tokenizer(),
    }
    if kind == "shared":
        arguments["peft_config"] = runs.lora()
    else:
        arguments["value_model"] = tiny.reward_llama(seed=3)
    known = (*arguments, "eval_dataset", "callbacks", "ref_model", "value_model", "peft_config")
    arguments |= {name: options.pop(name) for name in known if name in options}
    return PPOTrainer(args=tiny.config(folder / "out", **options), **arguments)


def train(kind: str, folder: Path, **options: Any) -> PPOTrainer:
    trainer = make(kind, folder, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_defect_01_mini_batches_are_optimizer_steps(tmp_path: Path, kind: str) -> None:
    """Four micro-batches in four mini-batches, twice: TRL took 2 steps; its ratio was 1/4."""
    recorder = Recorder()
    trainer = train(
        kind,
        tmp_path,
        gradient_accumulation_steps=4,
        num_mini_batches=4,
        num_ppo_epochs=2,
        total_episodes=16,
        learning_rate=1e-5,
        callbacks=[recorder],
    )
    assert len(recorder.named("optimizer_step")) == 8
    rows = runs.rows(trainer)
    assert all(row["val/ratio"] == pytest.approx(1.0, abs=0.1) for row in rows)
    # Of a policy that is close to uniform over 64 tokens, in nats.
    assert rows[0]["policy/entropy_avg"] == pytest.approx(math.log(64), rel=0.05)


def test_defect_02_accumulation_is_the_same_to_the_end_of_each_pass(tmp_path: Path) -> None:
    """TRL stepped on every micro-batch of the last batch, and for good after an evaluation."""
    recorder = Recorder()
    substeps: list[int] = []
    count = runs.At("on_substep_end", lambda state, control: substeps.append(state.global_step))
    train(
        "separate",
        tmp_path,
        gradient_accumulation_steps=4,
        num_mini_batches=1,
        total_episodes=128,  # two passes over the prompts
        eval_dataset=tiny.prompts(4),
        num_sample_generations=10,
        callbacks=[recorder, count],
    )
    assert recorder.named("optimizer_step") == list(range(16))
    assert substeps == [step for step in range(16) for _ in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_defect_03_bf16_is_used(tmp_path: Path, kind: str) -> None:
    trainer = make(kind, tmp_path, bf16=True)
    found: set[torch.dtype] = set()
    layer = trainer.backbone.causal_model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: found.add(output.dtype))
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert found == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_defect_04_gradient_checkpointing_is_enabled(tmp_path: Path, kind: str) -> None:
    """TRL's wrapper never did, and would have told the policy alone."""
    trainer = make(kind, tmp_path, gradient_checkpointing=True)
    passes = {"policy": 0, "value": 0}

    def counter(role: str) -> Any:
        def count(*_: Any) -> None:
            passes[role] += torch.is_grad_enabled()

        return count

    policy = trainer.backbone.causal_model.model
    policy.layers[0].mlp.register_forward_pre_hook(counter("policy"))
    if kind == "separate":
        trainer.value_model.model.layers[0].mlp.register_forward_pre_hook(counter("value"))
    trainer.train()
    micro_batches = 12 * 2
    # One pass forward and one that recomputes it.
    assert passes["policy"] == 2 * micro_batches
    assert passes["value"] == (2 * micro_batches if kind == "separate" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_defect_05_the_training_loop_is_whole(tmp_path: Path, kind: str) -> None:
    """Clipping, stopping, logging steps, evaluation, and every optimizer step told to callbacks."""
    recorder = Recorder()
    norms: list[float] = []

    def after_clipping(state: Any, control: Any) -> None:
        norms.append(runs.norm(p.grad for p in trainer.backbone.parameters() if p.requires_grad))

    def stop(state: Any, control: Any) -> None:
        control.should_training_stop = state.global_step == 8

    trainer = make(
        kind,
        tmp_path,
        max_grad_norm=0.01,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        eval_dataset=tiny.prompts(3),
        callbacks=[
            recorder,
            runs.At("on_pre_optimizer_step", after_clipping),
            runs.At("on_step_end", stop),
        ],
    )
    trainer.train()
    assert norms
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    assert trainer.state.global_step == 8
    assert recorder.named("optimizer_step") == list(range(8))
    assert recorder.named("evaluate") == [4, 8]
    assert recorder.named("log") == [2, 4, 6, 8]


def test_defect_06_the_penalty_is_for_the_configured_stop_token(tmp_path: Path) -> None:
    """TRL looked for eos, whatever token was to end the responses."""
    tokenizer = tiny.tokenizer()
    stop = tokenizer.convert_tokens_to_ids("e")
    trainer = train(
        "separate",
        tmp_path,
        reward_model=lambda prompts, completions, **columns: [0.0] * len(prompts),
        stop_token=None,
        stop_token_id=stop,
        missing_eos_penalty=1.0,
        response_length=30,
    )
    row = runs.rows(trainer, "objective/scores")[0]
    assert 0.1 < row["objective/stopped"] < 0.9, "all or none stopped: nothing to tell apart"
    assert row["objective/scores"] == pytest.approx(row["objective/stopped"] - 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_defect_06_padding_that_is_eos_hides_nothing(tmp_path: Path, kind: str) -> None:
    """TRL took every eos of a prompt or response for padding."""

    def first_row(pad_token: str) -> dict[str, float]:
        tokenizer = tiny.tokenizer()
        tokenizer.pad_token = pad_token
        prompts = tiny.prompts().map(lambda row: {"prompt": row["prompt"] + "[EOS]"})
        trainer = train(
            kind, tmp_path / pad_token, processing_class=tokenizer, train_dataset=prompts
        )
        row = runs.rows(trainer)[0]
        return {n: v for n, v in row.items() if not n.startswith(("time/", "eps"))}

    assert first_row("[PAD]") == first_row("[EOS]")


def test_defect_07_the_saved_generation_config_stops_at_eos(tmp_path: Path) -> None:
    policy = tiny.llama()
    assert policy.generation_config.eos_token_id == 1
    trainer = train("separate", tmp_path, model=policy, stop_token=None)
    trainer.save_model()
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 1


@pytest.mark.parametrize("kind", KINDS)
def test_defect_08_sampling_inherits_nothing_from_the_model(tmp_path: Path, kind: str) -> None:
    """With a stored repetition penalty of 5 TRL's ratio was 0.990 before anything had moved."""
    policy = tiny.llama()
    policy.generation_config.repetition_penalty = 5.0
    trainer = train(kind, tmp_path, model=policy, learning_rate=0.0)
    plain = train(kind, tmp_path / "plain", learning_rate=0.0)
    for row, without in zip(runs.rows(trainer), runs.rows(plain), strict=True):
        assert row["val/ratio"] == pytest.approx(1.0, abs=1e-6)
        assert row["loss"] == without["loss"], "other responses were sampled"


@pytest.mark.parametrize("kind", KINDS)
def test_defect_10_before_the_first_update_the_ratio_is_1(tmp_path: Path, kind: str) -> None:
    """Also with attention dropout, which TRL left on, and in bf16, where TRL compared fp32."""
    for number, settings in enumerate(({}, {"bf16": True})):
        trainer = train(
            kind,
            tmp_path / str(number),
            model=tiny.llama(attention_dropout=0.5),
            num_mini_batches=1,
            num_ppo_epochs=1,
            gradient_accumulation_steps=1,
            per_device_train_batch_size=8,
            total_episodes=8,
            **settings,
        )
        row = runs.rows(trainer)[0]
        # bf16 has 8 bits; another left padding moves a log-probability by 4e-3.
        bound = 2e-2 if settings else 1e-5
        assert row["val/ratio"] == pytest.approx(1.0, abs=bound)
        assert row["val/ratio_var"] < bound**2


def test_defect_10_lora_dropout_is_what_the_user_asked_for(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make("separate", tmp_path, peft_config=config)
    seen: set[bool] = set()
    layer = trainer.policy_model.base_model.model.model.layers[0].self_attn.q_proj
    dropout = layer.lora_dropout["default"]
    dropout.register_forward_hook(
        lambda module, args, output: seen.add(module.training and torch.is_grad_enabled())
    )
    trainer.train()
    assert dropout.p == 0.5
    assert seen == {True, False}, "on in training, off in rollouts and scoring"


@pytest.mark.parametrize("kind", KINDS)
def test_defect_13_a_dataset_smaller_than_a_batch_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match="has 15 prompts, fewer than one rollout batch of 16"):
        make(kind, tmp_path, train_dataset=tiny.prompts(15))


@pytest.mark.parametrize("kind", KINDS)
def test_defect_14_the_same_seed_gives_the_same_weights(tmp_path: Path, kind: str) -> None:
    def weights(name: str, seed: int) -> Any:
        torch.manual_seed(len(name))  # whatever was drawn before
        trainer = train(kind, tmp_path / name, seed=seed)
        return runs.trained(trainer)

    first = weights("first", 3)
    assert runs.same(first, weights("again, later", 3))
    assert not runs.same(first, weights("other", 4))


@pytest.mark.parametrize("kind", KINDS)
def test_defect_15_empty_responses_leave_the_losses_finite(tmp_path: Path, kind: str) -> None:
    """A response may have no token at all; TRL's loss was NaN, and averages counted padding."""
    from trl_sync.ppo import experience

    roll_out = experience.roll_out

    def with_empty_ones(*args: Any, **kwargs: Any) -> Any:
        rollout = roll_out(*args, **kwargs)
        mask = rollout.response_mask.clone()
        mask[::2] = False
        return type(rollout)(
            **{name: getattr(rollout, name) for name in rollout.__slots__}
            | {"response_mask": mask, "stopped": rollout.stopped & mask.any(1)}
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experience, "roll_out", with_empty_ones)
        trainer = train(
            kind,
            tmp_path,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=16,
            stop_token=None,
        )
    for row in runs.rows(trainer):
        assert math.isfinite(row["loss/policy_avg"])
        assert math.isfinite(row["loss/value_avg"])
        # Of the tokens that are there: averaged with as many padded ones it would be half.
        assert row["policy/entropy_avg"] == pytest.approx(math.log(64), rel=0.05)


def test_defect_16_the_value_model_of_a_peft_run_is_an_adapter(tmp_path: Path) -> None:
    """TRL trained it in full: 20.8 of 21.8 thousand parameters."""
    trainer = make("shared", tmp_path)
    trainable = sum(p.numel() for p in trainer.backbone.parameters() if p.requires_grad)
    base = trainer.backbone.causal_model.num_parameters()
    named = dict(trainer.backbone.role_parameters("value"))
    assert all("lora_" in name or name.startswith("value_head.") for name in named)
    assert trainable < 0.3 * base  # rank 4 on layers of width 64 to 128


def test_defect_17_advantages_are_whitened_over_all_processes() -> None:
    """By hand: two processes with one token each; each alone would be whitened to zero."""
    mask = torch.tensor([[True]])
    total = {0: torch.tensor([4.0, 2.0]).double(), 1: torch.tensor(2.0).double()}
    calls: list[Any] = []

    def over_both(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        return total[len(calls) - 1]

    found = whiten(torch.tensor([[1.0]]), mask, reduce_sum=over_both)
    # Values 1 and 3: mean 2, variance 2, so (1 - 2) / sqrt(2).
    assert float(found) == pytest.approx(-1 / math.sqrt(2))


def test_defect_17_the_score_stands_on_the_last_token_of_the_response() -> None:
    """TRL put it one token behind, unless the response filled the limit."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = place_rewards(torch.tensor([5.0, 7.0]), torch.zeros(2, 3), mask, 0.1)
    assert rewards.tolist() == [[0.0, 5.0, 0.0], [0.0, 0.0, 7.0]]


def test_defect_18_the_null_reference_context_ends_also_after_an_error(tmp_path: Path) -> None:
    trainer = make("separate", tmp_path, peft_config=runs.lora())
    with torch.no_grad():
        for name, parameter in trainer.policy_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = trainer.policy_model(ids).logits
    with pytest.raises(ZeroDivisionError), trainer.null_ref_context():
        raise ZeroDivisionError
    with torch.no_grad():
        assert trainer.policy_model(ids).logits.equal(before)
    assert all(p.requires_grad for n, p in trainer.policy_model.named_parameters() if "lora_" in n)


def test_defect_18_several_evaluation_sets_and_no_prompt_dropped(tmp_path: Path) -> None:
    trainer = make(
        "separate",
        tmp_path,
        eval_dataset={"short": tiny.prompts(3), "long": tiny.prompts(5)},
        per_device_eval_batch_size=2,
    )
    metrics = trainer.evaluate()
    assert {"eval_short_objective/scores", "eval_long_objective/scores"} <= metrics.keys()
    assert len(trainer.completions("long")["query"]) == 5


def test_what_is_passed_is_not_changed(tmp_path: Path) -> None:
    """PEFT writes the resolved modules into the configuration that it is given."""
    config = runs.lora()
    before = copy.deepcopy(config.to_dict())
    make("separate", tmp_path, peft_config=config)
    assert config.to_dict() == before
