"""SeparateModels: each role says what its model says alone, and only what should train trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import load, lora, ragged_batch, randomise_adapters
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    GenerationConfig,
    OPTConfig,
)

import tiny
from trl_sync.backbone.export import load_models, save_models
from trl_sync.backbone.fingerprint import fingerprint_of
from trl_sync.backbone.quantization import keep_packed_weights
from trl_sync.backbone.separate import SeparateModels
from trl_sync.errors import CheckpointError, ConfigError

ROLES = ("policy", "reference", "value")
# fp32 logits of order 1 through two layers; the chunked head adds in another order.
CLOSE = {"rtol": 0.0, "atol": 2e-5}
TEMPERATURE = 0.7


class Head(nn.Module):
    """The shape of TRL's value head."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, states: Tensor) -> Tensor:
        return self.summary(states)


class ValueHeadModel(nn.Module):
    """The shape of TRL's value-head models: a causal LM and a `v_head` with a `summary` layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = Head(model.config.hidden_size)


def expected_statistics(model: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from the model's own logits, by torch's distributions."""
    batch = ragged_batch()
    width = batch.response_mask.shape[1]
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
        ).logits[:, -width - 1 : -1]
    distribution = torch.distributions.Categorical(logits=logits / TEMPERATURE)
    logprobs = distribution.log_prob(batch.input_ids[:, -width:])
    hidden = ~batch.response_mask
    return logprobs.masked_fill(hidden, 0.0), distribution.entropy().masked_fill(hidden, 0.0)


def expected_values(model: Any) -> Tensor:
    batch = ragged_batch()
    width = batch.response_mask.shape[1]
    with torch.no_grad():
        states = model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
        ).last_hidden_state
        values = model.score(states).squeeze(-1)[:, -width - 1 : -1]
    return values.masked_fill(~batch.response_mask, 0.0)


def said(models: SeparateModels) -> Any:
    batch = ragged_batch()
    with torch.no_grad():
        return models(
            batch.input_ids,
            batch.attention_mask,
            batch.response_mask,
            roles=ROLES,
            temperature=TEMPERATURE,
        )


def adapted(seed: int = 0, **options: Any) -> PeftModel:
    model = get_peft_model(tiny.llama(), lora(**options))
    randomise_adapters(model, seed)
    return model


def test_four_full_models_say_what_they_say_alone() -> None:
    policy, reference, value_model = tiny.llama(0), tiny.llama(1), tiny.reward_llama(2)
    outputs = said(SeparateModels(policy, value_model, reference))
    for role, model in (("policy", policy), ("reference", reference)):
        logprobs, entropies = expected_statistics(model)
        torch.testing.assert_close(outputs[role]["logprobs"], logprobs, **CLOSE)
        torch.testing.assert_close(outputs[role]["entropies"], entropies, **CLOSE)
    torch.testing.assert_close(outputs["value"]["values"], expected_values(value_model), **CLOSE)
    difference = outputs["policy"]["logprobs"] - outputs["reference"]["logprobs"]
    assert difference.abs().max() > 0.1, "the two models are too alike to tell them apart"


def test_without_ref_model_the_reference_is_a_copy_that_stays() -> None:
    policy = tiny.llama()
    models = SeparateModels(policy, tiny.reward_llama())
    before = said(models)["reference"]["logprobs"]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05)
    after = said(models)
    torch.testing.assert_close(after["reference"]["logprobs"], before, rtol=0, atol=0)
    assert (after["policy"]["logprobs"] - before).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_with_peft_config_the_reference_is_the_model_without_the_adapter(
    tmp_path: Path, precision: str
) -> None:
    tiny.llama().save_pretrained(tmp_path)
    alone, policy = load(tmp_path, precision), load(tmp_path, precision)
    keep_packed_weights(alone)
    models = SeparateModels(policy, tiny.reward_llama(), peft_config=lora())
    randomise_adapters(models.policy)
    outputs = said(models)
    torch.testing.assert_close(
        outputs["reference"]["logprobs"], expected_statistics(alone)[0], **CLOSE
    )
    torch.testing.assert_close(
        outputs["policy"]["logprobs"], expected_statistics(models.policy)[0], **CLOSE
    )
    assert (outputs["policy"]["logprobs"] - outputs["reference"]["logprobs"]).abs().max() > 1e-2
    # The pass of the reference left the adapter as it was: active, and training.
    assert all(p.requires_grad for n, p in models.policy.named_parameters() if "lora_" in n)


def test_a_peft_model_keeps_its_own_adapter_as_reference() -> None:
    """TRL's reference was the base, as if the policy had never been fine-tuned."""
    models = SeparateModels(adapted(), tiny.reward_llama())
    wanted = expected_statistics(adapted())[0]
    torch.testing.assert_close(said(models)["reference"]["logprobs"], wanted, **CLOSE)
    with torch.no_grad():
        for _, parameter in models.role_parameters("policy"):
            parameter.mul_(2)
    outputs = said(models)
    torch.testing.assert_close(outputs["reference"]["logprobs"], wanted, **CLOSE)
    assert (outputs["policy"]["logprobs"] - wanted).abs().max() > 1e-2
    names = [name for name, _ in models.role_parameters("policy")]
    assert names, "nothing trains"
    assert not any(".reference." in name for name in names)


