from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

import oracle
import tiny
from trl_sync.errors import ConfigError
from trl_sync.ppo.config import BatchPlan, PPOConfig


def config(**changes: Any) -> PPOConfig:
    return PPOConfig(**({"use_cpu": True, "report_to": []} | changes))


def test_the_default_configuration_constructs_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = PPOConfig()
    assert found.bf16 is (torch.cuda.is_available() and torch.cuda.is_bf16_supported(False))
    assert found.gradient_accumulation_steps == 1
    assert found.local_batch_size == 8  # per_device_train_batch_size x gradient_accumulation_steps


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"bf16": True}, True), ({"bf16": False}, False), ({}, False)],
)
def test_bf16_is_what_was_asked_for(changes: dict[str, Any], expected: bool) -> None:
    # On a CPU it is emulated, and slower than fp32, so it is not the default there.
    assert config(**changes).bf16 is expected


def test_an_update_needs_every_trainable_parameter() -> None:
    assert config().ddp_find_unused_parameters is False
    assert config(ddp_find_unused_parameters=True).ddp_find_unused_parameters is True


# --- The fields of TRL

OWN_FIELDS = {
    *("use_vllm", "num_generations", "generation_config", "generation_kwargs"),
    *("chat_template_kwargs", "reward_weights", "use_score_scaling", "use_score_norm"),
    *("score_clip", "kl_target", "kl_horizon", "target_kl", "ratio_threshold", "cliprange_high"),
    *("value_learning_rate", "value_lam", "value_warmup_steps"),
}


def defaults_of(cls: type) -> dict[str, Any]:
    return {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(cls)
    }


@pytest.mark.oracle
def test_fields_and_defaults_are_those_of_trl() -> None:
    theirs = oracle.field_defaults("trainer/base_config.py", "_BaseConfig")
    theirs |= oracle.field_defaults("experimental/ppo/ppo_config.py", "PPOConfig")
    ours = defaults_of(PPOConfig)
    assert len(theirs) > 35, "the reading of TRL's file found too few fields"
    assert {name: ours[name] for name in theirs} == theirs
    inherited = defaults_of(TrainingArguments)
    assert set(ours) - set(theirs) - set(inherited) == OWN_FIELDS
    # Everything else is as in transformers.
    for name in set(inherited) - set(theirs):
        assert ours[name] == inherited[name], name


# --- Accumulation and mini-batches


@pytest.mark.parametrize(
    ("per_device", "steps", "mini_batches", "local", "steps_of_a_mini_batch"),
    [(8, 1, 1, 8, 1), (4, 6, 1, 24, 6), (4, 6, 2, 24, 3), (4, 6, 3, 24, 2), (2, 6, 6, 12, 1)],
)
def test_accumulation_is_split_over_the_mini_batches(
    per_device: int, steps: int, mini_batches: int, local: int, steps_of_a_mini_batch: int
) -> None:
    found = config(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=steps,
        num_mini_batches=mini_batches,
    )
    assert found.local_batch_size == local
    assert found.gradient_accumulation_steps == steps_of_a_mini_batch


def split() -> PPOConfig:
    return config(per_device_train_batch_size=4, gradient_accumulation_steps=6, num_mini_batches=2)


