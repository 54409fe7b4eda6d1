"""A merged export is a plain model with the logits of the role, and the base is only read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ATTENTION, load, lora, peft_model, ragged_batch, randomise_adapters
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import tiny
from trl_sync import export_merged
from trl_sync.backbone.fingerprint import fingerprint
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError

# The weights of a pass: at most 5 in each of 2 layers (norm, value, output, up, down) and 3 around
# them (embedding, norm, head). bfloat16 changes each by up to 2^-8 of its size.
WEIGHTS_ON_THE_WAY = 13
ENDS = {"vocab_size": 64, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
SMALL = {
    **ENDS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True))


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=5.0, tie_word_embeddings=True)
    )


def gpt2() -> PreTrainedModel:
    size = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**ENDS, **size))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (
        lambda: tiny.llama(attention_bias=True),
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ),
    "llama, LoRA bias": (
        lambda: tiny.llama(attention_bias=True),
        {"target_modules": list(ATTENTION), "lora_bias": True},
    ),
    "llama, embeddings": (tiny.llama, {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "llama, tied embeddings": (
        lambda: tiny.llama(tie_word_embeddings=True),
        {"target_modules": ["lm_head", "o_proj"]},
    ),
    "qwen2": (qwen2, {"target_modules": "all-linear"}),
    "gpt2": (gpt2, {"target_modules": "all-linear"}),
    "gpt2, embeddings": (gpt2, {"target_modules": ["wte", "c_fc"]}),
    "gemma2": (gemma2, {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}),
}
TIED = {"qwen2", "gpt2"}


def backbone_of(folder: Path, precision: str = "fp32", **options: Any) -> SharedBackbone:
    """Random adapters on the base in `folder`."""
    backbone = SharedBackbone(load(folder, precision), lora(**options))
    randomise_adapters(backbone)
    return backbone


def llama_backbone(folder: Path, **options: Any) -> SharedBackbone:
    tiny.llama().save_pretrained(folder)
    return backbone_of(folder, **options)


def logits_of(backbone: SharedBackbone, role: str = "policy") -> Tensor:
    adapter = backbone.roles[role].adapter
    with torch.no_grad(), backbone.eval().router.routes(adapter):
        return backbone.causal_model(ragged_batch().input_ids).logits


def plain_logits(folder: Path) -> Tensor:
    """What plain transformers computes from the files, in fp32."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(ragged_batch().input_ids).logits


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but")  # PEFT corrects it
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_computes_the_logits_of_the_policy(
    tmp_path: Path, case: str, precision: str
) -> None:
    make, options = CASES[case]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    backbone = backbone_of(tmp_path / "base", precision, **options)
    before = fingerprint(backbone.causal_model)
    expected, of_base = logits_of(backbone), logits_of(backbone, "reference")
    scale = expected.abs().max().item()
    assert (expected - of_base).abs().max() > 0.1 * scale

    assert export_merged(backbone, tmp_path / "fp32", torch.float32) == tmp_path / "fp32"
    # fp32 logits of order 1; W x + s B (A x) against (W + s B A) x.
    torch.testing.assert_close(plain_logits(tmp_path / "fp32"), expected, rtol=0, atol=1e-5)

    export_merged(backbone, tmp_path / "bf16")
    moved = (plain_logits(tmp_path / "bf16") - expected).abs().max().item()
    # Measured: 0.002 to 0.009 of the largest logit, since roundings are of either sign.
    assert 1e-5 < moved < WEIGHTS_ON_THE_WAY * 2**-8 * scale

    exact = load_file(tmp_path / "fp32" / "model.safetensors")
    rounded = load_file(tmp_path / "bf16" / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert ("lm_head.weight" not in exact) == (case in TIED)
    config = json.loads((tmp_path / "fp32" / "config.json").read_text())
    assert config.get("tie_word_embeddings", False) == (case in TIED)
    assert fingerprint(backbone.causal_model) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "bf16", "fp32"]