def test_a_named_reference_adapter() -> None:
    model = adapted()
    model.add_adapter("sft", lora())
    for name, parameter in model.named_parameters():
        if ".sft." in name:
            nn.init.normal_(parameter, std=0.1)
    twin = copy.deepcopy(model)
    models = SeparateModels(model, tiny.reward_llama(), ref_adapter_name="sft")
    outputs = said(models)
    twin.set_adapter("sft")
    wanted = expected_statistics(twin)[0]
    torch.testing.assert_close(outputs["reference"]["logprobs"], wanted, **CLOSE)
    assert models.policy.active_adapter == "default"


def test_a_kind_of_adapter_that_the_shared_backbone_refuses() -> None:
    config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    models = SeparateModels(tiny.llama(), tiny.reward_llama(), peft_config=config)
    with torch.no_grad():
        for _, parameter in models.role_parameters("policy"):
            parameter.uniform_(0.5, 1.5)
    outputs = said(models)
    torch.testing.assert_close(
        outputs["policy"]["logprobs"], expected_statistics(models.policy)[0], **CLOSE
    )
    torch.testing.assert_close(
        outputs["reference"]["logprobs"], expected_statistics(tiny.llama())[0], **CLOSE
    )


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0,
        ),
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2),
    ],
    ids=["opt", "bloom"],
)  # fmt: skip
def test_an_architecture_whose_head_is_not_known(config: Any) -> None:
    """Its own logits are used, which takes more memory and is right for every model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = ragged_batch()
    outputs = said(SeparateModels(model, tiny.reward_llama()))
    with torch.no_grad():
        # Bloom takes its positions from the mask alone.
        logits = model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    shifted = (logits[:, 4:-1] / TEMPERATURE).log_softmax(-1)
    wanted = shifted.gather(-1, batch.input_ids[:, 5:, None]).squeeze(-1)
    wanted = wanted.masked_fill(~batch.response_mask, 0.0)
    torch.testing.assert_close(outputs["policy"]["logprobs"], wanted, **CLOSE)


def test_values_of_a_peft_classifier_and_of_a_value_head_model() -> None:
    classifier = get_peft_model(tiny.reward_llama(), LoraConfig(task_type="SEQ_CLS", r=4))
    randomise_adapters(classifier)
    wanted = expected_values(classifier.base_model.model)
    found = said(SeparateModels(tiny.llama(), classifier))["value"]["values"]
    torch.testing.assert_close(found, wanted, **CLOSE)

    causal = tiny.llama(5)
    with_head = ValueHeadModel(causal)
    batch = ragged_batch()
    with torch.no_grad():
        states = causal.model(
            batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
        ).last_hidden_state
        wanted = with_head.v_head.summary(states).squeeze(-1)[:, 4:-1]
    found = said(SeparateModels(tiny.llama(), with_head))["value"]["values"]
    torch.testing.assert_close(found, wanted.masked_fill(~batch.response_mask, 0.0), **CLOSE)


def gradients(models: SeparateModels) -> dict[str, Tensor]:
    batch = ragged_batch()
    models.train()
    outputs = models(batch.input_ids, batch.attention_mask, batch.response_mask)
    (outputs["policy"]["logprobs"].sum() + outputs["value"]["values"].sum()).backward()
    return {n: p.grad for n, p in models.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients(
    reentrant: bool, peft_config: LoraConfig | None
) -> None:
    def fresh() -> SeparateModels:
        models = SeparateModels(tiny.llama(), tiny.reward_llama(), peft_config=peft_config)
        randomise_adapters(models.policy)
        return models

    plain, checkpointed = fresh(), fresh()
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert checkpointed.is_gradient_checkpointing
    expected, found = gradients(plain), gradients(checkpointed)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient is not None, f"{name} has no gradient, for which DDP would wait"
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=name)


def test_every_trainable_parameter_of_a_value_head_model_gets_a_gradient() -> None:
    models = SeparateModels(tiny.llama(), ValueHeadModel(tiny.llama(3)))
    assert all(gradient is not None for gradient in gradients(models).values())


def test_only_lora_dropout_runs_in_training_mode() -> None:
    policy = tiny.llama(attention_dropout=0.5)
    models = SeparateModels(policy, tiny.reward_llama(), peft_config=lora(lora_dropout=0.5))
    randomise_adapters(models.policy)
    models.train()
    active = {name.rpartition(".")[0] for name, m in models.named_modules() if m.training and name}
    assert active
    assert all(name.endswith("lora_dropout") or ".layers" in name for name in active)
    attention = policy.model.layers[0].self_attn
    assert not attention.training, "attention_dropout would run"
    models.eval()
    assert not any(m.training for m in models.modules())


def test_generation_follows_the_role_and_leaves_the_config_alone() -> None:
    policy, reference = tiny.llama(0), tiny.llama(1)
    policy.generation_config.repetition_penalty = 5.0
    models = SeparateModels(policy, tiny.reward_llama(), reference)
    batch = ragged_batch()
    prompt, mask = batch.input_ids[:1, :5], batch.attention_mask[:1, :5]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    wanted = {}
    for role, model in (("policy", tiny.llama(0)), ("reference", tiny.llama(1))):
        model.generation_config.eos_token_id = None
        wanted[role] = model.generate(prompt, attention_mask=mask.long(), generation_config=config)
        assert models.generate(prompt, mask, config, role).equal(wanted[role])
    assert not wanted["policy"].equal(wanted["reference"])
    assert policy.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("kind", ["full", "lora", "nf4 lora", "nf4 value model", "value head"])
def test_weights_come_back_whole(tmp_path: Path, kind: str) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.reward_llama().save_pretrained(tmp_path / "classifier")

    def fresh() -> SeparateModels:
        policy = load(tmp_path / "base", "nf4" if kind == "nf4 lora" else "fp32")
        value_model: Any = tiny.reward_llama()
        if kind == "nf4 value model":
            quantization = load(tmp_path / "base", "nf4").config.quantization_config
            value_model = AutoModelForSequenceClassification.from_pretrained(
                tmp_path / "classifier",
                num_labels=1,
                quantization_config=quantization,
                device_map={"": "cpu"},
            )
        elif kind == "value head":
            torch.manual_seed(0)
            value_model = ValueHeadModel(tiny.llama(3))
        return SeparateModels(
            policy, value_model, peft_config=lora() if kind.endswith("lora") else None
        )

    models = fresh()
    with torch.no_grad():
        for role in ("policy", "value"):
            for name, parameter in models.role_parameters(role):
                parameter.add_(torch.randn_like(parameter) * 0.1)
                assert name in dict(models.named_parameters())
    files = save_models(models, tmp_path / "saved")
    assert files
    assert all((tmp_path / "saved" / name).is_file() for name in files)
    again = fresh()
    assert fingerprint_of(again.frozen_tensors()) == fingerprint_of(models.frozen_tensors())
    load_models(again, tmp_path / "saved")
    saved = dict(models.named_parameters())
    for name, parameter in again.named_parameters():
        assert parameter.equal(saved[name]), name
    (tmp_path / "saved" / files[-1]).unlink()
    with pytest.raises(CheckpointError):
        load_models(again, tmp_path / "saved")


def test_the_saved_policy_is_a_plain_model_that_stops_at_eos(tmp_path: Path) -> None:
    policy = tiny.llama()
    save_models(SeparateModels(policy, tiny.reward_llama()), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.eos_token_id == policy.config.eos_token_id == 1
    for name, tensor in again.state_dict().items():
        assert tensor.equal(policy.state_dict()[name]), name


def test_weights_of_another_size_change_nothing(tmp_path: Path) -> None:
    save_models(SeparateModels(tiny.llama(intermediate_size=64), tiny.reward_llama()), tmp_path)
    models = SeparateModels(tiny.llama(), tiny.reward_llama())
    before = {name: p.clone() for name, p in models.named_parameters()}
    with pytest.raises(CheckpointError, match="tensors differ"):
        load_models(models, tmp_path)
    assert all(p.equal(before[name]) for name, p in models.named_parameters())


def test_the_frozen_part_is_told_apart() -> None:
    def prints(policy: Any, reference: Any = None, **options: Any) -> str:
        models = SeparateModels(policy, tiny.reward_llama(), reference, **options)
        return fingerprint_of(models.frozen_tensors())

    assert prints(tiny.llama(0)) != prints(tiny.llama(1))
    assert prints(tiny.llama(0), tiny.llama(1)) == prints(tiny.llama(2), tiny.llama(1))
    torch.manual_seed(0)
    one = prints(tiny.llama(0), peft_config=lora())
    torch.manual_seed(1)
    assert prints(tiny.llama(0), peft_config=lora()) == one
    assert prints(tiny.llama(1), peft_config=lora()) != one


def test_roles_for_an_audit() -> None:
    models = SeparateModels(tiny.llama(), tiny.reward_llama(), tiny.llama(1))
    states = models.sync_roles()
    assert {name: state.trainable for name, state in states.items()} == {
        "policy": True,
        "value": True,
        "reference": False,
    }
    seen = [id(p) for state in states.values() for p in state.parameters]
    assert len(seen) == len(set(seen)) == len(list(models.parameters()))
    with_adapter = SeparateModels(tiny.llama(), tiny.reward_llama(), peft_config=lora())
    frozen = {id(p) for p in with_adapter.sync_roles()["reference"].parameters}
    assert frozen == {id(p) for n, p in with_adapter.policy.named_parameters() if "lora_" not in n}


def test_a_reference_that_trains_is_found() -> None:
    models = SeparateModels(tiny.llama(), tiny.reward_llama(), tiny.llama(1))
    models.check_roles()
    next(models.ref_model.parameters()).requires_grad_(True)
    with pytest.raises(ConfigError, match="of the reference trains"):
        models.check_roles()
    frozen = SeparateModels(tiny.llama().requires_grad_(False), tiny.reward_llama())
    with pytest.raises(ConfigError, match="policy model has no parameter"):
        frozen.check_roles()
