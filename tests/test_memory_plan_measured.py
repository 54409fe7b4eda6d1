"""The memory plan against real, tiny models: their parameters, bytes and measured peaks."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig

import ranks
import tiny
from trl_sync import SharedBackbone
from trl_sync.backbone.loading import load_base
from trl_sync.backbone.quantization import nf4_config
from trl_sync.planning import engines, formulas
from trl_sync.planning.architecture import count_architecture, read_architecture
from trl_sync.planning.options import PlanOptions
from trl_sync.planning.plan import make_plan
from trl_sync.quantization_state import quantization_tensors

KINDS = ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi3", "mistral"]


def num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tiny_config(kind: str) -> Any:
    sizes = {"vocab_size": 96, "num_attention_heads": 4, "pad_token_id": 0}
    if kind == "gpt2":
        return CONFIG_MAPPING[kind](n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=96)
    sizes |= {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 8}
    sizes |= {} if kind == "gpt_neox" else {"num_key_value_heads": 2}
    return CONFIG_MAPPING[kind](**sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_counted_as_it_is_built(kind: str) -> None:
    config = tiny_config(kind)
    model = AutoModelForCausalLM.from_config(config)
    counted = count_architecture(config)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.num_layers == 3
    assert counted.is_gated == (kind not in ("gpt2", "gpt_neox"))
    lora = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=kind == "gpt2")
    )
    adapter = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert formulas.lora_parameters(counted.linears, 4) == adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama(hidden_size=96, intermediate_size=200, vocab_size=300).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "quantization, config",
    [
        ("nf4", nf4_config()),
        ("8bit", BitsAndBytesConfig(load_in_8bit=True)),
        ("none", None),
    ],
)
@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_bytes_of_a_real_base(
    saved: Path, quantization: formulas.Quantization, config: Any, dtype: torch.dtype, size: int
) -> None:
    base = load_base(str(saved), quantization_config=config, dtype=dtype)
    expected = formulas.weight_bytes(read_architecture(str(saved)), quantization, size)
    assert num_bytes(base.parameters()) == expected.linear + expected.dense
    # Left out: tables that all layers share on a GPU (64 bytes, 1 KiB) and one number a layer.
    state = {name: t for name, t in quantization_tensors(base) if not name.endswith(("map", "set"))}
    assert num_bytes(state.values()) == expected.state


def test_the_bytes_of_real_adapters_and_their_optimizer(saved: Path) -> None:
    base = load_base(str(saved), dtype=torch.bfloat16)
    backbone = SharedBackbone(base, LoraConfig(r=8, target_modules="all-linear"))
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    options = PlanOptions(model=read_architecture(str(saved)), lora_rank=8)
    found = make_plan(options).static
    assert found["trained adapters, value head: weights"] == num_bytes(trained)
    assert found["trained adapters, value head: gradients"] == num_bytes(p.grad for p in trained)
    assert found["trained adapters, value head: AdamW"] == num_bytes(moments)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_the_bytes_of_a_real_cache(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    rows, prompt, response = 3, 7, 5
    output = model.generate(
        input_ids=torch.randint(3, 90, (rows, prompt)),
        attention_mask=torch.ones(rows, prompt, dtype=torch.long),
        max_new_tokens=response,
        min_new_tokens=response,
        do_sample=False,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    layers = output.past_key_values.layers
    found = num_bytes(tensor for layer in layers for tensor in (layer.keys, layer.values))
    cached = prompt + response - 1  # the last token is never an input
    assert found == formulas.kv_cache_bytes(count_architecture(model.config), rows * cached, 4)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that `run` has allocated at once, by torch's own record of allocations."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("size", [4, 2])
def test_the_measured_peaks_of_scoring_and_updates(size: int) -> None:
    dtype = {4: torch.float32, 2: torch.bfloat16}[size]
    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 3}
    model = tiny.llama(vocab_size=1024, num_attention_heads=8, **sizes).to(dtype)
    architecture = count_architecture(model.config)
    options = PlanOptions(
        model=architecture,
        batch=2,
        rollout_batch=6,  # three roles of two sequences each share a pass
        prompt_tokens=64,
        response_tokens=64,
        lora_rank=4,
        lora_dropout=0.0,
        quantization="none",
        dtype="fp32" if size == 4 else "bf16",
        logprob_chunk_bytes=64 * 1024,
    )
    lora = LoraConfig(r=4, target_modules="all-linear")
    backbone = SharedBackbone(model, lora, logprob_chunk_bytes=options.logprob_chunk_bytes)
    ids = torch.randint(3, 1000, (2, 129))  # the last of them predicts nothing
    mask = torch.ones_like(ids, dtype=torch.bool)

    def run(roles: tuple[str, ...]) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=size == 2):
            return backbone(ids, mask, mask[:, -64:], roles=roles)

    def update() -> None:
        output = run(("policy", "value"))
        (output["policy"]["logprobs"].sum() + output["value"]["values"].sum()).backward()

    def score() -> None:
        with torch.no_grad():
            run(("policy", "reference", "value"))

    backbone.train()
    kept = sum(
        make_plan(dataclasses.replace(options, gradient_checkpointing=False)).update.values()
    )
    # Counting operations leaves out small tensors (masks, rotations) and temporary copies.
    assert peak_bytes(update) == pytest.approx(kept, rel=0.1)
    backbone.activation_checkpointing_enable()
    backbone.train()
    assert peak_bytes(update) == pytest.approx(sum(make_plan(options).update.values()), rel=0.12)
    backbone.eval()
    assert peak_bytes(score) == pytest.approx(sum(make_plan(options).scoring.values()), rel=0.12)


# DeepSpeed on two ranks


def zero_bytes(folder: str) -> dict[str, dict[str, int]]:
    """What this rank holds under ZeRO-1, 2 and 3 after an update."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    torch.distributed.init_process_group("gloo")
    found = {f"zero{stage}": _zero_bytes(folder, stage, nf4_config()) for stage in (1, 2, 3)}
    eight_bit = BitsAndBytesConfig(load_in_8bit=True)
    return found | {"8bit": _zero_bytes(folder, 3, eight_bit)}