COPIES: dict[str, Callable[[PPOConfig], PPOConfig]] = {
    "replace": dataclasses.replace,
    "to_dict": lambda original: PPOConfig(**original.to_dict()),
    "to_json": lambda original: PPOConfig(**json.loads(original.to_json_string())),
    "twice": lambda original: dataclasses.replace(dataclasses.replace(original)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_copies_keep_the_sizes(copy: Callable[[PPOConfig], PPOConfig]) -> None:
    found = copy(split())
    assert (found.gradient_accumulation_steps, found.local_batch_size) == (3, 24)
    assert found.num_mini_batches == 2
    assert found.world_size == 1


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("stop", [{}, {"stop_token": "eos"}, {"stop_token_id": 5}])
def test_copies_keep_every_field(
    copy: Callable[[PPOConfig], PPOConfig], stop: dict[str, Any]
) -> None:
    original = config(kl_estimator="k3", gradient_checkpointing=False, lam=0.5, **stop)
    found = copy(original)
    secrets = {"hub_token"}  # transformers hides it in to_dict
    for field in dataclasses.fields(PPOConfig):
        if field.name not in secrets:
            assert getattr(found, field.name) == getattr(original, field.name), field.name


def test_a_copy_may_change_what_has_nothing_to_do_with_sizes() -> None:
    found = dataclasses.replace(split(), learning_rate=1e-5, kl_coef=0.0)
    assert (found.learning_rate, found.kl_coef, found.local_batch_size) == (1e-5, 0.0, 24)


def test_a_copy_with_new_sizes_names_all_of_them() -> None:
    changed = {"gradient_accumulation_steps": 8, "num_mini_batches": 4, "local_batch_size": None}
    found = dataclasses.replace(split(), **changed)
    assert (found.gradient_accumulation_steps, found.local_batch_size) == (2, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_mini_batches": 3},
        {"num_mini_batches": 1},
        {"per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 12},
    ],
)
def test_a_copy_with_half_of_the_sizes_changed_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"local_batch_size=24 .* leave it unset"):
        dataclasses.replace(split(), **changes)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        config(per_device_train_batch_size=3, gradient_accumulation_steps=5, num_mini_batches=2)
    for words in ("gradient_accumulation_steps=5", "num_mini_batches=2", "a multiple of 2"):
        assert words in str(raised.value)


# --- World size


def test_the_world_size_is_the_launchers() -> None:
    assert config().world_size == 1
    assert config(world_size=1).world_size == 1
    again = config()
    again.world_size = 1  # TRL's scripts and trainers assign it
    assert again.world_size == 1


def test_another_world_size_is_refused() -> None:
    said = "world_size=2 was given, but the launcher started 1 processes: .* --num_processes"
    with pytest.raises(ConfigError, match=said):
        config(world_size=2)
    found = config()
    with pytest.raises(ConfigError, match=said):
        found.world_size = 2


# --- Ranges


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_mini_batches", 0, "must be positive, got 0"),
        ("num_ppo_epochs", 0, "must be positive, got 0"),
        ("response_length", 0, "must be positive, got 0"),
        ("temperature", 0.0, "must be positive, got 0.0"),
        ("temperature", float("nan"), "must be positive, got nan"),
        ("local_rollout_forward_batch_size", 0, "must be positive, got 0"),
        ("per_device_train_batch_size", 0, "must be positive, got 0"),
        ("gradient_accumulation_steps", 0, "must be positive, got 0"),
        ("cliprange", 0.0, "must be positive, got 0.0"),
        ("cliprange_value", -0.2, "must be positive, got -0.2"),
        ("kl_coef", -0.1, "must not be negative, got -0.1"),
        ("vf_coef", -0.1, "must not be negative, got -0.1"),
        ("num_sample_generations", -1, "must not be negative, got -1"),
        ("gamma", 1.1, "must lie between 0 and 1, got 1.1"),
        ("gamma", -0.1, "must lie between 0 and 1, got -0.1"),
        ("lam", 1.1, "must lie between 0 and 1, got 1.1"),
        ("lam", -0.1, "must lie between 0 and 1, got -0.1"),
        ("total_episodes", 0, "must be positive, got 0"),
        ("stop_token", "EOS", "must be 'eos' or unset, got 'EOS'"),
        ("kl_estimator", "k2", "must be 'k1' or 'k3', got 'k2'"),
        ("missing_eos_penalty", -1.0, "is subtracted and must be positive, got -1.0"),
        ("num_generations", 0, "must be positive, got 0"),
        ("kl_target", 0.0, "must be positive, got 0.0"),
        ("kl_horizon", 0.0, "must be positive, got 0.0"),
        ("kl_horizon", 500.0, "=500 has no effect without kl_target"),
        ("target_kl", -0.1, "must be positive, got -0.1"),
        ("ratio_threshold", 0.0, "must be positive, got 0.0"),
        ("cliprange_high", 0.0, "must be positive, got 0.0"),
        ("value_lam", 1.1, "must lie between 0 and 1, got 1.1"),
        ("value_learning_rate", -1e-5, "must not be negative, got -1e-05"),
        ("value_warmup_steps", -1, "must not be negative, got -1"),
        ("generation_kwargs", "{top_p", "='{top_p' is not JSON"),
        ("generation_kwargs", [1], "must be a dictionary, got [1]"),
    ],
)
def test_settings_out_of_their_range_are_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config(**{name: value})
    assert str(raised.value).startswith(name)
    assert str(raised.value).removeprefix(name).lstrip().startswith(said)


@pytest.mark.parametrize(
    "edge",
    [
        {"gamma": 0.0, "lam": 0.0},
        {"gamma": 1.0, "lam": 1.0},
        {"kl_coef": 0.0, "vf_coef": 0.0, "num_sample_generations": 0},
        {"missing_eos_penalty": 0.0},
        {"stop_token_id": 0},
    ],
)
def test_the_edges_of_the_ranges_are_accepted(edge: dict[str, Any]) -> None:
    found = config(**edge)
    assert {name: getattr(found, name) for name in edge} == edge


def test_stop_token_and_its_id_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        config(stop_token="eos", stop_token_id=0)


