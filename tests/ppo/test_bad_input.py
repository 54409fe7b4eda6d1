"""What cannot work is refused with a clear error before anything is trained or written."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from datasets import Dataset, IterableDataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

import runs
import tiny
from trl_sync import PPOConfig, PPOTrainer, SharedBackbone
from trl_sync.errors import ConfigError, RewardError
from trl_sync.ppo.checks import check_settings


def build(out: Path, settings: dict[str, Any] | None = None, **arguments: Any) -> PPOTrainer:
    """A trainer with something wrong about it."""
    given: dict[str, Any] = {
        "processing_class": tiny.tokenizer(),
        "model": tiny.llama(),
        "reward_model": runs.count_e,
        "train_dataset": tiny.prompts(),
    }
    config = arguments.pop("args", None) or tiny.config(out, **settings or {})
    return PPOTrainer(config, **(given | arguments))


def refused(out: Path, message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
    assert not out.exists()


def longer_vocabulary() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(64)])
    return tokenizer


def without_special_tokens() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer().backend_tokenizer)


def without_chat_template() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    return tokenizer


MESSAGES = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]] * 16})


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("id 98, but the model has only 64", lambda: {"processing_class": longer_vocabulary()}),
        (
            "neither a padding nor an end-of-sequence",
            lambda: {"processing_class": without_special_tokens()},
        ),
        ("must be a tokenizer, got NoneType", lambda: {"processing_class": None}),
        ("train_dataset is missing", lambda: {"train_dataset": None}),
        ("The dataset is empty", lambda: {"train_dataset": tiny.prompts(0)}),
        ("has 15 prompts, fewer than one", lambda: {"train_dataset": tiny.prompts(15)}),
        ("the columns .'text'.", lambda: {"train_dataset": Dataset.from_dict({"text": ["a"]})}),
        ("got dict: choose one split", lambda: {"train_dataset": {"train": tiny.prompts()}}),
        (
            "Streaming datasets are not supported",
            lambda: {"train_dataset": IterableDataset.from_generator(lambda: iter([]))},
        ),
        (
            "has 121 tokens. With response_length=8 .* leaves 120",
            lambda: {"train_dataset": Dataset.from_dict({"prompt": ["a"] * 16 + ["b" * 121]})},
        ),
        (
            "has 121 tokens",
            lambda: {"eval_dataset": Dataset.from_dict({"prompt": ["b" * 121]})},
        ),
        (
            "no chat template",
            lambda: {"train_dataset": MESSAGES, "processing_class": without_chat_template()},
        ),
    ],
)
def test_tokenizer_and_dataset(
    tmp_path: Path, message: str, arguments: Callable[[], dict[str, Any]]
) -> None:
    out = tmp_path / "out"
    refused(out, message, lambda: build(out, **arguments()))


@pytest.mark.parametrize(
    "message, settings",
    [
        ("does not divide into num_mini_batches=3", {"num_mini_batches": 3}),
        ("the policy would never train", {"value_warmup_steps": 12}),
        ("num_generations must be a whole number", {"num_generations": 1.5}),
        ("reward_weights must be a list of finite", {"reward_weights": 1.0}),
        ("reward_weights must be a list of finite", {"reward_weights": [math.nan]}),
        ("reward_weights must be a list of finite", {"reward_weights": ["a"]}),
        ("max_steps=6 .* inside an iteration of 4", {"max_steps": 6, "total_episodes": None}),
        ("use_vllm=True does not work", {"use_vllm": True}),
        ("torch_compile=True does not work", {"torch_compile": True}),
        ("auto_find_batch_size=True does not work", {"auto_find_batch_size": True}),
        ("use_liger_kernel=True does not work", {"use_liger_kernel": True}),
        ("neftune_noise_alpha=5 does not work", {"neftune_noise_alpha": 5}),
        ("label_smoothing_factor=0.1 does not work", {"label_smoothing_factor": 0.1}),
        ("model_adapter_name='mine' is not supported", {"model_adapter_name": "mine"}),
        ("ref_adapter_name='mine' is not supported", {"ref_adapter_name": "mine"}),
        ("temperature must be positive", {"temperature": 0.0}),
        ("enable_jit_checkpoint=True does not work", {"enable_jit_checkpoint": True}),
        ("bf16_full_eval=True does not work", {"bf16_full_eval": True}),
        ("dataloader_num_workers=2 has no effect", {"dataloader_num_workers": 2}),
        ("data_seed=3 has no effect", {"data_seed": 3}),
        ("would fall on every response", {"missing_eos_penalty": 1.0, "stop_token": None}),
        ("max_steps=4 and total_episodes=48 both", {"max_steps": 4}),
        ("batch_size=7 was set", {"batch_size": 7}),
    ],
)
def test_settings(tmp_path: Path, message: str, settings: dict[str, Any]) -> None:
    out = tmp_path / "out"
    refused(out, message, lambda: build(out, settings))


def test_arguments_of_another_kind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = TrainingArguments(output_dir=str(out), use_cpu=True)
    refused(out, "must be a trl_sync.PPOConfig, got transformers", lambda: build(out, args=args))


def test_a_launch_in_which_every_rank_believes_it_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started 2 processes, but accelerate sees 1"):
        check_settings(config)


def test_predict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not apply to PPO"):
        build(tmp_path / "out").predict(tiny.prompts(4))


def test_several_gpus_without_a_launcher(tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = tiny.config(out)
    # A machine with two GPUs is mocked: what the arguments say about it is all that is read.
    with mock.patch.object(PPOConfig, "n_gpu", 2):
        refused(out, "sees 2 GPUs and would use nn.DataParallel", lambda: build(out, args=args))


@pytest.mark.parametrize("place", ["file/out", "file"])
def test_an_output_folder_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="is not writable"):
        build(tmp_path / place)
    assert (tmp_path / "file").read_text() == "kept"


def adapted() -> Any:
    return get_peft_model(tiny.llama(), runs.lora())


def with_itself_as_reference() -> dict[str, Any]:
    model = tiny.llama()
    return {"model": model, "ref_model": model}


def with_its_copy_as_reference() -> dict[str, Any]:
    model = tiny.llama()
    return {"model": model, "ref_model": copy.deepcopy(model)}


def with_its_trunk_as_reward_model() -> dict[str, Any]:
    model, reward = tiny.llama(), tiny.reward_llama()
    reward.model = model.model
    return {"model": model, "reward_model": reward}


def with_a_frozen_adapter() -> dict[str, Any]:
    backbone = SharedBackbone(tiny.llama(), runs.lora())
    next(p for _, p in backbone.role_parameters("policy")).requires_grad_(False)
    return {"model": backbone}


def with_the_policys_trunk_as_value_model() -> dict[str, Any]:
    model, value_model = tiny.llama(), tiny.reward_llama()
    value_model.model = model.model
    return {"model": model, "value_model": value_model}


def tiny_t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def unknown_head() -> GPTJForCausalLM:
    return GPTJForCausalLM(
        GPTJConfig(vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    )


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("the same object", with_itself_as_reference),
        ("ref_model was given", with_its_copy_as_reference),
        ("value_model is a LlamaForCausalLM", lambda: {"value_model": tiny.llama()}),
        (
            "value_model has 2 labels",
            lambda: {"value_model": tiny.reward_llama(num_labels=2)},
        ),
        ("value_model is a str", lambda: {"value_model": "some/model"}),
        (
            "is an encoder-decoder model",
            lambda: {"model": tiny_t5(), "value_model": tiny.reward_llama()},
        ),
        (
            "has no LM head",
            lambda: {"model": tiny.llama().model, "value_model": tiny.reward_llama()},
        ),
        (
            "PROMPT_TUNING adapters add prompt tokens",
            lambda: {
                "model": get_peft_model(
                    tiny.llama(),
                    PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
                ),
                "value_model": tiny.reward_llama(),
            },
        ),
        (
            "The model has adapters already, and peft_config would add",
            lambda: {
                "model": adapted(),
                "value_model": tiny.reward_llama(),
                "peft_config": runs.lora(),
            },
        ),
        ("must be a PeftConfig", lambda: {"value_model": tiny.reward_llama(), "peft_config": 3}),
        ("belongs to policy and value", with_the_policys_trunk_as_value_model),
        (
            "value_model was given with a SharedBackbone",
            lambda: {"model": SharedBackbone(tiny.llama()), "value_model": tiny.reward_llama()},
        ),
        ("got str", lambda: {"model": "some/model"}),
        ("model type 'gptj' is not known", lambda: {"model": unknown_head()}),
        ("already has adapters. For a shared", lambda: {"model": adapted()}),
        (
            "already has adapters, and peft_config would add",
            lambda: {"model": adapted(), "peft_config": runs.lora()},
        ),
        (
            "peft_config was given with a SharedBackbone",
            lambda: {"model": SharedBackbone(tiny.llama()), "peft_config": runs.lora()},
        ),
        ("requires_grad is False", with_a_frozen_adapter),
        ("use_dora=True", lambda: {"peft_config": runs.lora(use_dora=True)}),
        ('bias="all" trains', lambda: {"peft_config": runs.lora(bias="all")}),
        (
            "modules_to_save=.'lm_head'. trains",
            lambda: {"peft_config": runs.lora(modules_to_save=["lm_head"])},
        ),
        ("must be a LoraConfig, got IA3Config", lambda: {"peft_config": IA3Config()}),
        (
            "must be a LoraConfig, got PromptTuningConfig",
            lambda: {"peft_config": PromptTuningConfig(num_virtual_tokens=2)},
        ),
        (
            "targets the LM head alone",
            lambda: {"peft_config": LoraConfig(target_modules=["lm_head"])},
        ),
        ("No reward source", lambda: {"reward_model": None}),
        ("must be a model, a path or a function, got int", lambda: {"reward_model": 3}),
        (
            "has 2 labels",
            lambda: {
                "reward_model": LlamaForSequenceClassification(tiny.llama_config(num_labels=2))
            },
        ),
        ("no `score` head", lambda: {"reward_model": tiny.llama()}),
        (
            "reward model has only 20 embeddings",
            lambda: {"reward_model": tiny.reward_llama(vocab_size=20)},
        ),
        ("The reward model must not train", with_its_trunk_as_reward_model),
    ],
)
def test_models(tmp_path: Path, message: str, arguments: Callable[[], dict[str, Any]]) -> None:
    out = tmp_path / "out"
    refused(out, message, lambda: build(out, **arguments()))


def test_a_wrong_evaluation_set_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny.llama()
    with pytest.raises(ConfigError):
        build(tmp_path / "out", model=model, eval_dataset=tiny.prompts(0))
    build(tmp_path / "out", model=model)


def of_nan(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * (len(prompts) - 1) + [math.nan]


def too_few(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * (len(prompts) - 1)


def raising(prompts: list[str], completions: list[str]) -> list[float]:
    raise ZeroDivisionError("my own fault")


@pytest.mark.parametrize(
    "reward, error, message",
    [
        (of_nan, RewardError, "of_nan gave episode 15 the score nan"),
        (too_few, RewardError, "too_few returned 15 scores for 16 completions"),
        (raising, ZeroDivisionError, "my own fault"),
        (lambda prompts, completions: ["good"] * 16, RewardError, "'good' for completion 0"),
    ],
)
def test_a_reward_function_that_fails_stops_before_the_first_update(
    tmp_path: Path, reward: Any, error: type[Exception], message: str
) -> None:
    trainer = runs.make(tmp_path, reward=reward)
    before = runs.trained(trainer)
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert runs.same(before, runs.trained(trainer))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run_record.json"]


def test_a_reward_function_that_fails_in_evaluation(tmp_path: Path) -> None:
    trainer = runs.make(tmp_path, reward=of_nan, eval_prompts=tiny.prompts(3))
    with pytest.raises(RewardError, match="episode 2 the score nan"):
        trainer.evaluate()
