"""Chunked log-probabilities and entropies are those of the model's own logits, for every head."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import (
    Batch,
    each_by_peft,
    gradients,
    largest_difference,
    peft_model,
    ragged_batch,
    randomise_adapters,
)
from peft import LoraConfig
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import tiny
from trl_sync.backbone import logprob
from trl_sync.backbone.logprob import CausalHead, chunked_token_statistics, token_statistics
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError

VOCABULARY = 48
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = SMALL | {"num_key_value_heads": 1}
ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "cohere": lambda **o: CohereConfig(**GROUPED, logit_scale=0.4, **o),
    "gemma": lambda **o: GemmaConfig(**GROUPED, head_dim=16, **o),
    "gemma2": lambda **o: Gemma2Config(
        **GROUPED, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=2.0, **o
    ),
    "gpt2": lambda **o: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1, **o
    ),
    "gpt_neox": lambda **o: GPTNeoXConfig(**SMALL, **o),
    "granite": lambda **o: GraniteConfig(**GROUPED, logits_scaling=3.0, **o),
    "llama": lambda **o: LlamaConfig(**GROUPED, **o),
    "mistral": lambda **o: MistralConfig(**GROUPED, **o),
    "phi3": lambda **o: Phi3Config(**GROUPED, **o),
    "qwen2": lambda **o: Qwen2Config(**GROUPED, **o),
    "qwen3": lambda **o: Qwen3Config(**GROUPED, head_dim=16, **o),
}
# What the causal-LM forward does after the LM head; the numbers are those of the configs above.
POST_PROCESSED = {"cohere", "gemma2", "granite"}
# fp32; logits of order 5 pass one sum over 48 terms, and rows are grouped differently.
CLOSE = {"rtol": 0.0, "atol": 2e-5}
# fp32 gradients, relative to their norm: other chunks add up in another order.
RELATIVE = 2e-5


def causal_model(kind: str, tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[kind](tie_word_embeddings=tied))
    head = model.get_output_embeddings()
    # Final norms give rows of length sqrt(32), so logits have a standard deviation of about 3:
    # above the cap of Gemma2, and far from the uniform distribution.
    nn.init.normal_(head.weight, std=0.5)
    assert (head.weight is model.get_input_embeddings().weight) == tied
    return model.eval()


def policy_lora(kind: str, **changes: Any) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=changes.pop("target_modules", "all-linear"),
        # PEFT would set it for GPT-2's Conv1D layers, and warn.
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
        **changes,
    )


def backbone_of(
    model: PreTrainedModel, config: LoraConfig, chunk_tokens: int | None
) -> SharedBackbone:
    options: dict[str, Any] = {"value_peft_config": policy_lora(model.config.model_type)}
    if chunk_tokens is not None:
        options["logprob_chunk_bytes"] = 4 * VOCABULARY * chunk_tokens
    backbone = SharedBackbone(model, config, **options)
    randomise_adapters(backbone)
    return backbone.train()


def own_statistics(
    model: PreTrainedModel, batch: Batch, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the response from the logits of the model's forward."""
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits[:, 4:-1]
    distribution = (logits / temperature).log_softmax(-1)
    logprobs = distribution.gather(-1, batch.input_ids[:, 5:, None]).squeeze(-1)
    entropies = torch.distributions.Categorical(logits=logits / temperature).entropy()
    return logprobs * batch.response_mask, entropies * batch.response_mask


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_chunks_equal_the_models_own_logits(kind: str, tied: bool) -> None:
    model, batch, temperature = causal_model(kind, tied), ragged_batch(VOCABULARY), 0.8
    config = policy_lora(kind)
    peft = peft_model(copy.deepcopy(model), {"policy": config})
    entropies: list[Tensor] = []
    weights = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))

    def step(_: int) -> Tensor:
        logprobs, entropy = own_statistics(peft.base_model.model, batch, temperature)
        entropies.append(entropy.detach())
        return logprobs * weights

    own = each_by_peft(peft, ("policy", None), step)
    expected_gradients = gradients(peft)
    for chunk_tokens in (1, 5, None):
        backbone = backbone_of(copy.deepcopy(model), config, chunk_tokens)
        outputs = backbone(
            batch.input_ids,
            batch.attention_mask,
            batch.response_mask,
            roles=("policy", "reference"),
            temperature=temperature,
        )
        found = outputs["policy"]["logprobs"] * weights
        torch.testing.assert_close(found.detach(), own[0], **CLOSE)
        torch.testing.assert_close(outputs["policy"]["entropies"], entropies[0], **CLOSE)
        reference = outputs["reference"]["logprobs"] * weights
        torch.testing.assert_close(reference.detach(), own[1], **CLOSE)
        torch.testing.assert_close(outputs["reference"]["entropies"], entropies[1], **CLOSE)
        found.sum().backward()
        found_gradients = {
            name: gradient
            for name, gradient in gradients(backbone.peft_model).items()
            if ".policy." in name
        }
        assert largest_difference(found_gradients, expected_gradients) < RELATIVE
    assert not torch.allclose(own[0], own[1], atol=0.01), "the adapter does nothing"


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_the_models_above_show_whether_their_logits_are_post_processed(kind: str) -> None:
    """The plain head is far from the model's own logits exactly where it should be."""
    model, batch = causal_model(kind, True), ragged_batch(VOCABULARY)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    with torch.no_grad():
        hidden = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state
        plain = model.get_output_embeddings()(hidden).log_softmax(-1)
        own = model(**inputs).logits.log_softmax(-1)
    difference = (plain - own)[batch.attention_mask].abs().mean()
    if kind in POST_PROCESSED:
        assert difference > 0.3
    else:
        assert difference < 1e-5  # fp32, the same operations