def test_the_weights_are_those_that_peft_merges(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "lora_alpha": 12}
    backbone = llama_backbone(tmp_path / "base", **options)
    export_merged(backbone, tmp_path / "merged", torch.float32)
    merged = peft_model(load(tmp_path / "base", "fp32"), {"policy": lora(**options)})
    expected = merged.merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        # Weights of order 0.1; a sum of 4 products in fp32.
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)


def test_the_reference_is_the_base_in_numbers(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    backbone = backbone_of(tmp_path / "base", "nf4", target_modules="all-linear")
    export_merged(backbone, tmp_path / "merged", torch.float32, role="reference")
    found = plain_logits(tmp_path / "merged")
    torch.testing.assert_close(found, logits_of(backbone, "reference"), rtol=0, atol=1e-5)


def test_eight_bit_weights(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
        dtype=torch.float32,
    )
    backbone = SharedBackbone(base, lora(target_modules=["q_proj"]))
    export_merged(backbone, tmp_path / "merged", torch.float32)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in load_file(tmp_path / "base" / "model.safetensors").items():
        if "_proj" in name:
            # LLM.int8: 127 steps to the largest weight of each row, half a step off at most, and
            # up to 127 x 2^-11 more from rounding to float16 before. B is zero as made.
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((found[name] - weight).abs() <= 0.57 * step).all(), name
        else:
            assert torch.equal(found[name], weight), name


# --- What lies beside the weights


def test_config_generation_config_and_tokenizer(tmp_path: Path) -> None:
    model = tiny.llama()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.save_pretrained(tmp_path / "base")
    backbone = backbone_of(tmp_path / "base", "nf4")
    export_merged(backbone, tmp_path / "merged", tokenizer=tiny.tokenizer())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert hasattr(backbone.config, "quantization_config")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == 1
    assert loaded.generation_config.pad_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()


def test_all_end_tokens_of_the_base_are_kept(tmp_path: Path) -> None:
    model = tiny.llama()
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path / "base")
    export_merged(backbone_of(tmp_path / "base"), tmp_path / "merged", tokenizer=tiny.tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.generation_config.eos_token_id == [1, 7]


def test_an_export_replaces_an_earlier_one_and_leaves_other_files(tmp_path: Path) -> None:
    backbone = llama_backbone(tmp_path / "base")
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    (folder / "model.safetensors.index.json").write_text("{}")
    export_merged(backbone, folder, torch.float32)
    randomise_adapters(backbone, seed=1)
    export_merged(backbone, folder, torch.float32)
    torch.testing.assert_close(plain_logits(folder), logits_of(backbone), rtol=0, atol=1e-5)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    ]


def test_an_export_that_fails_changes_nothing(tmp_path: Path) -> None:
    backbone = llama_backbone(tmp_path / "base")
    export_merged(backbone, tmp_path / "merged")
    before = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    with torch.no_grad():
        backbone.causal_model.model.norm.weight[3] = 1e5
    with pytest.raises(ConfigError, match=r"model\.norm\.weight does not fit torch\.float16.*1000"):
        export_merged(backbone, tmp_path / "merged", torch.float16)
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "merged"]


# --- What is refused


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    backbone = llama_backbone(tmp_path / "base")
    new, adapter, file = tmp_path / "new", tmp_path / "adapter", tmp_path / "file"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    file.write_text("")
    with pytest.raises(ConfigError, match=r"role='value' cannot be exported.*in value/"):
        export_merged(backbone, new, role="value")
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8 is not a precision"):
        export_merged(backbone, new, torch.int8)
    with pytest.raises(ConfigError, match="holds an adapter, which transformers would load on top"):
        export_merged(backbone, adapter)
    with pytest.raises(ConfigError, match="is a file"):
        export_merged(backbone, file)
    with pytest.raises(ConfigError, match="is where the base was loaded from"):
        export_merged(backbone, tmp_path / "base")
    assert not new.exists()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning:peft")
def test_a_bias_without_one_to_add_it_to_is_refused(tmp_path: Path) -> None:
    backbone = llama_backbone(tmp_path / "base", lora_bias=True)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj has no bias"):
        export_merged(backbone, tmp_path / "merged")
