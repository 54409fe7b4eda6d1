"""Models and adapters that could go wrong in silence: each works as it says, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VBLoRAConfig,
    get_peft_model,
)
from test_four_models import make, moved, weights
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import runs
import tiny
from trl_sync import ConfigError
from trl_sync.backbone.separate import SeparateModels


def two_adapters(active: str) -> PeftModel:
    """A PEFT model with the adapters `sft` and `new`, both with an effect."""
    model = get_peft_model(tiny.llama(), runs.lora(), adapter_name="sft")
    model.add_adapter("new", runs.lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.set_adapter(active)
    return model


@pytest.mark.parametrize("active", ["sft", "new"])
def test_the_named_adapter_trains_and_the_other_is_the_reference(
    tmp_path: Path, active: str
) -> None:
    model = two_adapters(active)
    before = weights(model)
    trainer = make(tmp_path, model=model, model_adapter_name="new", ref_adapter_name="sft")
    trainer.train()
    changed = moved(model, before)
    assert changed
    assert all(".new." in name for name in changed)
    first = runs.rows(trainer, "objective/kl")[0]
    assert abs(first["objective/kl"]) > 1e-3, "the reference is another adapter"


def test_the_active_adapter_trains_and_a_copy_of_it_is_the_reference(tmp_path: Path) -> None:
    model = two_adapters("sft")
    before = weights(model)
    trainer = make(tmp_path, model=model, save_strategy="steps", save_steps=4)
    trainer.train()
    assert all(".sft." in name for name in moved_of(model, before))
    assert abs(runs.rows(trainer, "objective/kl")[0]["objective/kl"]) < 1e-4
    # Named adapters lie in a folder of their name, as PEFT writes them, and come back.
    again = make(tmp_path, model=two_adapters("sft"))
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-8"))
    ends = weights(model)
    for name, parameter in again.policy_model.named_parameters():
        if ".sft." in name:
            assert parameter.equal(ends[name]), name


def moved_of(model: Any, before: dict[str, Any]) -> set[str]:
    """The parameters that moved among those that were there before."""
    return {n for n, p in model.named_parameters() if n in before and not p.equal(before[n])}


def test_a_second_trainer_of_the_same_peft_model(tmp_path: Path) -> None:
    model = two_adapters("sft")
    make(tmp_path / "first", model=model).train()
    trainer = make(tmp_path / "second", model=model)
    trainer.train()
    assert abs(runs.rows(trainer, "objective/kl")[0]["objective/kl"]) < 1e-4


@pytest.mark.parametrize("init", ["olora", "pissa", "orthogonal", False])
def test_adapters_that_rewrite_the_base_begin_at_the_reference(tmp_path: Path, init: Any) -> None:
    config = runs.lora(init_lora_weights=init)
    trainer = make(tmp_path, peft_config=config)
    trainer.train()
    assert abs(runs.rows(trainer, "objective/kl")[0]["objective/kl"]) < 1e-3


def test_a_kind_whose_new_adapter_has_an_effect(tmp_path: Path) -> None:
    config = VBLoRAConfig(
        r=2, num_vectors=8, vector_length=16, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    trainer = make(tmp_path, peft_config=config)
    trainer.train()
    assert abs(runs.rows(trainer, "objective/kl")[0]["objective/kl"]) < 1e-4


def natively_adapted(folder: Path) -> LlamaForCausalLM:
    tiny.llama().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, runs.lora()).save_pretrained(str(folder / "adapter"))
    return AutoModelForCausalLM.from_pretrained(folder / "adapter")


def both_active() -> PeftModel:
    model = two_adapters("sft")
    model.base_model.set_adapter(["sft", "new"])
    return model


def with_shared_layers() -> dict[str, Any]:
    model, reference = tiny.llama(), tiny.llama(seed=1)
    reference.model.layers[0] = model.model.layers[0]
    return {"model": model, "ref_model": reference}


def that_cannot_be_saved() -> LlamaForCausalLM:
    model = tiny.llama()
    model.generation_config.temperature = 0.6
    return model


@pytest.mark.parametrize(
    "message, arguments",
    [
        (
            "add prompt tokens",
            {"peft_config": PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)},
        ),
        (
            "alora_invocation_tokens",
            {"peft_config": LoraConfig("CAUSAL_LM", alora_invocation_tokens=[5])},
        ),
        ('trains biases of the base', {"peft_config": runs.lora(bias="all")}),
        ("sft', 'new'. are active", lambda folder: {"model": both_active()}),
        ("load the base, and the adapter", lambda folder: {"model": natively_adapted(folder)}),
        ("belongs to policy and reference", lambda folder: with_shared_layers()),
        ("ref_model must be a causal LM", {"ref_model": tiny.reward_llama()}),
        ("ref_model must be a causal LM", {"ref_model": "some/model"}),
        ("is no adapter of the model", lambda f: names(model_adapter_name="other")),
        ("is no adapter of the model", lambda f: names(ref_adapter_name="other")),
        ("is the adapter that trains", lambda f: names(ref_adapter_name="sft")),
        ("has no effect: the model has no adapters", {"model_adapter_name": "one"}),
        ("ref_adapter_name='one' has no effect", {"ref_adapter_name": "one"}),
        ("could not be saved", lambda folder: {"model": that_cannot_be_saved()}),
        (
            "the value model has only 20 embeddings",
            lambda folder: {"value_model": tiny.reward_llama(vocab_size=20)},
        ),
        (
            "the reference has only 20 embeddings",
            lambda folder: {"ref_model": tiny.llama(vocab_size=20)},
        ),
        (
            "context leaves 2",
            lambda folder: {"value_model": tiny.reward_llama(max_position_embeddings=10)},
        ),
    ],
)  # fmt: skip
def test_what_would_go_wrong_is_refused(tmp_path: Path, message: str, arguments: Any) -> None:
    options = arguments(tmp_path) if callable(arguments) else arguments
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **options)
    assert not (tmp_path / "out").exists()


def names(**settings: str) -> dict[str, Any]:
    return {"model": two_adapters("sft"), **settings}


def test_biases_may_train_beside_a_reference_of_its_own(tmp_path: Path) -> None:
    make(tmp_path, peft_config=runs.lora(bias="all"), ref_model=tiny.llama()).train()


def test_a_value_model_with_a_head_of_several_layers(tmp_path: Path) -> None:
    value_model = tiny.reward_llama(seed=3)
    value_model.score = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1))
    before = weights(value_model)
    make(tmp_path, value_model=value_model).train()
    assert "score.0.weight" in moved(value_model, before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_drop_out_by_their_own_flag_do_not(tmp_path: Path, checkpointing: bool) -> None:
    """OPT's layers drop out by the flag by which they also decide to recompute."""
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5,
        )
    )  # fmt: skip
    trainer = make(
        tmp_path,
        model=model,
        learning_rate=0.0,
        gradient_checkpointing=checkpointing,
    )
    passes: list[bool] = []
    layer = model.model.decoder.layers[0].self_attn
    layer.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    trainer.train()
    for row in runs.rows(trainer):
        assert row["val/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert row["val/ratio_var"] < 1e-9
    # Twice as many passes with gradients: one of them recomputes.
    assert sum(passes) == 24 * (2 if checkpointing else 1)


def test_padding_ids_without_a_row_are_not_saved(tmp_path: Path) -> None:
    policy, value_model = tiny.llama(), tiny.reward_llama(seed=3)
    for model in (policy, value_model):
        model.config.pad_token_id = 64
    trainer = make(
        tmp_path, model=policy, value_model=value_model, save_strategy="steps", save_steps=4
    )
    trainer.train()
    again = make(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-8"))
    assert not moved(again.backbone.policy, weights(policy))


def test_only_language_models_answer(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_dataset=tiny.prompts(3))
    for role in ("value", "nonsense"):
        with pytest.raises(ConfigError, match=f"role='{role}' has no language model"):
            trainer.completions(role=role)


def test_options_that_are_no_json_can_be_saved(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        generation_kwargs={"sequence_bias": [[[5], -1.0]]},
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-8"))


def test_ia3_is_its_own_reference_at_first(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    models = SeparateModels(tiny.llama(), tiny.reward_llama(), peft_config=config)
    assert models.roles["reference"].adapter is None
