"""`step`: numbers of TRL 0.11.4, numbers by hand, settings that must take effect, wrong input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import step_loops
import tiny
from trl_sync.errors import ConfigError, RewardError
from trl_sync.legacy import (
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
)
from trl_sync.legacy.losses import add_scores, advantages_and_returns, kl_penalties

# What TRL 0.11.4 itself measured in three steps on these models and batches (`recorded_run`), on
# transformers 5.23 and torch 2.13.
RECORDED: list[tuple[bool, dict[str, Any], dict[str, list[float]]]] = [
    (
        False,
        {},
        {
            "objective/kl": [0.0, -0.1801553, 0.06117249],
            "objective/entropy": [19.92695, 20.01213, 21.76002],
            "objective/kl_coef": [0.2, 0.199968, 0.199936],
            "ppo/mean_non_score_reward": [0.0, 0.007584274, -0.002329635],
            "ppo/loss/policy": [-0.1147826, -0.2024656, -0.08685292],
            "ppo/loss/value": [0.131937, 0.1885783, 0.4030639],
            "ppo/policy/entropy": [4.140691, 4.139107, 4.140935],
            "ppo/policy/approxkl": [0.07409649, 0.04315953, 0.01664421],
            "ppo/returns/mean": [-0.1584142, 0.1021754, -0.3604739],
            "ppo/returns/var": [0.1373746, 0.1884083, 0.8020687],
            "ppo/val/vpred": [-0.147499, 0.1361884, -0.2072697],
            "ppo/val/var_explained": [-0.2298733, -0.5511109, 0.1547931],
        },
    ),
    (
        False,
        {"gradient_accumulation_steps": 2},
        {
            "objective/kl": [0.0, -0.078776, 0.0520719],
            "objective/entropy": [19.92695, 19.91075, 21.76912],
            "ppo/loss/policy": [-0.1133183, -0.1811409, -0.06906693],
            "ppo/loss/value": [0.1235633, 0.2011304, 0.4281785],
            "ppo/policy/approxkl": [0.03721623, 0.02025157, 0.008862166],
            "ppo/val/vpred": [-0.1323358, 0.04618307, -0.2103758],
        },
    ),
    (
        True,
        {"kl_penalty": "full"},
        {
            "objective/kl": [0.09124464, 0.09030774, 0.1069399],
            "objective/entropy": [19.80744, 19.78733, 21.69575],
            "ppo/mean_non_score_reward": [-0.00384188, -0.003801823, -0.004072597],
            "ppo/loss/policy": [-0.01716838, -0.08431557, 0.00285211],
            "ppo/loss/value": [0.1480928, 0.2014217, 0.4325072],
            "ppo/policy/approxkl": [0.001401665, 0.0001102108, 0.0002905396],
            "ppo/val/vpred": [-0.03034347, 0.2107708, -0.07396889],
        },
    ),
    (
        False,
        {"score_clip": 0.3, "kl_penalty": "mse", "gamma": 0.9, "lam": 0.7},
        {
            "objective/kl": [0.0, 0.0309524, 0.04261477],
            "ppo/loss/policy": [-0.1101991, -0.1431248, -0.08860809],
            "ppo/loss/value": [0.1054296, 0.0643819, 0.04582534],
            "ppo/returns/mean": [-0.1166366, 0.05281138, -0.09574817],
            "ppo/returns/var": [0.04395546, 0.02628373, 0.027623],
            "ppo/val/var_explained": [-2.566318, -3.577425, -2.23473],
        },
    ),
]
STATISTICS = {
    *("objective/kl", "objective/kl_dist", "objective/logprobs", "objective/ref_logprobs"),
    *("objective/kl_coef", "objective/entropy", "ppo/mean_non_score_reward", "ppo/mean_scores"),
    *("ppo/std_scores", "ppo/learning_rate", "ppo/loss/policy", "ppo/loss/value"),
    *("ppo/loss/total", "ppo/policy/entropy", "ppo/policy/approxkl", "ppo/policy/policykl"),
    *("ppo/policy/clipfrac", "ppo/policy/advantages", "ppo/policy/advantages_mean"),
    *("ppo/policy/ratio", "ppo/returns/mean", "ppo/returns/var", "ppo/val/vpred"),
    *("ppo/val/error", "ppo/val/clipfrac", "ppo/val/mean", "ppo/val/var"),
    *("ppo/val/var_explained", "tokens/queries_len_mean", "tokens/queries_len_std"),
    *("tokens/queries_dist", "tokens/responses_len_mean", "tokens/responses_len_std"),
    *("tokens/responses_dist", "time/ppo/forward_pass", "time/ppo/compute_rewards"),
    *("time/ppo/compute_advantages", "time/ppo/optimize_step", "time/ppo/calc_stats"),
    "time/ppo/total",
}


def recorded_run(peft: bool, settings: dict[str, Any]) -> list[dict[str, Any]]:
    policy = step_loops.model(peft)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    trainer = step_loops.trainer(
        step_loops.config(**settings), policy, optimizer=optimizer, lr_scheduler=scheduler
    )
    stats = [trainer.step(*step_loops.episodes(seed)) for seed in range(3)]
    assert [row["ppo/learning_rate"] for row in stats] == [0.05, 0.025, 0.0125]
    return stats


@pytest.mark.parametrize("peft, settings, expected", RECORDED)
def test_three_steps_are_those_of_trl(
    peft: bool, settings: dict[str, Any], expected: dict[str, list[float]]
) -> None:
    stats = recorded_run(peft, settings)
    for name, values in expected.items():
        found = [row[name] for row in stats]
        # fp32 over 8 updates, recorded to 7 digits
        np.testing.assert_allclose(found, values, rtol=2e-4, atol=2e-6, err_msg=name)


def test_a_step_returns_every_statistic_of_trl() -> None:
    stats = step_loops.trainer().step(*step_loops.episodes(0))
    assert set(stats) == STATISTICS
    arrays = {name for name, value in stats.items() if isinstance(value, np.ndarray)}
    assert arrays == {
        *("objective/kl_dist", "objective/logprobs", "objective/ref_logprobs"),
        *("ppo/policy/advantages", "ppo/policy/ratio"),
        *("tokens/queries_dist", "tokens/responses_dist"),
    }
    assert all(isinstance(value, float) for name, value in stats.items() if name not in arrays)


# --- the mathematics, by hand -------------------------------------------------------------------


def test_kl_penalties_by_hand() -> None:
    logprobs, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.5]])
    assert kl_penalties(logprobs, reference, "kl").tolist() == [[1.0, -0.5]]
    assert kl_penalties(logprobs, reference, "abs").tolist() == [[1.0, 0.5]]
    assert kl_penalties(logprobs, reference, "mse").tolist() == [[0.5, 0.125]]
    # (1/2, 1/2) against (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3
    pair = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    torch.testing.assert_close(kl_penalties(*pair, "full"), torch.tensor([[expected]]))


def test_scores_stand_on_the_last_token_that_counts() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    placed = add_scores(torch.full((3, 4), 0.5), torch.tensor([1.0, 2.0, 3.0]), mask)
    assert placed.tolist() == [[0.5, 0.5, 1.5, 0.5], [0.5] * 4, [0.5, 0.5, 0.5, 3.5]]


def test_advantages_pass_over_tokens_that_are_no_actions() -> None:
    """Rewards 1, 2, 4 and values 0, 1, 2 at the counted positions; gamma = lambda = 0.5.

    From behind: 4 - 2 = 2; 2 + 0.5 * 2 - 1 + 0.25 * 2 = 2.5; 1 + 0.5 * 1 + 0.25 * 2.5 = 2.125.
    """
    mask = torch.tensor([[0, 1, 0, 1, 1, 0]])
    rewards = torch.tensor([[9.0, 1.0, 9.0, 2.0, 4.0, 9.0]])
    values = torch.tensor([[9.0, 0.0, 9.0, 1.0, 2.0, 9.0]])
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0, 2.125, 0, 2.5, 2, 0]]
    assert returns.tolist() == [[0, 2.125, 0, 3.5, 4, 0]]


def test_masks_come_from_lengths_on_either_side() -> None:
    """Also where the padding token is a token of the response."""
    queries = [torch.tensor([5, 6]), torch.tensor([7])]
    responses = [torch.tensor([0, 9]), torch.tensor([1, 0, 0])]

    def pad_left(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        width = 5
        return {
            name: torch.stack(
                [nn.functional.pad(f[name], (width - len(f[name]), 0)) for f in features]
            )
            for name in ("input_ids", "attention_mask")
        }

    settings = step_loops.config(batch_size=2, mini_batch_size=2)
    for collator, expected in (
        (None, [[0, 1, 1], [1, 1, 1]]),
        (pad_left, [[0, 0, 1, 1], [0, 1, 1, 1]]),
    ):
        trainer = step_loops.trainer(settings, training_data_collator=collator)
        inputs = trainer.prepare_model_inputs(queries, responses)
        with torch.no_grad():
            *_, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
        assert mask.tolist() == expected


def test_log_probabilities_and_values_are_those_of_single_sequences() -> None:
    trainer = step_loops.trainer()
    queries, responses, _ = step_loops.episodes(0)
    with torch.no_grad():
        inputs = trainer.prepare_model_inputs(queries, responses)
        logprobs, logits, values, mask = trainer.batched_forward_pass(
            trainer.model, queries, responses, inputs, return_logits=True
        )
        assert logits.shape == (*logprobs.shape, 64)
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            tokens = torch.cat([query, response])
            single, _, value = trainer.model(tokens.unsqueeze(0))
            chosen = single[0].log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]
            counted = mask[row].bool()
            # fp32, attention with and without padding
            torch.testing.assert_close(
                logprobs[row, counted], chosen[-len(response) :], atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                values[row, counted], value[0, -len(response) - 1 : -1], atol=1e-5, rtol=1e-5
            )


# --- settings -----------------------------------------------------------------------------------


def moved_by(settings: PPOConfig, *, learning_rate: float = 0.05) -> dict[str, Tensor]:
    trainer = step_loops.trainer(settings, learning_rate=learning_rate)
    before = step_loops.parameters(trainer)
    trainer.step(*step_loops.episodes(0))
    after = step_loops.parameters(trainer)
    return {name: after[name] - before[name] for name in before}


def test_max_grad_norm_clips() -> None:
    """TRL took the setting and did nothing from the second update on."""
    norms = []
    for limit in (None, 1e-3):
        settings = step_loops.config(ppo_epochs=1, max_grad_norm=limit)
        changes = moved_by(settings, learning_rate=1.0)
        norms.append(math.sqrt(sum(float(c.double().square().sum()) for c in changes.values())))
    assert norms[0] > 0.1
    # two updates, each of length 1e-3 at most
    assert 1e-4 < norms[1] < 2.001e-3


def counted_updates(trainer: Any) -> list[int]:
    """A list that grows with every step of the optimizer."""
    updates: list[int] = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: updates.append(1))
    return updates


def test_accumulated_mini_batches_are_one_update() -> None:
    """The mean of the mini-batches' gradients: TRL issues 321, 583 and 648."""
    seen: dict[int, int] = {}
    for accumulated in (1, 2):
        trainer = step_loops.trainer(
            step_loops.config(gradient_accumulation_steps=accumulated, ppo_epochs=2),
            learning_rate=0.05,
        )
        updates = counted_updates(trainer)
        trainer.step(*step_loops.episodes(0))
        seen[accumulated] = len(updates)
    assert seen == {1: 4, 2: 2}


