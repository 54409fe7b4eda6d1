"""One stacked pass gives what PEFT's own adapters give in separate passes; the rest is refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from backbones import (
    Batch,
    each_by_peft,
    gradients,
    largest_difference,
    load,
    lora,
    peft_model,
    ragged_batch,
    randomise_adapters,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedModel

import tiny
from trl_sync.backbone.checkpointing import enable_checkpointing
from trl_sync.backbone.routing import AdapterRouter, check_lora_config
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError

# Different ranks, scales and targets, so that no two adapters can stand in for each other.
ADAPTERS = {
    "policy": lora(r=4, lora_alpha=8),
    "value": lora(r=8, lora_alpha=8, target_modules="all-linear"),
    "reward": lora(r=2, lora_alpha=16, target_modules=["q_proj", "down_proj"]),
}
# fp32: the stacked batch is larger, so matrix products may add up in another order; a gradient is
# a sum over at most 33 tokens x 128 features, and two layers deep the error stays below 1e-5.
RELATIVE = 1e-5
# fp32 logits of order 1, the same reason.
ABSOLUTE = 1e-5


def weights_for(batch: Batch, vocabulary_size: int, index: int) -> Tensor:
    """A random weight for each logit of a role, zero where there is no token."""
    generator = torch.Generator().manual_seed(100 + index)
    shape = (*batch.input_ids.shape, vocabulary_size)
    return torch.randn(shape, generator=generator) * batch.attention_mask.unsqueeze(-1)


def logits(model: PreTrainedModel, batch: Batch, copies: int = 1) -> Tensor:
    return model(
        input_ids=batch.input_ids.repeat(copies, 1),
        attention_mask=batch.attention_mask.long().repeat(copies, 1),
        position_ids=batch.position_ids.repeat(copies, 1),
        use_cache=False,
    ).logits


def separate(
    model: PeftModel, batch: Batch, adapters: Sequence[str | None]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Weighted logits of each adapter and the sum of their gradients, by PEFT alone."""
    size = model.config.vocab_size

    def step(index: int) -> Tensor:
        return logits(model.base_model.model, batch) * weights_for(batch, size, index)

    return each_by_peft(model, adapters, step), gradients(model)


