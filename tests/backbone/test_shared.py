"""SharedBackbone: what each role says, what trains, and that the base never moves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backbones import (
    Batch,
    bytes_of,
    gradients,
    largest_difference,
    load,
    lora,
    peft_model,
    ragged_batch,
    randomise_adapters,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

import tiny
from trl_sync.backbone.fingerprint import base_tensors, fingerprint
from trl_sync.backbone.quantization import keep_packed_weights
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError

# fp32: log-probabilities of order 4 from two layers; the stacked batch is summed in another order.
CLOSE = {"rtol": 0.0, "atol": 1e-5}
ALL_ROLES = ("policy", "value", "reference")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}


def backbone_of(model: PreTrainedModel, **options: Any) -> SharedBackbone:
    config = options.pop("peft_config", lora(target_modules="all-linear"))
    backbone = SharedBackbone(model, config, **options)
    randomise_adapters(backbone)
    with torch.no_grad():
        backbone.value_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return backbone


def gpt2_backbone(folder: str) -> SharedBackbone:
    config = lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    return backbone_of(load(folder, "fp32"), peft_config=config)


def outputs_of(backbone: SharedBackbone, batch: Batch, **options: Any) -> dict[str, Tensor]:
    """Every output of every role under one name each."""
    options = {"roles": ALL_ROLES, **options}
    found = backbone(batch.input_ids, batch.attention_mask, batch.response_mask, **options)
    return {f"{role}.{n}": t for role, tensors in found.items() for n, t in tensors.items()}


def train_steps(backbone: SharedBackbone, number: int) -> None:
    """Steps of AdamW on the trainable parameters, each after a rollout as in PPO."""
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(number):
        batch = ragged_batch(seed=step)
        prompts = batch.input_ids[:, :5], batch.attention_mask[:, :5]
        backbone.eval()
        backbone.generate(*prompts, GenerationConfig(**GREEDY))
        with torch.no_grad():
            outputs_of(backbone, batch)
        backbone.train()
        found = outputs_of(backbone, batch, roles=("policy", "value"))
        loss = -found["policy.logprobs"].sum() + (found["value.values"] - 1).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def frozen_bytes(backbone: SharedBackbone) -> dict[str, bytes]:
    """The bytes of the base, gathered from the modules: weights, buffers, quantization state."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, module in backbone.causal_model.named_modules():
            if "lora_" in name:
                continue
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    yield f"{name}.{key}", tensor
                state = getattr(tensor, "quant_state", None)
                if state is not None:
                    yield f"{name}.{key}.absmax", state.absmax
                    yield f"{name}.{key}.code", state.code
                    yield f"{name}.{key}.offset", state.offset
                    yield f"{name}.{key}.absmax of absmax", state.state2.absmax
                    yield f"{name}.{key}.code of absmax", state.state2.code

    return bytes_of(tensors())


@pytest.mark.parametrize("role", ALL_ROLES)
def test_masked_positions_hold_zero_and_the_others_do_not(llama_folder: str, role: str) -> None:
    batch = ragged_batch()
    found = outputs_of(backbone_of(load(llama_folder, "fp32")), batch, roles=(role,))
    assert found
    for tensor in found.values():
        assert tensor.shape == (3, 6)
        assert tensor.dtype == torch.float32
        assert (tensor[~batch.response_mask] == 0.0).all()
        assert (tensor[batch.response_mask] != 0.0).all()


def test_masked_tokens_get_no_gradient_and_change_nothing(llama_folder: str) -> None:
    batch = ragged_batch()
    backbone = backbone_of(load(llama_folder, "fp32"))
    results = []
    for padding in (3, 61):
        ids = batch.input_ids.masked_fill(~batch.attention_mask, padding)
        changed = Batch(
            input_ids=ids, attention_mask=batch.attention_mask, response_mask=batch.response_mask
        )
        backbone.zero_grad()
        found = outputs_of(backbone, changed)
        sum(tensor.sum() for tensor in found.values()).backward()
        results.append((found, gradients(backbone)))
    for name, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][name])
    assert largest_difference(results[0][1], results[1][1]) == 0.0