def test_accumulation_does_not_depend_on_the_data_loader() -> None:
    """On the last batch of a loader accelerate would end every accumulation early."""
    rows = Dataset.from_dict({"query": ["a"] * 8})
    settings = step_loops.config(gradient_accumulation_steps=2, ppo_epochs=1)
    trainer = step_loops.trainer(settings, learning_rate=0.05, dataset=rows)
    updates = counted_updates(trainer)
    for _ in trainer.dataloader:
        trainer.step(*step_loops.episodes(0))
    assert len(updates) == 1


def test_early_stopping_ends_the_passes() -> None:
    calls = []

    class Counting(PPOTrainer):
        def train_minibatch(self, *args: Any) -> dict[str, Tensor]:
            calls.append(1)
            return super().train_minibatch(*args)

    for settings, expected in (
        ({}, 8),
        # the mean of old - new log-probabilities over the last mini-batch exceeds this at once
        ({"early_stopping": True, "target_kl": 1e-9}, 2),
    ):
        calls.clear()
        trainer = step_loops.trainer(
            step_loops.config(**settings), learning_rate=0.5, kind=Counting
        )
        trainer._early_stop = lambda kl, stop=trainer._early_stop: stop(kl.abs())
        trainer.step(*step_loops.episodes(0))
        assert len(calls) == expected