def stacked(
    model: PeftModel, batch: Batch, adapters: Sequence[str | None], *, checkpointing: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The same from one routed pass, whose backward runs when the routes have ended."""
    router, size = AdapterRouter(model), model.config.vocab_size
    if checkpointing:
        checkpoint_layers(model, router)
    with router.routes(*adapters):
        found = logits(model.base_model.model, batch, len(adapters))
    results = [
        part * weights_for(batch, size, index)
        for index, part in enumerate(found.chunk(len(adapters)))
    ]
    assert router.active == ()
    sum(result.sum() for result in results).backward()
    return [result.detach() for result in results], gradients(model)


def checkpoint_layers(model: PeftModel, router: AdapterRouter) -> None:
    inner = model.base_model.model
    enable_checkpointing(inner, {"use_reentrant": False, "context_fn": router.checkpoint_contexts})
    model.train()


@contextlib.contextmanager
def counted_calls(module: nn.Module) -> Iterator[list[None]]:
    calls: list[None] = []
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    yield calls
    handle.remove()


def assert_equal(found: Any, expected: Any) -> None:
    assert len(found[0]) == len(expected[0])
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=ABSOLUTE)
    assert expected[1], "no gradient to compare"
    assert largest_difference(found[1], expected[1]) < RELATIVE


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize(
    "adapters",
    [
        ("policy",),
        ("policy", "value"),
        ("value", None, "policy"),
        ("policy", "value", None, "reward"),
        ("policy", "reward", "policy", None),
    ],
    ids=lambda names: "-".join(name or "base" for name in names),
)
def test_one_stacked_pass_equals_separate_passes(
    llama_folder: str, precision: str, adapters: tuple[str | None, ...], checkpointing: bool
) -> None:
    batch = ragged_batch()
    expected = separate(peft_model(load(llama_folder, precision), ADAPTERS), batch, adapters)
    routed = peft_model(load(llama_folder, precision), ADAPTERS)
    layer = routed.base_model.model.model.layers[0].self_attn.q_proj

    with counted_calls(layer) as calls:
        found = stacked(routed, batch, adapters, checkpointing=checkpointing)

    assert len(calls) == (2 if checkpointing else 1)
    assert_equal(found, expected)
    for index, one in enumerate(expected[0]):
        for other in expected[0][:index]:
            assert not torch.allclose(one, other), "the roles are alike, so nothing was compared"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("reference_adapter", [False, True])
def test_backbone_equals_separate_passes_with_the_models_own_logits(
    llama_folder: str, precision: str, reference_adapter: bool, checkpointing: bool
) -> None:
    batch = ragged_batch()
    policy = lora(r=4, target_modules="all-linear")
    backbone = SharedBackbone(
        load(llama_folder, precision), policy, reference_adapter=reference_adapter
    )
    randomise_adapters(backbone)
    with torch.no_grad():
        backbone.value_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    names = ["policy", "value"] + ["reference"] * reference_adapter
    peft = peft_model(load(llama_folder, precision), dict.fromkeys(names, policy))
    head, mask = copy.deepcopy(backbone.value_head), batch.response_mask
    roles = ("policy", "value", "reference")
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(mask.shape, generator=generator) * mask for _ in roles]

    def step(index: int) -> Tensor:
        inner = peft.base_model.model
        if roles[index] == "value":
            hidden = inner.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask.long(),
                position_ids=batch.position_ids,
            ).last_hidden_state[:, 4:-1]
            return head(hidden).squeeze(-1) * weights[index]
        found = logits(inner, batch)[:, 4:-1].div(0.7).log_softmax(-1)
        return found.gather(-1, batch.input_ids[:, 5:, None]).squeeze(-1) * weights[index]

    each = (*names, None)[:3]
    expected = each_by_peft(peft, each, step)
    if checkpointing:
        backbone.activation_checkpointing_enable()
    backbone.train()
    layer = backbone.causal_model.model.layers[1].mlp.up_proj
    with counted_calls(layer) as calls:
        outputs = backbone(
            batch.input_ids, batch.attention_mask, mask, roles=roles, temperature=0.7
        )
        found = [
            outputs[role]["values" if role == "value" else "logprobs"] * weight
            for role, weight in zip(roles, weights, strict=True)
        ]
        # A trainer asks for gradients of the trained roles only.
        (found[0] + found[1]).sum().backward()

    assert len(calls) == (2 if checkpointing else 1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=ABSOLUTE)
    expected_gradients = {n: g for n, g in gradients(peft).items() if ".reference." not in n}
    assert largest_difference(gradients(backbone.peft_model), expected_gradients) < RELATIVE
    torch.testing.assert_close(backbone.value_head.weight.grad, head.weight.grad, rtol=1e-5, atol=0)
    torch.testing.assert_close(backbone.value_head.bias.grad, head.bias.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 32}},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
        {"target_modules": r".*layers\.1.*_proj"},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items())[:60],
)
def test_lora_options_are_computed_as_peft_does(
    llama_folder: str, options: dict[str, Any], checkpointing: bool
) -> None:
    batch, adapters = ragged_batch(), ("policy", "value", None)
    configs = {"policy": lora(**options), "value": lora(r=2, **options)}
    expected = separate(peft_model(load(llama_folder, "fp32"), configs), batch, adapters)
    routed = peft_model(load(llama_folder, "fp32"), configs)

    assert_equal(stacked(routed, batch, adapters, checkpointing=checkpointing), expected)


@pytest.mark.parametrize("initialisation", [True, False, "gaussian", "orthogonal"])
def test_supported_initialisations_leave_the_base_alone(
    llama_folder: str, initialisation: Any
) -> None:
    before = load(llama_folder, "fp32").state_dict()
    config = lora(init_lora_weights=initialisation)
    backbone = SharedBackbone(load(llama_folder, "fp32"), config)
    for name, tensor in backbone.causal_model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_gpt2_with_its_conv1d_layers(gpt2_folder: str, checkpointing: bool) -> None:
    batch, adapters = ragged_batch(), ("policy", None, "value")
    options = {"target_modules": ["c_attn", "c_fc", "c_proj", "wte"], "fan_in_fan_out": True}
    configs = {"policy": lora(**options), "value": lora(r=2, **options)}

    def made() -> PeftModel:
        model = peft_model(load(gpt2_folder, "fp32"), configs)
        # Its own dropout would draw different numbers in a batch of another size.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attn_pdrop"):
                module.attn_pdrop = 0.0
        model.base_model.model.config.attn_pdrop = 0.0
        return model

    expected = separate(made().eval(), batch, adapters)
    assert_equal(stacked(made(), batch, adapters, checkpointing=checkpointing), expected)


def test_embedding_updates_are_scaled_where_the_embedding_is() -> None:
    torch.manual_seed(0)
    # Gemma multiplies its embeddings by the root of the hidden size, here 8.
    base = GemmaForCausalLM(
        GemmaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            tie_word_embeddings=False,
        )
    )
    batch, adapters = ragged_batch(), ("policy", None)
    configs = {"policy": lora(target_modules=["embed_tokens", "q_proj"])}
    expected = separate(peft_model(copy.deepcopy(base), configs), batch, adapters)
    assert_equal(stacked(peft_model(base, configs), batch, adapters), expected)


def test_routing_in_bfloat16_keeps_the_outputs_type(llama_folder: str) -> None:
    batch = ragged_batch()
    results = []
    for routed in (False, True):
        base = load(llama_folder, "fp32").to(torch.bfloat16)
        model = peft_model(base, {"policy": lora()})
        router = AdapterRouter(model) if routed else None
        with router.routes("policy", None) if router else contextlib.nullcontext():
            found = logits(model.base_model.model, batch, 2)
        assert found.dtype == torch.bfloat16
        results.append(found.chunk(2)[0][batch.attention_mask].float())
    # bfloat16 has 8 bits of mantissa; logits are below 2 and pass two layers.
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0.05)


def test_dropout_of_one_role_draws_the_numbers_that_peft_draws(llama_folder: str) -> None:
    batch, configs = ragged_batch(), {"policy": lora(lora_dropout=0.3)}
    results = []
    for run in (separate, stacked):
        model = peft_model(load(llama_folder, "fp32"), configs).train()
        torch.manual_seed(3)
        results.append(run(model, batch, ("policy",)))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_recomputation_drops_out_the_same_numbers(llama_folder: str, precision: str) -> None:
    batch, adapters = ragged_batch(), ("policy", "value", None)
    configs = {"policy": lora(lora_dropout=0.3), "value": lora(lora_dropout=0.6)}
    results = []
    for checkpointing in (False, True):
        model = peft_model(load(llama_folder, precision), configs).train()
        torch.manual_seed(3)
        results.append(stacked(model, batch, adapters, checkpointing=checkpointing))
    assert_equal(results[1], results[0])


def test_each_slice_has_the_dropout_of_its_own_adapter() -> None:
    """With A and B the identity, an update is the dropped-out input times the scale."""
    size, rows = 64, 200
    model = get_peft_model(
        nn.Sequential(nn.Linear(size, size, bias=False)),
        LoraConfig(r=size, lora_alpha=2 * size, target_modules=["0"], lora_dropout=0.25),
        adapter_name="policy",
    )
    model.add_adapter("value", LoraConfig(r=size, lora_alpha=size, target_modules=["0"]))
    layer = model.base_model.model[0]
    for adapter in ("policy", "value"):
        nn.init.eye_(layer.lora_A[adapter].weight)
        nn.init.eye_(layer.lora_B[adapter].weight)
    router, inputs = AdapterRouter(model.train()), torch.ones(3 * rows, size)
    torch.manual_seed(0)
    with router.routes("policy", "value", None):
        update = (layer(inputs) - layer.base_layer(inputs)).chunk(3)

    kept = update[0] > 1
    # Scale 2, divided by the three quarters that stay. fp32 noise of a difference of order 1.
    torch.testing.assert_close(update[0][kept], torch.full_like(update[0][kept], 2 / 0.75))
    torch.testing.assert_close(
        update[0][~kept], torch.zeros_like(update[0][~kept]), rtol=0, atol=1e-6
    )
    # Five standard deviations of the mean of 12800 draws: 5 * sqrt(0.25 * 0.75 / 12800) = 0.019.
    assert abs(kept.float().mean().item() - 0.75) < 0.019
    torch.testing.assert_close(update[1], torch.ones(rows, size), rtol=0, atol=1e-6)
    assert not update[2].any()


def test_switching_adapters_under_checkpointing_gives_wrong_gradients(llama_folder: str) -> None:
    """Why routing exists: PEFT's way recomputes the policy's layers with the value adapter."""
    batch, adapters = ragged_batch(), ("policy", "value")
    configs = dict.fromkeys(adapters, ADAPTERS["value"])
    expected = separate(peft_model(load(llama_folder, "fp32"), configs), batch, adapters)[1]
    model = peft_model(load(llama_folder, "fp32"), configs)
    enable_checkpointing(model.base_model.model, {"use_reentrant": False})
    model.train()
    parts = []
    for index, adapter in enumerate(adapters):
        model.set_adapter(adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        parts.append(logits(model.base_model.model, batch) * weights_for(batch, 64, index))
    sum(part.sum() for part in parts).backward()

    found = gradients(model)
    norms = {n: g.norm() for n, g in expected.items()}
    worst = max(
        (found.get(n, torch.zeros_like(g)) - g).norm() / norms[n] for n, g in expected.items()
    )
    assert worst > 0.5


def test_without_routes_the_model_is_the_base(llama_folder: str) -> None:
    batch = ragged_batch()
    expected = logits(load(llama_folder, "fp32"), batch)
    model = peft_model(load(llama_folder, "fp32"), ADAPTERS)
    AdapterRouter(model)
    assert torch.equal(logits(model.base_model.model, batch), expected)


def test_routes_nest_and_end_with_an_error(llama_folder: str) -> None:
    router = AdapterRouter(peft_model(load(llama_folder, "fp32"), ADAPTERS))
    with router.routes("policy"):
        with contextlib.suppress(KeyError), router.routes("value", None):
            assert router.active == ("value", None)
            raise KeyError
        assert router.active == ("policy",)
    assert router.active == ()


def test_recomputation_takes_the_routes_of_the_forward_pass(llama_folder: str) -> None:
    """Two checkpointed passes with different routes wait for one backward pass."""
    batch, adapters = ragged_batch(), ("policy", "value")
    expected = separate(peft_model(load(llama_folder, "fp32"), ADAPTERS), batch, adapters)[1]
    model = peft_model(load(llama_folder, "fp32"), ADAPTERS)
    router = AdapterRouter(model)
    checkpoint_layers(model, router)
    losses = []
    for index, adapter in enumerate(adapters):
        with router.routes(adapter):
            found = logits(model.base_model.model, batch)
        losses.append((found * weights_for(batch, 64, index)).sum())
    with router.routes("reward", None):
        sum(losses).backward()
    assert largest_difference(gradients(model), expected) < RELATIVE


def test_rows_that_do_not_split_are_an_error(llama_folder: str) -> None:
    model = peft_model(load(llama_folder, "fp32"), ADAPTERS)
    router = AdapterRouter(model)
    with (
        router.routes("policy", "value"),
        pytest.raises(AssertionError, match="3 rows do not split into 2 slices"),
    ):
        logits(model.base_model.model, ragged_batch(num_rows=3))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora=True"),
    ({"bias": "all"}, 'bias="all"'),
    ({"bias": "lora_only"}, 'bias="lora_only"'),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
    ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters="),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens="),
    ({"layer_replication": [(0, 2)]}, "layer_replication="),
    ({"use_qalora": True}, "use_qalora="),
    ({"ensure_weight_tying": True}, "ensure_weight_tying="),
]


@pytest.mark.parametrize("options, named", REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_an_option_that_routing_does_not_compute_is_refused_by_name(
    options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_lora_config(lora(**options))


@pytest.mark.parametrize(
    "initialisation", ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "lora_ga"]
)
def test_an_initialisation_that_changes_the_base_is_refused(initialisation: str) -> None:
    config = lora()
    # Some of these need extra packages or options to be constructed; the field alone decides.
    config.init_lora_weights = initialisation
    with pytest.raises(ConfigError, match=f"init_lora_weights='{initialisation}'"):
        check_lora_config(config)


def test_another_peft_type_is_refused_by_name() -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="must be a LoraConfig, got IA3Config"):
        check_lora_config(config)


@pytest.mark.parametrize("place", ["peft_config", "value_peft_config"])
def test_a_refused_option_leaves_the_model_as_it_was(llama_folder: str, place: str) -> None:
    model = load(llama_folder, "fp32")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match="use_dora=True"):
        SharedBackbone(model, **{place: lora(use_dora=True)})
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}, None])
def test_checkpointing_is_never_reentrant(llama_folder: str, options: Any) -> None:
    backbone = SharedBackbone(load(llama_folder, "fp32"), lora())
    with pytest.raises(ConfigError, match="use_reentrant=True"):
        backbone.activation_checkpointing_enable({"use_reentrant": True})
    backbone.activation_checkpointing_enable(options)
    wrapped = backbone.causal_model.model.layers[0]._gradient_checkpointing_func
    function = wrapped.args[1]  # what the layer's evaluation mode is put around
    assert function.func is checkpoint
    assert function.keywords["use_reentrant"] is False


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "inner model"])
def test_a_model_that_already_has_adapters_is_refused(wrapped: bool) -> None:
    model = tiny.llama()
    peft = get_peft_model(model, lora())
    with pytest.raises(ConfigError, match="already has adapters, and peft_config"):
        SharedBackbone(peft if wrapped else model, lora())


def test_a_layer_that_routing_does_not_compute_is_refused_by_name() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match=r"base_model\.model\.0 is a Conv1d"):
        AdapterRouter(model)


def test_a_model_without_lora_layers_is_refused() -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="no LoRA layer: check target_modules"):
        AdapterRouter(get_peft_model(tiny.llama(), config))