def test_padding_ids_beyond_the_vocabulary_are_harmless(llama_folder: str) -> None:
    batch = ragged_batch()
    backbone = backbone_of(load(llama_folder, "fp32"))
    beyond = Batch(
        input_ids=batch.input_ids.masked_fill(~batch.attention_mask, 64),
        attention_mask=batch.attention_mask,
        response_mask=batch.response_mask,
    )
    expected = outputs_of(backbone, batch)
    for name, tensor in outputs_of(backbone, beyond).items():
        assert torch.equal(tensor, expected[name])
    generation = GenerationConfig(**GREEDY)
    generated = [
        backbone.generate(b.input_ids[:, :5], b.attention_mask[:, :5], generation)[:, 5:]
        for b in (batch, beyond)
    ]
    assert torch.equal(*generated)


def test_left_padding_does_not_change_what_a_row_says(llama_folder: str) -> None:
    """A row alone, without any padding, gives what it gives in a ragged batch."""
    batch = ragged_batch()
    backbone = backbone_of(load(llama_folder, "fp32"))
    together = outputs_of(backbone, batch)
    for row in range(3):
        tokens = batch.input_ids[row, batch.attention_mask[row]].unsqueeze(0)
        length = int(batch.response_mask[row].sum())
        alone = Batch(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens, dtype=torch.bool),
            response_mask=torch.ones(1, length, dtype=torch.bool),
        )
        for name, tensor in outputs_of(backbone, alone).items():
            torch.testing.assert_close(tensor[0], together[name][row, :length], **CLOSE)


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_the_reference_is_the_model_before_it_had_adapters(
    llama_folder: str, precision: str
) -> None:
    batch, model = ragged_batch(), load(llama_folder, precision)
    keep_packed_weights(model)
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
        ).logits[:, 4:-1]
    own = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 5:, None]).squeeze(-1)
    found = outputs_of(backbone_of(model), batch)
    torch.testing.assert_close(
        found["reference.logprobs"].detach(), own * batch.response_mask, **CLOSE
    )
    assert not torch.allclose(found["policy.logprobs"], found["reference.logprobs"], atol=0.01)


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_generation_of_a_role_is_pefts_own(llama_folder: str, precision: str, role: str) -> None:
    config = lora(target_modules="all-linear")
    prompts = ragged_batch()
    ids, mask = prompts.input_ids[:, :5], prompts.attention_mask[:, :5]
    peft = peft_model(load(llama_folder, precision), {"policy": config}).eval()
    own = {}
    with torch.no_grad():
        own["policy"] = peft.generate(input_ids=ids, attention_mask=mask.long(), **GREEDY)
        with peft.disable_adapter():
            own["reference"] = peft.generate(input_ids=ids, attention_mask=mask.long(), **GREEDY)
    backbone = backbone_of(load(llama_folder, precision), peft_config=config)
    found = backbone.generate(ids, mask, GenerationConfig(**GREEDY), role=role)
    assert torch.equal(found[:, 5:], own[role][:, 5:])
    assert not torch.equal(own["policy"], own["reference"])