# --- Gradient checkpointing under its old and its new name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),  # TRL's default
        ({"gradient_checkpointing": True}, True),
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": True}, True),
        ({"activation_checkpointing": False}, False),
        ({"activation_checkpointing": False, "gradient_checkpointing": True}, False),
        ({"activation_checkpointing": True, "gradient_checkpointing": False}, True),
    ],
)
def test_checkpointing_under_either_name(given: dict[str, bool], expected: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = config(**given)
        copied = dataclasses.replace(found)
    for either in (found, copied):
        assert either.activation_checkpointing is expected
        assert either.gradient_checkpointing is expected


@pytest.mark.parametrize("name", ["gradient", "activation"])
def test_checkpointing_options_under_either_name(name: str) -> None:
    options = {"use_reentrant": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = config(**{f"{name}_checkpointing_kwargs": options})
    assert found.activation_checkpointing_kwargs == options
    assert found.gradient_checkpointing_kwargs == options


# --- Command line


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_help_text_renders(parser: Callable[..., Any]) -> None:
    text = " ".join(parser(PPOConfig).format_help().split())
    for name in ("--num_mini_batches", "--kl_estimator {k1,k3}", "--stop_token {eos}"):
        assert name in text
    assert "about 20% slower" in text


def test_every_own_field_has_a_help_text() -> None:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(PPOConfig):
        if field.name not in inherited:
            assert field.metadata["help"].endswith((".", "here.", "generate.")), field.name


def test_the_command_line_sets_the_fields(tmp_path: Path) -> None:
    line = f"--output_dir {tmp_path} --use_cpu --bf16 false --gradient_checkpointing false"
    line += " --stop_token eos --num_mini_batches 2 --gradient_accumulation_steps 4"
    line += " --whiten_rewards --ds3_gather_for_generation False --kl_estimator k3"
    line += " --missing_eos_penalty 1.0 --learning_rate 1e-5 --logging_steps 5 --report_to none"
    (found,) = TrlParser(PPOConfig).parse_args_and_config(line.split())
    expected = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "stop_token": "eos",
        "num_mini_batches": 2,
        "gradient_accumulation_steps": 2,  # of one mini-batch
        "local_batch_size": 32,  # 8 x 4
        "whiten_rewards": True,
        "ds3_gather_for_generation": False,
        "kl_estimator": "k3",
        "missing_eos_penalty": 1.0,
        "learning_rate": 1e-5,
        "logging_steps": 5,
    }
    assert {name: getattr(found, name) for name in expected} == expected


def test_the_command_line_may_say_nothing() -> None:
    (found,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses([])
    assert found.whiten_rewards is False
    assert found.ds3_gather_for_generation is True
    assert found.stop_token is None


@pytest.mark.parametrize("line", ["--kl_estimator k2", "--stop_token end", "--no_such_field 1"])
def test_the_command_line_refuses_what_does_not_exist(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as raised:
        HfArgumentParser(PPOConfig).parse_args_into_dataclasses(line.split())
    assert line.split()[1] in capsys.readouterr().err + str(raised.value)


# --- The plan

# 4 sequences a micro-batch, 4 micro-batches: 16 sequences a rollout batch, 8 a mini-batch.
# 2 PPO epochs x 2 mini-batches: 4 updates an iteration. 50 prompts: 3 iterations an epoch.
SIZES = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
}


@pytest.mark.parametrize(
    ("length", "total_episodes", "num_iterations", "max_steps"),
    [
        ({"max_steps": 20}, 80, 5, 20),
        ({"total_episodes": 48}, 48, 3, 12),
        ({"total_episodes": 49}, 49, 4, 16),  # begun is done: at least that many
        ({"total_episodes": 1}, 1, 1, 4),
        ({"total_episodes": 32, "num_train_epochs": 9}, 32, 2, 8),  # total_episodes decides
        # Epochs are counted in episodes and rounded up once, as in TRL.
        ({"num_train_epochs": 1}, 50, 4, 16),
        ({"num_train_epochs": 2}, 100, 7, 28),
        ({"num_train_epochs": 0.5}, 25, 2, 8),
        ({}, 150, 10, 40),  # transformers' default: 3 epochs
    ],
)
def test_the_plan_by_hand(
    length: dict[str, Any], total_episodes: int, num_iterations: int, max_steps: int
) -> None:
    plan = BatchPlan.derive(config(**SIZES, **length), 50)
    assert dataclasses.asdict(plan) == {
        "world_size": 1,
        "local_micro_batch_size": 4,
        "local_mini_batch_size": 8,
        "local_batch_size": 16,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "iterations_per_epoch": 3,
        "total_episodes": total_episodes,
        "num_iterations": num_iterations,
        "num_generations": 1,
    }
    assert plan.batch_size == plan.prompts_per_batch == 16
    assert plan.updates_per_iteration == 4
    assert plan.updates_per_epoch == 12
    assert plan.micro_batches_per_iteration == 8
    assert plan.max_steps == max_steps


def test_the_plan_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    found = config(**SIZES, total_episodes=100)
    plan = BatchPlan.derive(found, 70)
    # 32 sequences in all a rollout batch: 2 iterations an epoch of 70 prompts, 4 for 100 episodes.
    assert (plan.world_size, plan.local_batch_size, plan.batch_size) == (2, 16, 32)
    assert (plan.iterations_per_epoch, plan.num_iterations) == (2, 4)
    assert (plan.local_mini_batch_size, plan.local_micro_batch_size) == (8, 4)
    assert (plan.updates_per_iteration, plan.max_steps) == (4, 16)
    plan.fill_in(found)
    computed = {
        "num_total_batches": 4,
        "micro_batch_size": 8,
        "local_batch_size": 16,
        "batch_size": 32,
        "local_mini_batch_size": 8,
        "mini_batch_size": 16,
        "total_episodes": 100,
        "max_steps": 16,
    }
    assert {name: getattr(found, name) for name in computed} == computed


def test_a_filled_in_configuration_gives_the_same_plan_again() -> None:
    found = config(**SIZES, total_episodes=40)
    plan = BatchPlan.derive(found, 50)
    plan.fill_in(found)
    for copy in COPIES.values():
        assert BatchPlan.derive(copy(found), 50) == plan


def test_one_rollout_batch_of_prompts_is_enough() -> None:
    assert BatchPlan.derive(config(**SIZES), 16).iterations_per_epoch == 1
    assert BatchPlan.derive(config(**SIZES), 31).iterations_per_epoch == 1


@pytest.mark.parametrize("rows", [0, 15])
def test_too_few_prompts_are_refused(rows: int) -> None:
    with pytest.raises(ConfigError) as raised:
        BatchPlan.derive(config(**SIZES), rows)
    for words in (f"has {rows} prompts", "rollout batch of 16", "train_batch_size 4", "use more"):
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("rows", "length", "iterations_per_epoch", "num_iterations"),
    [
        # 16 episodes are 4 prompts with 4 responses each.
        (50, {"num_train_epochs": 1}, 12, 13),
        (4, {"num_train_epochs": 3}, 1, 3),
        (7, {"total_episodes": 48}, 1, 3),
        (8, {"total_episodes": 49}, 2, 4),
    ],
)
def test_the_plan_of_several_responses_to_a_prompt(
    rows: int, length: dict[str, Any], iterations_per_epoch: int, num_iterations: int
) -> None:
    found = config(**SIZES, num_generations=4, **length)
    plan = BatchPlan.derive(found, rows)
    assert (plan.batch_size, plan.prompts_per_batch, plan.num_generations) == (16, 4, 4)
    assert plan.iterations_per_epoch == iterations_per_epoch
    assert plan.num_iterations == num_iterations
    plan.fill_in(found)
    assert found.total_episodes == length.get("total_episodes", 4 * rows * found.num_train_epochs)


def test_a_batch_that_holds_no_whole_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch of 16 .* num_generations=3 .* use a multiple"):
        BatchPlan.derive(config(**SIZES, num_generations=3), 50)


def test_too_few_prompts_for_whole_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 3 prompts, .* batch of 16 .*, 4 a prompt\)"):
        BatchPlan.derive(config(**SIZES, num_generations=4), 3)