def _zero_bytes(folder: str, stage: int, quantization: BitsAndBytesConfig) -> dict[str, int]:
    import deepspeed

    base = load_base(folder, quantization_config=quantization, dtype=torch.float32)
    backbone = SharedBackbone(base, LoraConfig(r=8, target_modules="all-linear"))
    trained = [p for p in backbone.parameters() if p.requires_grad]
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    engine, optimizer, _, _ = deepspeed.initialize(
        model=backbone,
        optimizer=torch.optim.AdamW(trained),
        config={
            "train_micro_batch_size_per_gpu": 2,
            # torch would touch all of the bucket that DeepSpeed asks for by default.
            "zero_optimization": zero | {"reduce_bucket_size": 100_000},
            "zero_allow_untested_optimizer": True,
        },
    )
    ids = torch.randint(3, 200, (2, 12))
    mask = torch.ones_like(ids, dtype=torch.bool)
    output = engine(ids, mask, mask[:, 6:])
    engine.backward(output["policy"]["logprobs"].sum() + output["value"]["values"].sum())
    engine.step()
    states = [t for state in optimizer.optimizer.state.values() for t in state.values()]
    partitioned = "fp16_partitioned_groups_flat" if stage == 3 else "bit16_groups_flat"
    master = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    layers = [m.state.CB for m in backbone.modules() if getattr(m, "state", None) is not None]
    return {
        "weights": num_bytes(getattr(optimizer, partitioned)),
        "optimizer": num_bytes(t for t in states if torch.is_tensor(t) and t.numel() > 1)
        + num_bytes(getattr(optimizer, master)),
        "frozen": num_bytes(getattr(p, "ds_tensor", p) for p in frozen),
        "kept beside": num_bytes(t for t in layers if t is not None),
    }


@pytest.mark.ranks
@pytest.mark.deepspeed
@pytest.mark.slow
def test_what_zero_holds_on_each_of_two_ranks(saved: Path) -> None:
    answers = ranks.run_on_ranks(zero_bytes, str(saved), num_ranks=2, deadline_s=200)
    architecture = read_architecture(str(saved))
    num_trained = 2 * formulas.lora_parameters(architecture.linears, 8) + 97
    for answer in answers:
        for name in ("zero1", "zero2", "zero3"):
            engine = engines.ENGINES[name]
            expected = engines.trained_bytes(engine, num_trained, 2, 4)
            # DeepSpeed pads flat groups to a multiple of a few elements.
            assert answer[name]["weights"] == pytest.approx(expected.weights, abs=64)
            assert answer[name]["optimizer"] == pytest.approx(expected.optimizer, abs=128)
            base = formulas.weight_bytes(architecture, "nf4", 4)
            divided = 2 if engine.shards_parameters else 1
            # Packed bytes are divided like any others; each tensor is rounded up.
            assert answer[name]["frozen"] == pytest.approx(
                (base.linear + base.dense) / divided, abs=64
            )
        linear = architecture.linear_parameters
        assert answer["8bit"]["kept beside"] == linear
        dense = formulas.weight_bytes(architecture, "8bit", 4).dense
        assert answer["8bit"]["frozen"] == math.ceil((linear + dense) / 2)