class OwnProcessor:
    """A logits processor that always asks for token 7, or fails."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.fails:
            raise KeyboardInterrupt
        return scores.scatter(1, torch.full_like(input_ids[:, :1], 7), 1e4)


def test_generation_inherits_nothing_from_the_models_own_config(llama_folder: str) -> None:
    backbone = backbone_of(load(llama_folder, "fp32"))
    batch = ragged_batch()
    prompts = batch.input_ids[:, :5], batch.attention_mask[:, :5]
    expected = backbone.generate(*prompts, GenerationConfig(**GREEDY))
    stored = GenerationConfig(
        repetition_penalty=9.0,
        suppress_tokens=expected[:, 5:].unique().tolist(),
        max_new_tokens=2,
        pad_token_id=0,
    )
    backbone.causal_model.generation_config = stored
    found = backbone.generate(*prompts, GenerationConfig(**GREEDY))
    assert torch.equal(found, expected)
    assert backbone.causal_model.generation_config is stored
    # The penalty is strong enough to be seen, and other arguments of generate pass.
    penalised = backbone.generate(
        *prompts, GenerationConfig(**GREEDY | {"repetition_penalty": 9.0})
    )
    assert not torch.equal(penalised, expected)
    forced = backbone.generate(
        *prompts, GenerationConfig(**GREEDY), logits_processor=[OwnProcessor()]
    )
    assert (forced[:, 5:] == 7).all()


def test_the_models_own_generation_config_and_routes_return_after_an_error(
    llama_folder: str,
) -> None:
    backbone = backbone_of(load(llama_folder, "fp32"))
    stored = backbone.causal_model.generation_config
    batch = ragged_batch()
    with pytest.raises(KeyboardInterrupt):
        backbone.generate(
            batch.input_ids[:, :5],
            batch.attention_mask[:, :5],
            GenerationConfig(**GREEDY),
            logits_processor=[OwnProcessor(fails=True)],
        )
    assert backbone.causal_model.generation_config is stored
    assert backbone.router.active == ()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_dropout_of_the_base_never_runs(gpt2_folder: str, checkpointing: bool) -> None:
    """GPT-2 with half of everything dropped says the same in training as in evaluation."""
    backbone, batch = gpt2_backbone(gpt2_folder), ragged_batch()
    if checkpointing:
        backbone.activation_checkpointing_enable()
    expected = outputs_of(backbone.eval(), batch)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        backbone.zero_grad()
        found = outputs_of(backbone.train(), batch, roles=("policy", "value"))
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], **CLOSE)
        (found["policy.logprobs"].sum() + found["value.values"].sum()).backward()
        results.append(gradients(backbone))
    assert largest_difference(results[0], results[1]) == 0.0


@pytest.mark.parametrize("kind", ["phi3", "gpt_neox", "gpt2"])
def test_dropout_that_layers_apply_by_themselves_never_runs(kind: str) -> None:
    options = {
        "phi3": {"resid_pdrop": 0.5, "attention_dropout": 0.5, "embd_pdrop": 0.5},
        "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
        "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    }[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config)
    backbone = backbone_of(
        model, peft_config=lora(target_modules="all-linear", fan_in_fan_out=kind == "gpt2")
    )
    batch = ragged_batch()
    backbone.activation_checkpointing_enable()
    expected = outputs_of(backbone.eval(), batch)
    for name, tensor in outputs_of(backbone.train(), batch).items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE)


def test_lora_dropout_follows_the_mode_for_trained_roles_only(llama_folder: str) -> None:
    backbone = backbone_of(
        load(llama_folder, "fp32"),
        peft_config=lora(lora_dropout=0.5),
        reference_adapter=True,
    )
    batch = ragged_batch()
    expected = outputs_of(backbone.eval(), batch)
    assert torch.equal(outputs_of(backbone, batch)["policy.logprobs"], expected["policy.logprobs"])
    found = outputs_of(backbone.train(), batch)
    torch.testing.assert_close(found["reference.logprobs"], expected["reference.logprobs"], **CLOSE)
    for name in ("policy.logprobs", "value.values"):
        assert not torch.allclose(found[name], expected[name], atol=1e-3)
    assert backbone.training
    again = outputs_of(backbone.eval(), batch)
    assert not backbone.training
    for name, tensor in again.items():
        assert torch.equal(tensor, expected[name])


def test_generation_in_training_mode_with_checkpointing_is_that_of_evaluation(
    llama_folder: str,
) -> None:
    """Checkpointed layers drop the cache of past keys, so each step would see one token."""
    backbone, batch = backbone_of(load(llama_folder, "fp32")), ragged_batch()
    prompts = batch.input_ids[:, :5], batch.attention_mask[:, :5]
    expected = backbone.eval().generate(*prompts, GenerationConfig(**GREEDY))
    backbone.activation_checkpointing_enable()
    found = backbone.train().generate(*prompts, GenerationConfig(**GREEDY))
    assert torch.equal(found, expected)
    assert backbone.training
    assert backbone.causal_model.model.layers[0].training


@pytest.mark.parametrize("reference_adapter", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_exactly_policy_value_and_head_train(
    llama_folder: str, precision: str, reference_adapter: bool
) -> None:
    backbone = backbone_of(load(llama_folder, precision), reference_adapter=reference_adapter)
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    expected = {"value_head.weight", "value_head.bias"}
    for layer in (0, 1):
        for module, names in {
            "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "mlp": ("gate_proj", "up_proj", "down_proj"),
        }.items():
            expected |= {
                f"peft_model.base_model.model.model.layers.{layer}.{module}.{name}"
                f".lora_{side}.{adapter}.weight"
                for name in names
                for side in "AB"
                for adapter in ("policy", "value")
            }
    assert trainable == expected
    backbone.check_roles()
    owned = {role: {id(p) for _, p in backbone.role_parameters(role)} for role in backbone.roles}
    assert len(owned["policy"]) == 28
    assert len(owned["value"]) == 30
    assert len(owned["reference"]) == (28 if reference_adapter else 0)
    assert not owned["policy"] & owned["value"]


@pytest.mark.parametrize(
    "part, trains",
    [
        ("layers.0.self_attn.q_proj.lora_A.policy", False),
        ("layers.1.mlp.up_proj.lora_B.value", False),
        ("value_head.bias", False),
        ("layers.1.mlp.up_proj.lora_B.reference", True),
        ("layers.0.input_layernorm.weight", True),
        ("embed_tokens.weight", True),
    ],
)
def test_check_roles_names_the_parameter(llama_folder: str, part: str, trains: bool) -> None:
    backbone = backbone_of(load(llama_folder, "fp32"), reference_adapter=True)
    name, parameter = next((n, p) for n, p in backbone.named_parameters() if part in n)
    parameter.requires_grad_(trains)
    state = "must not train" if trains else "trains but is frozen"
    with pytest.raises(ConfigError, match=f"^{name} {state}: its requires_grad is {trains}"):
        backbone.check_roles()
    parameter.requires_grad_(not trains)
    backbone.check_roles()


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_training_moves_the_adapters_and_not_one_byte_of_the_base(
    llama_folder: str, precision: str
) -> None:
    backbone = backbone_of(load(llama_folder, precision), reference_adapter=True)
    before, print_before = frozen_bytes(backbone), fingerprint(backbone.causal_model)
    adapters_before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    assert any("absmax" in name for name in before) == (precision == "nf4")

    train_steps(backbone, 3)

    assert frozen_bytes(backbone) == before
    assert fingerprint(backbone.causal_model) == print_before
    for name, parameter in backbone.named_parameters():
        moved = not torch.equal(parameter, adapters_before[name])
        owned = ".policy." in name or ".value." in name or name.startswith("value_head.")
        assert moved == owned, name


def test_inference_does_not_repack_4bit_weights(llama_folder: str) -> None:
    """As on a CPU with AVX512-BF16, where bitsandbytes repacks in evaluation mode."""
    model = load(llama_folder, "nf4")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    backbone, batch = backbone_of(model), ragged_batch()
    before = frozen_bytes(backbone)

    def step() -> dict[str, Tensor]:
        backbone.zero_grad()
        outputs_of(backbone.train(), batch)["policy.logprobs"].sum().backward()
        return gradients(backbone)

    expected = step()
    with torch.no_grad():
        outputs_of(backbone.eval(), batch)
    assert frozen_bytes(backbone) == before
    assert largest_difference(step(), expected) == 0.0


def test_weights_repacked_earlier_are_refused(llama_folder: str) -> None:
    model = load(llama_folder, "nf4")
    # What bitsandbytes leaves behind; its kernel for it exists on some CPUs only.
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj cannot be trained"):
        SharedBackbone(model, lora())


def flip_weight(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.view(torch.uint8).view(-1)[77] ^= 1


def flip_norm(model: PreTrainedModel) -> None:
    model.model.norm.weight.data.view(torch.uint8)[5] ^= 1


def add_buffer(model: PreTrainedModel) -> None:
    model.model.norm.register_buffer("loaded", torch.zeros(1))


def rename(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.renamed = model.model.layers[0].mlp._modules.pop("up_proj")


def reshape(model: PreTrainedModel) -> None:
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.data.view(8, 8), requires_grad=False)


def retype(model: PreTrainedModel) -> None:
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.data.view(torch.int32), requires_grad=False)


def flip_state(*path: str) -> Callable[[PreTrainedModel], None]:
    def flip(model: PreTrainedModel) -> None:
        part: Any = model.model.layers[0].self_attn.q_proj.weight.quant_state
        for name in path:
            part = getattr(part, name)
        part.view(-1).view(torch.uint8)[0] ^= 1

    return flip


STATE = {
    "absmax": flip_state("absmax"),
    "code": flip_state("code"),
    "offset": flip_state("offset"),
    "absmax of absmax": flip_state("state2", "absmax"),
    "code of absmax": flip_state("state2", "code"),
}
ANYWHERE = {f.__name__: f for f in (flip_weight, flip_norm, add_buffer, rename, reshape, retype)}


@pytest.mark.parametrize(
    "precision, change",
    [
        *[pytest.param(p, f, id=f"{p}-{n}") for p in ("fp32", "nf4") for n, f in ANYWHERE.items()],
        *[pytest.param("nf4", f, id=f"nf4-{n}") for n, f in STATE.items()],
    ],
)
def test_the_fingerprint_sees_one_changed_byte(
    llama_folder: str, precision: str, change: Callable[[PreTrainedModel], None]
) -> None:
    model = load(llama_folder, precision)
    # Codes are shared by all layers and models, so the change must stay in a copy.
    state = getattr(model.model.layers[0].self_attn.q_proj.weight, "quant_state", None)
    if state is not None:
        state.code, state.state2.code = state.code.clone(), state.state2.code.clone()
    before = fingerprint(model)
    assert fingerprint(model) == before
    assert len(before) == 32
    change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": "all-linear", "r": 2},
        {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
    ],
    ids=str,
)
def test_the_fingerprint_does_not_depend_on_adapters(
    llama_folder: str, precision: str, options: dict[str, Any]
) -> None:
    plain = load(llama_folder, precision)
    backbone = backbone_of(load(llama_folder, precision), peft_config=lora(**options))
    assert fingerprint(backbone.causal_model) == fingerprint(plain)
    names = {name for name, _ in base_tensors(plain)}
    assert names >= set(plain.state_dict()) - {n for n in plain.state_dict() if "quant" in n}
    assert names == {name for name, _ in base_tensors(backbone.causal_model)}


def test_the_fingerprint_leaves_out_what_is_computed(llama_folder: str) -> None:
    model = load(llama_folder, "fp32")
    before = fingerprint(model)
    model.model.rotary_emb.inv_freq.mul_(2)  # not stored in a checkpoint: another device's rounding
    assert fingerprint(model) == before


def test_the_fingerprint_of_tied_embeddings_does_not_depend_on_adapters() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    before = fingerprint(copy.deepcopy(model))
    assert fingerprint(backbone_of(model).causal_model) == before


@pytest.mark.parametrize("role", ["value", "reference", "policy"])
def test_each_role_alone_gives_what_it_gives_among_others(llama_folder: str, role: str) -> None:
    batch, backbone = ragged_batch(), backbone_of(load(llama_folder, "fp32"))
    together = outputs_of(backbone, batch)
    for name, tensor in outputs_of(backbone, batch, roles=(role,)).items():
        torch.testing.assert_close(tensor, together[name], **CLOSE)


def test_the_value_head_starts_at_zero_and_in_fp32(llama_folder: str) -> None:
    model = load(llama_folder, "fp32").to(torch.bfloat16)
    backbone = SharedBackbone(model, lora())
    found = outputs_of(backbone, ragged_batch())
    assert not found["value.values"].any()
    assert backbone.value_head.weight.dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_a_target_of_the_lm_head_alone_is_refused_for_the_value_role(llama_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"targets the LM head alone.*pass value_peft_config"):
        SharedBackbone(load(llama_folder, "fp32"), lora(target_modules=["lm_head"]))


def test_a_pattern_that_matches_the_lm_head_is_refused(llama_folder: str) -> None:
    with pytest.raises(ConfigError, match="matches the LM head"):
        SharedBackbone(load(llama_folder, "fp32"), lora(target_modules=".*(q_proj|lm_head)"))


@pytest.mark.parametrize("name", ["activation", "gradient"])
def test_checkpointing_can_be_switched_off_again(llama_folder: str, name: str) -> None:
    backbone, batch = backbone_of(load(llama_folder, "fp32")).train(), ragged_batch()
    calls: list[None] = []
    layer = backbone.causal_model.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(None))
    for enable, expected in ((True, 2), (False, 1)):
        if enable:
            getattr(backbone, f"{name}_checkpointing_enable")()
        else:
            getattr(backbone, f"{name}_checkpointing_disable")()
        calls.clear()
        outputs_of(backbone, batch)["policy.logprobs"].sum().backward()
        assert len(calls) == expected


def test_values_are_fp32_under_autocast(llama_folder: str) -> None:
    backbone, batch = backbone_of(load(llama_folder, "fp32")), ragged_batch()
    torch.nn.init.normal_(backbone.value_head.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = backbone(
            batch.input_ids, batch.attention_mask, batch.response_mask, roles=("value",)
        )["value"]["values"][batch.response_mask]
    # A value computed in bfloat16 has only 8 bits of mantissa and survives the round trip.
    assert not torch.equal(values.bfloat16().float(), values)