def test_max_steps_inside_an_iteration_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_steps=6 .* inside an iteration of 4 .* a multiple"):
        BatchPlan.derive(config(**SIZES, max_steps=6), 50)


def test_a_plan_is_frozen() -> None:
    plan = BatchPlan.derive(config(**SIZES), 50)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.num_iterations = 1


def test_max_steps_and_total_episodes_together_are_refused(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, max_steps=8, total_episodes=48)
    with pytest.raises(ConfigError, match="set one of them"):
        BatchPlan.derive(config, 64)


def test_a_config_that_a_trainer_filled_in_may_be_lengthened(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, total_episodes=48)
    BatchPlan.derive(config, 64).fill_in(config)
    assert config.max_steps == 12  # 3 batches of 16, 2 epochs x 2 mini-batches each
    config.total_episodes = 96
    assert BatchPlan.derive(config, 64).max_steps == 24


def test_a_computed_size_that_was_set_is_refused(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, mini_batch_size=5)
    with pytest.raises(ConfigError, match="mini_batch_size=5 was set"):
        BatchPlan.derive(config, 64).fill_in(config)


@pytest.mark.parametrize("setting", [{"load_best_model_at_end": True}, {"save_strategy": "best"}])
def test_the_best_model_is_the_one_with_the_highest_score(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    strategies = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 4}
    config = tiny.config(tmp_path, **(strategies | {"save_steps": 4} | setting))
    assert (config.metric_for_best_model, config.greater_is_better) == ("objective/scores", True)
