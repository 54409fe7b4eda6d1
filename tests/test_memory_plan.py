"""The memory plan: figures of Llama-3.1-8B computed by hand, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from trl import ModelConfig

from planned_models import write_config
from trl_sync import ConfigError, PPOConfig
from trl_sync.planning import formulas
from trl_sync.planning.architecture import Architecture, count_architecture, read_architecture
from trl_sync.planning.options import DEFAULT_DROPOUT, DEFAULT_RANK, PlanOptions
from trl_sync.planning.plan import MemoryPlan, make_plan

# Llama-3.1-8B by hand. A layer: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336.
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
LINEAR = 32 * LAYER
EMBEDDING = 128256 * 4096  # and as much again in the LM head
NORMS = (2 * 32 + 1) * 4096
ADAPTER = 41_943_040  # rank 16 x 32 layers x (2 x 8192 + 2 x 5120 + 3 x 18432)
TRAINED = 2 * ADAPTER + 4097  # and the value head with its bias
PACKED = LINEAR // 2
STATE = LINEAR // 64 + LINEAR // 64 // 256 * 4
DENSE = (2 * EMBEDDING + NORMS) * 2


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return read_architecture(str(write_config("Llama-3.1-8B", tmp_path_factory.mktemp("8b"))))


def plan(model: Architecture, **changes: Any) -> MemoryPlan:
    return make_plan(PlanOptions(model=model, **changes))


# Counting


def test_the_parameters_of_8b(llama_8b: Architecture) -> None:
    assert llama_8b.linear_parameters == LINEAR == 6_979_321_856
    assert (llama_8b.embedding, llama_8b.head) == (EMBEDDING, EMBEDDING)
    assert sum(llama_8b.small) == NORMS
    assert llama_8b.parameters == 8_030_261_248  # what the model card rounds to 8.03 B
    assert llama_8b.layer_parameters == LAYER + 2 * 4096
    assert formulas.lora_parameters(llama_8b.linears, 16) == ADAPTER


@pytest.mark.parametrize("name, billions", [("Llama-3.2-1B", 1.2358), ("Llama-3.1-70B", 70.5537)])
def test_the_parameters_of_others(name: str, billions: float, tmp_path: Path) -> None:
    model = read_architecture(str(write_config(name, tmp_path)))
    assert model.parameters / 1e9 == pytest.approx(billions, abs=5e-5)
    assert (model.head == 0) == (name == "Llama-3.2-1B")  # tied


def test_counting_takes_no_memory_and_no_weights(llama_8b: Architecture) -> None:
    # 8 billion parameters were counted above; a process with them would have 16 GB more.
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    assert pages * os.sysconf("SC_PAGE_SIZE") < 4e9


# Llama-3.1-8B by hand


def test_a_shared_4_bit_base_on_one_gpu(llama_8b: Architecture) -> None:
    found = plan(llama_8b)
    assert found.static == {
        "base: linear layers": PACKED,
        "base: embeddings, head, norms": DENSE,
        "base: quantization state": STATE,
        "trained adapters, value head: weights": 4 * TRAINED,
        "trained adapters, value head: gradients": 4 * TRAINED,
        "trained adapters, value head: AdamW": 8 * TRAINED,
    }
    assert found.static_bytes == 7_044_538_384
    assert pytest.approx(4.127, abs=5e-4) == (PACKED + STATE) * 8 / LINEAR


@pytest.mark.parametrize(
    "engine, base, trained, extra",
    [
        ("ddp", PACKED + DENSE, 16 * TRAINED, 4 * TRAINED),
        # DeepSpeed in bf16: 2 + 2 bytes, and 4 + 8 in the part of the optimizer. Its bucket of 5e8
        # elements is there during updates.
        ("zero1", PACKED + DENSE, 4 * TRAINED + 12 * TRAINED / 8, 0),
        ("zero2", PACKED + DENSE, 2 * TRAINED + 14 * TRAINED / 8, 0),
        # The bucket always; whole are norms, value head, and factors of at most 100,000 elements:
        # all but A of down_proj and B of gate_proj and up_proj, which have 16 x 14336.
        (
            "zero3",
            (PACKED + DENSE) / 8,
            16 * TRAINED / 8,
            1e9 + 2 * (NORMS + TRAINED - 2 * 32 * 3 * 16 * 14336),
        ),
        ("fsdp2", (PACKED + DENSE) / 8, 16 * TRAINED / 8, 0),
        ("fsdp2_qlora", (PACKED + DENSE) / 8, 16 * TRAINED / 8, 0),
        ("hsdp", (PACKED + DENSE) / 4, 16 * TRAINED / 4, 0),
    ],
)
def test_what_each_engine_divides(
    llama_8b: Architecture, engine: str, base: float, trained: float, extra: float
) -> None:
    found = plan(llama_8b, engine=engine, num_gpus=8)
    # Each of the divided sizes is rounded up; the quantization state is whole everywhere.
    assert found.static_bytes == pytest.approx(base + STATE + trained + extra, abs=8)
    assert found.loading_bytes == PACKED + DENSE + STATE + 4 * TRAINED


def test_what_sharding_engines_gather(llama_8b: Architecture) -> None:
    whole = PACKED + DENSE + 2 * TRAINED
    for engine in ("zero3", "fsdp2"):
        found = plan(llama_8b, engine=engine)
        assert found.generation["gathered weights"] == whole
        assert found.scoring["gathered weights"] == whole
    layer = LAYER // 2 + 2 * 4096 * 2 + TRAINED // 32 * 2
    assert found.update["gathered weights"] == 2 * EMBEDDING * 2 + 2 * layer
    # ZeRO-3 counts elements: half as many as weights in the packed layers.
    elements = LINEAR // 2 + 2 * EMBEDDING + NORMS + TRAINED
    zero3 = plan(llama_8b, engine="zero3").update["gathered weights"]
    assert zero3 == pytest.approx((layer * 32 + 4 * EMBEDDING) * 1.05e9 / elements, rel=1e-6)
    assert "gathered weights" not in plan(llama_8b, engine="ddp").generation


def test_a_base_in_bf16_or_8_bit(llama_8b: Architecture) -> None:
    bf16 = plan(llama_8b, quantization="none").static
    assert bf16["base: linear layers"] == 2 * LINEAR
    assert "base: quantization state" not in bf16
    eight = plan(llama_8b, quantization="8bit").static
    assert eight["base: linear layers"] == LINEAR
    # One fp32 scale for each output: q, o, down 4096, k, v 1024, gate, up 14336.
    assert eight["base: quantization state"] == 32 * (3 * 4096 + 2 * 1024 + 2 * 14336) * 4
    # ZeRO-3 divides the parameters of 8-bit layers, which keep a second reference to all of them.
    zero3 = plan(llama_8b, quantization="8bit", engine="zero3").static
    assert zero3["base: linear layers"] == LINEAR + LINEAR / 8


def test_phases_of_8b(llama_8b: Architecture) -> None:
    found = plan(llama_8b, batch=8, rollout_batch=32, response_tokens=512, lora_dropout=0.0)
    assert found.generation["KV cache"] == 2 * 32 * 1024 * 2 * 32 * 1024 == 4_294_967_296
    stacked = 2 * 8 * 1024
    assert found.update["inputs of checkpointed layers"] == stacked * 4096 * 2 * 32
    # A token: two norms in fp32; 4 of 4096, 3 of 14336, and the inputs 2 x 4096 (of q, k, v and of
    # gate, up), 4096 (of o), 14336 (of down) in bf16; 7 products of rank 16.
    token = 2 * 4096 * 4 + 2 * (4 * 4096 + 3 * 14336 + 3 * 4096 + 14336 + 7 * 16)
    assert found.update["activations"] == stacked * token
    kept = plan(llama_8b, response_tokens=512, lora_dropout=0.0, gradient_checkpointing=False)
    assert kept.update["activations"] == 32 * stacked * token
    assert "inputs of checkpointed layers" not in kept.update
    # 64 MiB of fp32 logits are 130 tokens; five copies, of which one in bf16.
    assert found.update["logits"] == 130 * 128256 * 21 // 2  # bf16, twice fp32, and an eighth
    assert found.update["one weight unpacked"] == 4096 * 14336 * 2


def test_separate_models(llama_8b: Architecture) -> None:
    found = plan(llama_8b, separate=True, reward=llama_8b)
    policy, value = LINEAR + 2 * EMBEDDING + NORMS, LINEAR + EMBEDDING + NORMS + 4096
    assert found.static == {
        "reference: linear layers": 2 * LINEAR,
        "reference: embeddings, head, norms": DENSE,
        "trained models: weights": 4 * (policy + value),
        "trained models: gradients": 4 * (policy + value),
        "trained models: AdamW": 8 * (policy + value),
        "reward model": 2 * value,
    }
    assert found.static_bytes == pytest.approx(279.6e9, rel=1e-3)


def test_rewards(llama_8b: Architecture) -> None:
    assert plan(llama_8b, reward="adapter").static["reward adapter"] == 4 * (ADAPTER + 4096)
    in_4bit = plan(llama_8b, reward=llama_8b, reward_in_4bit=True, engine="fsdp2").static
    # No engine divides it; a score row in place of the LM head.
    assert in_4bit["reward model"] == PACKED + STATE + 2 * (EMBEDDING + NORMS + 4096)
    alone, with_adapter = plan(llama_8b).scoring, plan(llama_8b, reward="adapter").scoring
    # Of 64 rows, 21 sequences for each of three roles, or 16 for each of four.
    ratio = with_adapter["pass without gradients"] / alone["pass without gradients"]
    assert ratio == pytest.approx(64 / 63)


def test_a_gpu_must_hold_the_peak_and_the_reserve(llama_8b: Architecture) -> None:
    found = plan(llama_8b)
    peak = found.peak_bytes
    update = found.static_bytes + sum(found.update.values())
    rollout = found.static_bytes + max(sum(found.generation.values()), sum(found.scoring.values()))
    assert peak == max(update, rollout)
    assert found.fits(peak / 0.9 + 1)
    assert not found.fits(peak / 0.9 - 1)


def test_defaults_are_those_of_ppo_and_the_recipes() -> None:
    def defaults(kind: Any) -> dict[str, Any]:
        return {field.name: field.default for field in dataclasses.fields(kind)}

    planned, config, model = defaults(PlanOptions), defaults(PPOConfig), defaults(ModelConfig)
    assert planned["batch"] == config["per_device_train_batch_size"]
    assert planned["rollout_batch"] == config["local_rollout_forward_batch_size"]
    assert planned["response_tokens"] == config["response_length"]
    assert planned["gradient_checkpointing"] == config["gradient_checkpointing"]
    assert (model["lora_r"], model["lora_dropout"]) == (DEFAULT_RANK, DEFAULT_DROPOUT)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"engine": "fsdp"}, "--engine fsdp is not known; expected one of none, ddp, zero1"),
        ({"num_gpus": 2}, "--engine none runs on one GPU, not on 2"),
        ({"engine": "ddp", "num_gpus": 1}, "--engine ddp needs at least 2 GPUs"),
        ({"engine": "zero3", "num_shards": 4}, "--shards is for --engine hsdp"),
        ({"engine": "hsdp", "num_gpus": 8, "num_shards": 8}, "at least 2 copies"),
        ({"engine": "hsdp", "num_gpus": 6, "num_shards": 4}, "that the shards divide"),
        ({"engine": "fsdp2", "quantization": "8bit"}, "cannot divide an 8-bit base"),
        ({"engine": "fsdp2_qlora", "quantization": "none"}, "choose fsdp2"),
        ({"quantization": "int4"}, "expected one of nf4, 8bit, none"),
        ({"dtype": "fp16"}, "expected one of bf16, fp32"),
        ({"reward": "model"}, "--reward model is not known"),
        ({"batch": 0}, "batch=0: expected a positive number"),
        ({"lora_dropout": 1.0}, "expected 0, or a share below 1"),
        ({"separate": True, "quantization": "nf4"}, "--quantization does not go with --separate"),
        ({"separate": True, "lora_rank": 8}, "--lora-rank does not go with --separate"),
        ({"separate": True, "lora_dropout": 0.0}, "--lora-dropout does not go with"),
        ({"separate": True, "reward": "adapter"}, "--reward adapter does not go with"),
    ],
)
def test_what_does_not_go_together(
    llama_8b: Architecture, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan(llama_8b, **changes)


def test_configs_that_cannot_be_planned_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No config of a model can be read at"):
        read_architecture(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter: name the base model"):
        read_architecture(str(tmp_path))
    with pytest.raises(ConfigError, match="is an encoder-decoder model"):
        count_architecture(CONFIG_MAPPING["t5"]())
    with pytest.raises(ConfigError, match="is not a causal language model"):
        count_architecture(CONFIG_MAPPING["vit"]())
    (tmp_path / "adapter_config.json").unlink()
    for broken in ("{", '{"model_type": "none"}', '{"model_type": "llama", "vocab_size": "many"}'):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ConfigError, match="No config of a model can be read at"):
            read_architecture(str(tmp_path))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    unknown = count_architecture(
        CONFIG_MAPPING["starcoder2"](num_attention_heads=4, num_key_value_heads=2, **sizes)
    )
    with pytest.raises(ConfigError, match="its LM head is not known"):
        plan(unknown)
    assert plan(unknown, separate=True).peak_bytes > 0