def test_every_known_head_is_compared_above() -> None:
    assert set(logprob._POST_PROCESSING) == set(ARCHITECTURES)


def test_a_gemma2_without_capping_is_not_capped() -> None:
    model = causal_model("gemma2", True)
    model.config.final_logit_softcapping = None
    batch = ragged_batch(VOCABULARY)
    own, _ = own_statistics(model, batch, 1.0)
    backbone = SharedBackbone(model, policy_lora("gemma2"))
    outputs = backbone(
        batch.input_ids, batch.attention_mask, batch.response_mask, roles=("reference",)
    )
    torch.testing.assert_close(outputs["reference"]["logprobs"], own, **CLOSE)


def test_an_unknown_model_type_is_refused_by_name() -> None:
    config = OPTConfig(
        vocab_size=48, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"'opt' is not known.*cohere, gemma, gemma2"):
        SharedBackbone(model, LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
def test_lora_on_the_lm_head_gets_the_gradients_of_the_models_own_logits(
    chunk_tokens: int | None,
) -> None:
    model, batch = causal_model("gemma2", False), ragged_batch(VOCABULARY)
    config = policy_lora("gemma2", target_modules=["lm_head", "q_proj"])
    peft = peft_model(copy.deepcopy(model), {"policy": config})
    own = each_by_peft(
        peft, ("policy",), lambda _: own_statistics(peft.base_model.model, batch, 1.0)[0]
    )[0]
    backbone = backbone_of(model, config, chunk_tokens)
    outputs = backbone(
        batch.input_ids, batch.attention_mask, batch.response_mask, roles=("policy",)
    )
    outputs["policy"]["logprobs"].sum().backward()

    torch.testing.assert_close(outputs["policy"]["logprobs"].detach(), own, **CLOSE)
    assert largest_difference(gradients(backbone.peft_model), gradients(peft)) < RELATIVE


@pytest.mark.parametrize(
    "target_modules, runs_in_backward",
    # Below a frozen head the backward pass needs no logits.
    [("all-linear", 0), (["lm_head"], 4)],
    ids=["trunk", "lm_head"],
)
def test_one_chunk_of_logits_is_alive_at_a_time(target_modules: Any, runs_in_backward: int) -> None:
    """Each time the head runs, forward or backward, the storage of its last output is gone."""
    chunk_tokens, batch = 3, ragged_batch(VOCABULARY)
    backbone = backbone_of(
        causal_model("llama", False),
        policy_lora("llama", target_modules=target_modules),
        chunk_tokens,
    )
    earlier: list[StorageWeakRef] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        assert output.shape[0] <= chunk_tokens
        assert all(reference.expired() for reference in earlier), f"call {len(earlier)}"
        earlier.append(StorageWeakRef(output.untyped_storage()))

    backbone.causal_model.lm_head.register_forward_hook(watch)
    outputs = backbone(
        batch.input_ids, batch.attention_mask, batch.response_mask, roles=("policy",)
    )
    # 6 + 4 + 2 response tokens in chunks of 3.
    assert len(earlier) == 4
    assert all(reference.expired() for reference in earlier) or runs_in_backward
    outputs["policy"]["logprobs"].sum().backward()
    assert len(earlier) == 4 + runs_in_backward


def test_without_gradients_the_head_runs_once_for_each_chunk() -> None:
    batch = ragged_batch(VOCABULARY)
    backbone = backbone_of(causal_model("llama", False), policy_lora("llama"), 3)
    calls: list[int] = []
    backbone.causal_model.lm_head.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    with torch.no_grad():
        backbone(batch.input_ids, batch.attention_mask, batch.response_mask, roles=("policy",))
    assert calls == [3, 3, 3, 3]


def test_the_value_role_never_reaches_the_lm_head() -> None:
    batch = ragged_batch(VOCABULARY)
    backbone = backbone_of(causal_model("llama", False), policy_lora("llama"), None)
    calls: list[None] = []
    backbone.causal_model.lm_head.register_forward_hook(lambda *_: calls.append(None))
    backbone(batch.input_ids, batch.attention_mask, batch.response_mask, roles=("value",))
    assert not calls


@pytest.mark.parametrize(
    "chunk_bytes, expected",
    [
        (1, [1] * 7),  # less than one row of 4 * 10 bytes is still one token
        (79, [1] * 7),
        (80, [2, 2, 2, 1]),
        (279, [6, 1]),
        (280, [7]),
    ],
)
def test_chunk_sizes_follow_the_bytes_of_fp32_logits(chunk_bytes: int, expected: list[int]) -> None:
    sizes: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return hidden

    hidden = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(7)
    found = chunked_token_statistics(
        hidden, tokens, head, vocabulary_size=10, chunk_bytes=chunk_bytes
    )
    assert sizes == expected
    logprobs = hidden.log_softmax(-1)
    torch.testing.assert_close(found[0], logprobs[tokens, tokens], rtol=0, atol=1e-6)  # fp32
    torch.testing.assert_close(
        found[1], -(logprobs.exp() * logprobs).sum(-1), rtol=0, atol=1e-6
    )  # fp32


@pytest.mark.parametrize("head_trains", [True, False])
def test_no_tokens_give_empty_statistics(head_trains: bool) -> None:
    hidden = torch.zeros(0, 64, requires_grad=True)
    logprobs, entropies = chunked_token_statistics(
        hidden,
        torch.zeros(0, dtype=torch.long),
        CausalHead(tiny.llama()),
        vocabulary_size=64,
        head_trains=head_trains,
    )
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_bytes", [1, 3 * 4 * 10, 10**6])
def test_below_a_frozen_head_gradients_are_those_of_kept_logits(
    temperature: float, chunk_bytes: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 6, generator=generator, requires_grad=True)
    weight = torch.randn(10, 6, generator=generator)
    weights = torch.randn(7, generator=generator)
    tokens = torch.tensor([3, 3, 0, 9, 5, 1, 2])

    def head(states: Tensor) -> Tensor:
        return torch.tanh(states @ weight.T / 3) * 3  # a head that caps its logits

    logprobs, entropies = chunked_token_statistics(
        hidden,
        tokens,
        head,
        vocabulary_size=10,
        temperature=temperature,
        chunk_bytes=chunk_bytes,
        head_trains=False,
    )
    (found,) = torch.autograd.grad((logprobs * weights).sum(), hidden)
    kept_logprobs, kept_entropies = token_statistics(head(hidden), tokens, temperature)
    (expected,) = torch.autograd.grad((kept_logprobs * weights).sum(), hidden)
    torch.testing.assert_close(logprobs, kept_logprobs, rtol=0, atol=2e-6)  # fp32
    torch.testing.assert_close(entropies, kept_entropies, rtol=0, atol=2e-6)  # fp32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)  # fp32
    assert not entropies.requires_grad


def test_statistics_of_distributions_worked_out_by_hand() -> None:
    # Probabilities 1/8, 2/8, 5/8; uniform over three; and one token that is certain.
    logits = torch.tensor([[0.0, math.log(2), math.log(5)], [7.0, 7.0, 7.0], [0.0, 0.0, 900.0]])
    logprobs, entropies = token_statistics(logits, torch.tensor([1, 0, 2]), 1.0)
    # ln(2/8); ln(1/3); ln 1
    expected = torch.tensor([-1.3862944, -1.0986123, 0.0])
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)  # fp32, seven digits
    # 0.125 * 2.0794415 + 0.25 * 1.3862944 + 0.625 * 0.4700036; ln 3; 0
    expected = torch.tensor([0.9002559, 1.0986123, 0.0])
    torch.testing.assert_close(entropies, expected, rtol=0, atol=1e-6)  # fp32, seven digits


def test_temperature_divides_the_logits() -> None:
    # At temperature 2 the weights 1, 4, 9 become 1, 2, 3: probabilities 1/6, 2/6, 3/6.
    logits = torch.tensor([[0.0, math.log(4), math.log(9)]])
    logprobs, entropies = token_statistics(logits, torch.tensor([2]), 2.0)
    assert logprobs.item() == pytest.approx(-0.6931472, abs=1e-6)  # fp32, seven digits
    # (ln 6)/6 + (ln 3)/3 + (ln 2)/2 = 0.2986266 + 0.3662041 + 0.3465736
    assert entropies.item() == pytest.approx(1.0114043, abs=1e-6)  # fp32, seven digits


def test_half_precision_logits_give_fp32_statistics_without_entropy_gradient() -> None:
    logits = torch.zeros(2, 64, dtype=torch.bfloat16, requires_grad=True)
    logprobs, entropies = token_statistics(logits, torch.tensor([0, 3]), 1.0)
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert not entropies.requires_grad
    # ln 64, which bf16 would round to 4.15625.
    torch.testing.assert_close(logprobs.detach(), torch.full((2,), -4.1588831))
    torch.testing.assert_close(entropies, torch.full((2,), 4.1588831))