def test_a_ratio_above_the_threshold_leaves_the_mini_batch_out() -> None:
    settings = step_loops.config(ratio_threshold=0.5)
    with pytest.warns(UserWarning, match="A mini-batch was left out"):
        changes = moved_by(settings)
    assert max(float(change.abs().max()) for change in changes.values()) == 0


def test_an_infinite_ratio_leaves_no_nan() -> None:
    trainer = step_loops.trainer(step_loops.config(ppo_epochs=1), learning_rate=0.05)
    forward = trainer.batched_forward_pass

    def shifted(*args: Any, **options: Any) -> Any:
        logprobs, *others = forward(*args, **options)
        return (logprobs + (200.0 if torch.is_grad_enabled() else 0.0), *others)

    trainer.batched_forward_pass = shifted
    with pytest.warns(UserWarning, match="A mini-batch was left out"):
        trainer.step(*step_loops.episodes(0))
    assert all(bool(p.isfinite().all()) for p in step_loops.parameters(trainer).values())


def test_scores_are_scaled_by_running_moments() -> None:
    """First batch: 4 x 1 and 4 x 3. Mean 2, deviation sqrt(8 / 7).

    With the second, 8 x 2: mean 2, deviation sqrt(8 / 15). TRL 0.11.4 crashed here.
    """
    queries, responses, _ = step_loops.episodes(0)
    first = [torch.tensor(1.0)] * 4 + [torch.tensor(3.0)] * 4
    second = [torch.tensor(2.0)] * 8
    for norm, expected in (
        (False, [2 / math.sqrt(8 / 7), 2 / math.sqrt(8 / 15)]),
        (True, [0.0, 0.0]),
    ):
        settings = step_loops.config(use_score_scaling=True, use_score_norm=norm)
        trainer = step_loops.trainer(settings)
        found = [
            trainer.step(queries, responses, scores)["ppo/mean_scores"]
            for scores in (first, second)
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_kl_coefficient_adapts_to_the_kl() -> None:
    trainer = step_loops.trainer(step_loops.config(target=6.0, horizon=100.0))
    stats = trainer.step(*step_loops.episodes(0))
    assert stats["objective/kl_coef"] == 0.2
    # KL 0: the error is clipped at -0.2, and 8 episodes are 8 / 100 of the horizon
    assert trainer.kl_ctl.value == pytest.approx(0.2 * (1 - 0.2 * 0.08))
    fixed = step_loops.trainer(step_loops.config(adap_kl_ctrl=False))
    fixed.step(*step_loops.episodes(0))
    assert fixed.kl_ctl.value == 0.2


def test_whitened_rewards_of_padding_do_not_reach_the_response() -> None:
    """TRL 0.11.4 whitened what is masked to a number other than 0."""
    trainer = step_loops.trainer(step_loops.config(whiten_rewards=True, gamma=1.0, lam=1.0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    rewards = torch.tensor([[1.0, 3.0, 7.0, 7.0], [1.0, 3.0, 1.0, 3.0]])
    values = torch.zeros(2, 4)
    _, _, returns = trainer.compute_advantages(values, rewards, mask)
    # six rewards, mean 2, deviation sqrt(6 / 5); the mean stays
    scaled = 1 / math.sqrt(6 / 5)
    low, high = 2 - scaled, 2 + scaled
    expected = [[low + high, high, 0, 0], [2 * (low + high), low + 2 * high, low + high, high]]
    torch.testing.assert_close(returns, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_gradient_checkpointing_recomputes_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL ran the training passes in evaluation mode, where nothing is recomputed."""
    calls = []
    forward = GradientCheckpointingLayer.__call__

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self.gradient_checkpointing and self.training)
        return forward(self, *args, **options)

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", counting)
    changes = [
        moved_by(step_loops.config(ppo_epochs=1, gradient_checkpointing=on)) for on in (False, True)
    ]
    # two mini-batches of two layers
    assert sum(map(bool, calls)) == 4
    for name, change in changes[0].items():
        # the same operations, once more
        torch.testing.assert_close(changes[1][name], change, atol=1e-7, rtol=1e-5)


def test_mixed_precision_is_that_of_model_and_reference() -> None:
    """The reference is not wrapped by accelerate, and would compute in fp32."""
    settings = step_loops.config(ppo_epochs=1, accelerator_kwargs={"mixed_precision": "bf16"})
    AcceleratorState._reset_state()  # which all accelerators of this process share
    trainer = step_loops.trainer(settings, learning_rate=0.05)
    try:
        stats = trainer.step(*step_loops.episodes(0))
    finally:
        AcceleratorState._reset_state()
    assert stats["objective/kl"] == 0
    reference = step_loops.trainer().step(*step_loops.episodes(0))
    difference = stats["objective/ref_logprobs"] - reference["objective/ref_logprobs"]
    assert 1e-4 < np.abs(difference).max() < 0.1


def test_dropout_is_off_in_training_so_without_a_change_the_ratio_is_one() -> None:
    """Also in subclasses that switch to training mode, as TRL's method did after its forward."""

    class Switching(PPOTrainer):
        def train_minibatch(self, *args: Any) -> dict[str, Tensor]:
            self.model.train()
            return super().train_minibatch(*args)

    policy = step_loops.model(peft=True, lora_dropout=0.5)
    trainer = step_loops.trainer(policy=policy, learning_rate=0.0, kind=Switching)
    trainer.model.train()
    stats = trainer.step(*step_loops.episodes(0))
    # fp32, the same pass twice
    np.testing.assert_allclose(stats["ppo/policy/ratio"], 1.0, atol=1e-6)


# --- models -------------------------------------------------------------------------------------


def test_the_reference_of_an_adapter_is_the_base() -> None:
    trainer = step_loops.trainer(policy=step_loops.model(peft=True))
    assert trainer.is_peft_model
    assert trainer.config.is_peft_model
    assert trainer.ref_model is None
    stats = trainer.step(*step_loops.episodes(0))
    base = step_loops.trainer(policy=step_loops.model(peft=False))
    expected = base.step(*step_loops.episodes(0))
    # fp32: the same base, in another module
    np.testing.assert_allclose(
        stats["objective/ref_logprobs"], expected["objective/ref_logprobs"], atol=1e-6
    )
    assert abs(stats["objective/kl"]) > 1e-3
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(names) == 10


def test_a_reference_that_is_passed_is_used_and_frozen() -> None:
    """Also with an adapter, where TRL took the base without a word (TRL issue 536)."""
    reference = step_loops.model(peft=True)
    trainer = step_loops.trainer(policy=step_loops.model(peft=True), ref_model=reference)
    stats = trainer.step(*step_loops.episodes(0))
    assert stats["objective/kl"] == 0
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_shared_layers_are_frozen_and_stand_once_in_memory() -> None:
    policy = step_loops.model()
    trainer = step_loops.trainer(
        step_loops.config(ppo_epochs=1), policy, learning_rate=0.05, num_shared_layers=1
    )
    before = step_loops.parameters(trainer)
    trainer.step(*step_loops.episodes(0))
    after = step_loops.parameters(trainer)
    reference = dict(trainer.ref_model.named_parameters())
    for name, parameter in policy.named_parameters():
        shared = "embed_tokens" in name or ".layers.0." in name
        assert shared == (parameter.data_ptr() == reference[name].data_ptr())
        assert shared == torch.equal(before[name], after[name]), name


def test_a_reference_model_is_a_frozen_copy() -> None:
    policy = step_loops.model()
    reference = create_reference_model(policy)
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    first = next(iter(reference.parameters())).clone()
    with torch.no_grad():
        next(iter(policy.parameters())).add_(1.0)
    assert torch.equal(next(iter(reference.parameters())), first)
    named = create_reference_model(policy, num_shared_layers=1, pattern="model.layers.{layer}")
    assert not dict(policy.named_parameters())[
        "pretrained_model.model.embed_tokens.weight"
    ].requires_grad
    assert not named.training
    with pytest.raises(ConfigError, match="no parameter belongs to layer 7"):
        create_reference_model(policy, num_shared_layers=7)


def test_an_adapter_on_a_four_bit_base_learns(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(
        str(tmp_path), quantization_config=quantization, peft_config=step_loops.lora()
    )
    trainer = step_loops.trainer(policy=policy, learning_rate=0.05)
    before = step_loops.parameters(trainer)
    assert trainer.step(*step_loops.episodes(0))["objective/kl"] == 0
    after = step_loops.parameters(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, p in policy.named_parameters() if p.requires_grad}


def test_an_encoder_decoder_model_learns() -> None:
    trainer = step_loops.trainer(
        step_loops.config(ppo_epochs=1), step_loops.t5(), learning_rate=0.05
    )
    assert trainer.is_encoder_decoder
    queries, _, scores = step_loops.episodes(0)
    responses = trainer.generate(queries, max_new_tokens=5, do_sample=True)
    assert all(int(response[0]) == 0 for response in responses)
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, _, _, mask = trainer.batched_forward_pass(
            trainer.model, queries, responses, inputs
        )
        # every token but the start token, of one sequence alone
        logits = trainer.model(input_ids=queries[0][None], decoder_input_ids=responses[0][None])[0]
    assert mask.sum(1).tolist() == [len(response) - 1 for response in responses]
    alone = logits[0].log_softmax(-1)[:-1].gather(-1, responses[0][1:, None])[:, 0]
    torch.testing.assert_close(logprobs[0, : len(alone)], alone, atol=1e-5, rtol=1e-5)  # fp32
    before = step_loops.parameters(trainer)
    stats = trainer.step(queries, responses, scores)
    assert stats["objective/kl"] == 0
    assert step_loops.largest_change(before, step_loops.parameters(trainer)) > 1e-4


# --- responses ----------------------------------------------------------------------------------


def test_masked_tokens_of_a_response_take_no_part() -> None:
    """What an environment wrote: its log-probabilities and the order of its tokens do not count."""
    queries, responses, scores = step_loops.episodes(0)
    masks = [torch.ones_like(response) for response in responses]
    for mask in masks:
        mask[0] = 0
    trainer = step_loops.trainer()
    stats = trainer.step(queries, responses, scores, masks)
    tokens = sum(len(response) - 1 for response in responses)
    seen = []
    for start in (
        queries,
        [torch.cat([q, r[:1]]) for q, r in zip(queries, responses, strict=True)],
    ):
        again = step_loops.trainer(learning_rate=0.05)
        own = responses if start is queries else [r[1:] for r in responses]
        again.step(start, own, scores, masks if start is queries else None)
        seen.append(step_loops.parameters(again))
    assert int((stats["ppo/policy/advantages"] != 0).sum()) == tokens * 4
    # the same tokens count, whether the first one is masked or part of the query; fp32
    assert step_loops.largest_change(*seen) < 1e-6


def test_an_empty_response_takes_no_part() -> None:
    queries, responses, scores = step_loops.episodes(0)
    seen = []
    for score in (1.0, 1000.0):
        responses[2], scores[2] = responses[2][:0], torch.tensor(score)
        trainer = step_loops.trainer(learning_rate=0.05)
        stats = trainer.step(queries, responses, scores)
        assert all(np.isfinite(value).all() for value in stats.values())
        seen.append(step_loops.parameters(trainer))
    assert step_loops.largest_change(*seen) == 0


def test_a_batch_of_empty_responses_changes_nothing() -> None:
    queries, responses, scores = step_loops.episodes(0)
    trainer = step_loops.trainer(learning_rate=0.05)
    before = step_loops.parameters(trainer)
    stats = trainer.step(queries, [response[:0] for response in responses], scores)
    assert all(np.isfinite(value).all() for value in stats.values())
    assert step_loops.largest_change(before, step_loops.parameters(trainer)) == 0


def test_one_episode_is_a_batch() -> None:
    settings = step_loops.config(batch_size=1, mini_batch_size=1)
    queries, responses, scores = step_loops.episodes(0, 1)
    stats = step_loops.trainer(settings).step(queries, responses, [scores[0].reshape(1)])
    assert all(np.isfinite(value).all() for value in stats.values())


def test_wrong_episodes_are_refused() -> None:
    trainer = step_loops.trainer()
    queries, responses, scores = step_loops.episodes(0)
    short = [torch.ones(1, dtype=torch.long)] * 8
    cases: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ConfigError, "queries must be a list", (torch.stack(scores), responses, scores)),
        (ConfigError, "scores must be a list", (queries, responses, [1.0] * 8)),
        (ConfigError, "responses has 7 entries", (queries, responses[:7], scores)),
        (ConfigError, "one dimension", (queries, [r[None] for r in responses], scores)),
        (ConfigError, "A query is empty", ([q[:0] for q in queries], responses, scores)),
        (ConfigError, "must be one number", (queries, responses, [torch.ones(2)] * 8)),
        (ConfigError, "a response mask of 1", (queries, responses, scores, short)),
        (RewardError, "A score is nan", (queries, responses, [torch.tensor(math.nan)] * 8)),
    ]
    before = step_loops.parameters(trainer)
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            trainer.step(*arguments)
    assert step_loops.largest_change(before, step_loops.parameters(trainer)) == 0


def test_a_collator_that_cuts_is_refused() -> None:
    def cut(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([f[name][:2] for f in features]) for name in features[0]}

    trainer = step_loops.trainer(training_data_collator=cut)
    with pytest.raises(ConfigError, match="returned 2 tokens of a sequence of"):
        trainer.step(*step_loops.episodes(0))


def test_subclasses_override_the_parts() -> None:
    """Signatures of TRL 0.11: positional arguments, and masks that calculate as numbers."""
    seen: list[str] = []

    class Own(PPOTrainer):
        def compute_rewards(
            self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            seen.append("rewards")
            rewards = torch.zeros_like(logprobs)
            for row, (score, mask) in enumerate(zip(scores, masks, strict=True)):
                rewards[row, mask.nonzero()[-1]] += score
            return rewards, rewards * (1 - masks), rewards

        def loss(self, *args: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            seen.append("loss")
            _, _, logits, _, logprobs, mask, _, returns = args
            assert logits.shape[:2] == logprobs.shape == mask.shape == returns.shape
            return super().loss(*args)

    trainer = step_loops.trainer(kind=Own)
    trainer.step(*step_loops.episodes(0))
    assert seen == ["rewards"] + ["loss"] * 8


def test_the_kl_penalty_of_a_subclass_is_the_reward() -> None:
    """TRL 0.11 called it for each sequence."""

    class Own(PPOTrainer):
        def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
            assert logprob.shape == ref_logprob.shape
            assert logprob.dim() == 1
            return torch.full_like(logprob, 7.0)

    queries, responses, scores = step_loops.episodes(0)
    stats = step_loops.trainer(kind=Own).step(queries, responses, scores)
    tokens = sum(len(response) for response in responses)
    assert stats["objective/kl"] == pytest.approx(7.0 * tokens / 8)
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(-0.2 * 7.0)


def test_a_negative_kl_is_told() -> None:
    class Shifted(PPOTrainer):
        def compute_rewards(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
            rewards, rest, kls = super().compute_rewards(*args)
            return rewards, rest, kls - 1.0

    with pytest.warns(UserWarning, match="The KL to the reference is negative"):
        step_loops.trainer(kind=Shifted).step(*step_loops.episodes(0))


# --- construction -------------------------------------------------------------------------------


def test_arguments_that_cannot_work_are_refused() -> None:
    policy = step_loops.model()
    frozen = step_loops.model()
    frozen.pretrained_model.requires_grad_(False)
    rows = Dataset.from_dict({"query": ["a"] * 4})
    tokenizer = tiny.tokenizer()

    def make(**changes: Any) -> Callable[[], Any]:
        options = {"config": step_loops.config(), "model": policy, "tokenizer": tokenizer}
        return lambda: PPOTrainer(**(options | changes))

    cases: list[tuple[str, Callable[[], Any]]] = [
        ("config must be a trl_sync.legacy.PPOConfig", make(config={})),
        ("tokenizer must be a tokenizer", make(tokenizer=None)),
        ("model has no value head", make(model=tiny.llama())),
        ("ref_model has no value head", make(ref_model=tiny.llama())),
        ("model must be a", make(model=nn.Linear(2, 2))),
        ("are the same object", make(ref_model=policy)),
        ("Nothing of the model but its value head", make(model=frozen)),
        (
            "num_shared_layers has no effect",
            make(ref_model=step_loops.model(), num_shared_layers=1),
        ),
        ("no parameter belongs to layer 9", make(num_shared_layers=9)),
        ("lr_scheduler must be", make(lr_scheduler=object())),
        ("dataset must be", make(dataset=["a"])),
        ("has 4 rows, fewer than one batch", make(dataset=rows)),
        ("A dataset that is streamed", make(dataset=rows.to_iterable_dataset())),
    ]
    for message, construct in cases:
        with pytest.raises(ConfigError, match=message):
            construct()


def test_a_reference_that_shares_parameters_is_refused() -> None:
    policy = step_loops.model()
    other = AutoModelForCausalLMWithValueHead(policy.pretrained_model)
    with pytest.raises(ConfigError, match="share parameters"):
        step_loops.trainer(policy=policy, ref_model=other)


def test_methods_of_the_other_trainer_say_where_they_are() -> None:
    trainer = step_loops.trainer()
    with pytest.raises(AttributeError, match=r"trl_sync\.PPOTrainer, which runs the loop"):
        trainer.train()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        trainer.nothing()
