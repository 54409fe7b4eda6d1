"""Checkpoints -> models: SFT models and adapters, reward models and adapters, quantized or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import (
    bytes_of,
    gradients,
    largest_difference,
    load,
    lora,
    ragged_batch,
    randomise_adapters,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
)

import tiny
from trl_sync.backbone import adapter_patterns
from trl_sync.backbone.fingerprint import fingerprint
from trl_sync.backbone.loading import (
    load_base,
    load_reward_model,
    load_shared_backbone,
)
from trl_sync.backbone.quantization import nf4_config
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError

# fp32 logits of order 1; the same products in another grouping.
CLOSE = {"rtol": 0.0, "atol": 1e-5}
SFT_TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_sft_adapter(base: str, folder: Path, **options: Any) -> str:
    model = get_peft_model(load(base, "fp32"), lora(**{"target_modules": SFT_TARGETS} | options))
    randomise_adapters(model, seed=5)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


def reward_base(base: str, num_labels: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(6)
    return AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=num_labels, dtype=torch.float32
    )


def save_reward_adapter(base: str, folder: Path, num_labels: int = 1, **options: Any) -> str:
    options = {"r": 6, "target_modules": ["k_proj", "up_proj"], **options}
    config = LoraConfig(lora_alpha=12, task_type="SEQ_CLS", modules_to_save=["score"], **options)
    model = get_peft_model(reward_base(base, num_labels), config)
    randomise_adapters(model, seed=7)
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def sft_adapter(llama_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_sft_adapter(llama_folder, tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def reward_adapter(llama_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reward_adapter(llama_folder, tmp_path_factory.mktemp("reward adapter"))


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("reward"))
    tiny.reward_llama().save_pretrained(folder)
    return folder


def role_logits(backbone: SharedBackbone, role: str) -> Tensor:
    adapter = backbone.roles[role].adapter
    with torch.no_grad(), backbone.eval().router.routes(adapter):
        return backbone.causal_model(ragged_batch().input_ids).logits


def role_hidden(backbone: SharedBackbone, role: str) -> Tensor:
    adapter = backbone.roles[role].adapter
    with torch.no_grad(), backbone.eval().router.routes(adapter):
        return backbone.causal_model.model(ragged_batch().input_ids).last_hidden_state


def train_step(backbone: SharedBackbone) -> None:
    batch = ragged_batch()
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    found = backbone.train()(batch.input_ids, batch.attention_mask, batch.response_mask)
    (found["policy"]["logprobs"].sum() + (found["value"]["values"] - 1).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_an_sft_adapter_becomes_policy_reference_and_value(
    llama_folder: str, sft_adapter: str, precision: str
) -> None:
    batch = ragged_batch()
    peft = PeftModel.from_pretrained(load_base_of(llama_folder, precision), sft_adapter)
    with torch.no_grad():
        own_logits = peft(batch.input_ids).logits
        own_hidden = peft.base_model.model.model(batch.input_ids).last_hidden_state
    backbone = load_shared_backbone(
        sft_adapter, quantization_config=nf4_config() if precision == "nf4" else None
    )

    for role in ("policy", "reference"):
        torch.testing.assert_close(role_logits(backbone, role), own_logits, **CLOSE)
    torch.testing.assert_close(role_hidden(backbone, "value"), own_hidden, **CLOSE)
    backbone.check_roles()
    assert not backbone.roles["reference"].trainable

    reference = role_logits(backbone, "reference")
    for _ in range(2):  # the value head starts at zero, so its adapter gets gradients from step 2
        train_step(backbone)
    assert torch.equal(role_logits(backbone, "reference"), reference)
    assert not torch.allclose(role_logits(backbone, "policy"), own_logits, atol=1e-3)
    assert not torch.allclose(role_hidden(backbone, "value"), own_hidden, atol=1e-3)


def load_base_of(folder: str, precision: str) -> Any:
    quantization = nf4_config() if precision == "nf4" else None
    return load_base(folder, quantization_config=quantization, dtype=torch.float32)


@pytest.mark.parametrize("saved", [True, False])
def test_an_sft_adapter_on_embeddings_and_lm_head(
    llama_folder: str, tmp_path: Path, saved: bool
) -> None:
    """The value role has no LM head; the base's own embeddings may lie in the adapter file."""
    model = get_peft_model(
        load(llama_folder, "fp32"), lora(target_modules=["embed_tokens", "lm_head", "q_proj"])
    )
    randomise_adapters(model, seed=5)
    model.save_pretrained(str(tmp_path), save_embedding_layers=saved)
    with torch.no_grad():
        own = model(ragged_batch().input_ids).logits
        own_hidden = model.base_model.model.model(ragged_batch().input_ids).last_hidden_state
    backbone = load_shared_backbone(str(tmp_path))
    for role in ("policy", "reference"):
        torch.testing.assert_close(role_logits(backbone, role), own, **CLOSE)
    torch.testing.assert_close(role_hidden(backbone, "value"), own_hidden, **CLOSE)
    assert fingerprint(backbone.causal_model) == fingerprint(load(llama_folder, "fp32"))


def test_a_whole_model_gives_three_equal_roles(llama_folder: str) -> None:
    backbone = load_shared_backbone(llama_folder, lora(), dtype=torch.float32)
    with torch.no_grad():
        own = load(llama_folder, "fp32")(ragged_batch().input_ids).logits
    for role in ("policy", "reference"):
        torch.testing.assert_close(role_logits(backbone, role), own, **CLOSE)
    assert backbone.roles["reference"].adapter is None
    assert not backbone.value_head.weight.any()
    backbone.check_roles()


def test_lora_options_beside_an_sft_adapter_are_refused(sft_adapter: str) -> None:
    with pytest.raises(ConfigError, match="is an adapter already, so its own LoRA options hold"):
        load_shared_backbone(sft_adapter, lora())


def test_an_sft_adapter_with_an_unsupported_option_is_refused(
    llama_folder: str, tmp_path: Path
) -> None:
    folder = save_sft_adapter(llama_folder, tmp_path, use_dora=True)
    with pytest.raises(ConfigError, match="use_dora=True"):
        load_shared_backbone(folder)


ADAPTER_LOADERS: dict[str, Callable[[str, str], Any]] = {
    "sft": lambda base, adapter: load_shared_backbone(adapter),
    "value": lambda base, adapter: load_shared_backbone(base, value_init_path=adapter),
    "shared reward": lambda base, adapter: load_shared_backbone(base, reward_adapter=adapter),
    "reward": lambda base, adapter: load_reward_model(adapter),
}


@pytest.mark.parametrize("role", ADAPTER_LOADERS)
@pytest.mark.parametrize("option", ["target_modules", "rank_pattern"])
def test_a_pattern_that_never_ends_is_refused(
    llama_folder: str,
    sft_adapter: str,
    reward_adapter: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    option: str,
) -> None:
    monkeypatch.setattr(adapter_patterns, "MATCH_TIMEOUT_S", 0.5)
    folder = tmp_path / "copy"
    shutil.copytree(sft_adapter if role == "sft" else reward_adapter, folder)
    file = folder / "adapter_config.json"
    pattern = "(([a-z0-9_.]+)*)*="
    options = json.loads(file.read_text())
    file.write_text(json.dumps(options | {option: {pattern: 2} if "rank" in option else pattern}))
    with pytest.raises(ConfigError, match=r"adapter_config.json names modules by .*after 0.5 s"):
        ADAPTER_LOADERS[role](llama_folder, str(folder))


def test_a_pattern_with_repetitions_is_used(llama_folder: str, tmp_path: Path) -> None:
    every = r".*\.layers\.\d+\..*(q|v)_proj"
    backbone = load_shared_backbone(save_sft_adapter(llama_folder, tmp_path, target_modules=every))
    adapted = {
        n.split(".lora_A")[0].split(".")[-1]
        for n, _ in backbone.named_parameters()
        if "lora_A" in n
    }
    assert adapted == {"q_proj", "v_proj"}


def rename_one(tensors: dict[str, Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)


def drop_one(tensors: dict[str, Tensor]) -> None:
    tensors.pop(sorted(tensors)[0])


def add_one(tensors: dict[str, Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()


def reshape_one(tensors: dict[str, Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(9, 5)


@pytest.mark.parametrize("change", [rename_one, drop_one, add_one, reshape_one])
@pytest.mark.parametrize("role", ["sft", "reward"])
def test_an_adapter_of_another_base_is_refused(
    llama_folder: str,
    sft_adapter: str,
    reward_adapter: str,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    role: str,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sft_adapter if role == "sft" else reward_adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    path, value_init_path = (str(folder), None) if role == "sft" else (llama_folder, str(folder))
    with pytest.raises(ConfigError, match="another base"):
        load_shared_backbone(path, value_init_path=value_init_path)


@pytest.mark.parametrize("start", ["model", "sft adapter"])
def test_the_value_role_starts_as_a_reward_adapter(
    llama_folder: str, sft_adapter: str, reward_adapter: str, start: str
) -> None:
    reward = PeftModel.from_pretrained(reward_base(llama_folder), reward_adapter).eval()
    batch = ragged_batch()
    with torch.no_grad():
        hidden = reward.base_model.model.model(batch.input_ids).last_hidden_state
        own = reward.base_model.model.score(hidden).squeeze(-1)
    path, config = (llama_folder, lora()) if start == "model" else (sft_adapter, None)
    backbone = load_shared_backbone(path, config, value_init_path=reward_adapter)

    found = role_hidden(backbone, "value")
    torch.testing.assert_close(found, hidden, **CLOSE)
    # Scores of order 10 from a product over 64 features in fp32.
    torch.testing.assert_close(backbone.value_head(found).squeeze(-1), own, rtol=1e-4, atol=1e-4)
    assert backbone.peft_model.peft_config["value"].r == 6
    backbone.check_roles()
    if start == "sft adapter":
        peft = PeftModel.from_pretrained(load(llama_folder, "fp32"), sft_adapter)
        with torch.no_grad():
            sft_logits = peft(batch.input_ids).logits
        for role in ("policy", "reference"):
            torch.testing.assert_close(role_logits(backbone, role), sft_logits, **CLOSE)


@pytest.mark.parametrize("start", ["model", "sft adapter"])
def test_the_value_head_starts_as_the_score_of_a_whole_reward_model(
    llama_folder: str, sft_adapter: str, reward_folder: str, start: str
) -> None:
    path, config = (llama_folder, lora()) if start == "model" else (sft_adapter, None)
    backbone = load_shared_backbone(path, config, value_init_path=reward_folder)
    expected = load_file(Path(reward_folder) / "model.safetensors")["score.weight"]
    assert expected.any()
    assert torch.equal(backbone.value_head.weight, expected)
    assert not backbone.value_head.bias.any()
    # The trunk of a whole model cannot move into an adapter: value starts where the policy does.
    assert torch.equal(role_hidden(backbone, "value"), role_hidden(backbone, "policy"))
    backbone.check_roles()


@pytest.mark.parametrize(
    "changes, found", [({"hidden_size": 32}, r"\(1, 32\)"), ({"num_labels": 3}, r"\(3, 64\)")]
)
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_a_score_head_that_does_not_fit_is_refused(
    llama_folder: str, tmp_path: Path, changes: dict[str, int], found: str, adapter: bool
) -> None:
    torch.manual_seed(0)
    config = tiny.llama_config(**{"num_labels": 1} | changes)
    folder = str(tmp_path / "whole")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    if adapter:
        labels = changes.get("num_labels", 1)
        folder = save_reward_adapter(folder, tmp_path / "adapter", labels)
    with pytest.raises(ConfigError, match=rf"has shape {found}, but this base needs \(1, 64\)"):
        load_shared_backbone(llama_folder, lora(), value_init_path=folder)


def test_a_model_without_score_head_is_no_initial_value(llama_folder: str) -> None:
    with pytest.raises(ConfigError, match="has shape None, but this base needs"):
        load_shared_backbone(llama_folder, lora(), value_init_path=llama_folder)


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_whole_reward_model_is_frozen_and_says_what_it_said(
    reward_folder: str, precision: str
) -> None:
    batch = ragged_batch()
    own = tiny.reward_llama().eval()
    quantization = nf4_config() if precision == "nf4" else None
    model = load_reward_model(reward_folder, quantization_config=quantization)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        difference = (model(batch.input_ids).logits - own(batch.input_ids).logits).abs().max()
    # NF4 keeps about 4 bits of each weight; scores are of order 0.1.
    assert difference < (1e-6 if precision == "fp32" else 0.1)
    # The score head is read from the file, not drawn anew, and not quantized.
    assert torch.equal(model.score.weight, own.score.weight)


def test_a_4bit_reward_model_is_not_repacked(reward_folder: str) -> None:
    model = load_reward_model(reward_folder, quantization_config=nf4_config())
    before = bytes_of(iter(model.named_parameters()))
    with torch.no_grad():
        model(ragged_batch().input_ids)
    assert bytes_of(iter(model.named_parameters())) == before


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_reward_adapter_is_frozen_and_says_what_peft_says(
    llama_folder: str, reward_adapter: str, precision: str
) -> None:
    batch = ragged_batch()
    own = PeftModel.from_pretrained(reward_base(llama_folder), reward_adapter).eval()
    quantization = nf4_config() if precision == "nf4" else None
    model = load_reward_model(reward_adapter, quantization_config=quantization)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        found, expected = (m(input_ids=batch.input_ids).logits for m in (model, own))
    # NF4 keeps about 4 bits of each weight; scores are of order 10.
    assert (found - expected).abs().max() < (1e-5 if precision == "fp32" else 3.0)
    assert expected.abs().max() > 3.0


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_a_reward_model_with_several_labels_is_refused(
    llama_folder: str, tmp_path: Path, num_labels: int, adapter: bool
) -> None:
    torch.manual_seed(0)
    if adapter:
        folder = save_reward_adapter(llama_folder, tmp_path, num_labels)
    else:
        folder = str(tmp_path)
        LlamaForSequenceClassification(tiny.llama_config(num_labels=num_labels)).save_pretrained(
            folder
        )
    with pytest.raises(ConfigError, match=f"has {num_labels} labels. PPO needs one number"):
        load_reward_model(folder)


def test_a_reward_model_without_score_head_is_refused(llama_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"no score head: its architectures are \['LlamaForCau"):
        load_reward_model(llama_folder)


def test_an_adapter_without_a_score_head_is_no_reward_model(sft_adapter: str) -> None:
    with pytest.raises(ConfigError, match="a new head would give random rewards"):
        load_reward_model(sft_adapter)


def test_nf4_loading_is_that_of_transformers(llama_folder: str) -> None:
    model = load_base(llama_folder, quantization_config=nf4_config(), dtype=torch.float32)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.uint8
    assert weight.shape == (64 * 64 // 2, 1)
    assert weight.quant_state.nested
    assert fingerprint(model) == fingerprint(load(llama_folder, "nf4"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_8bit_loading_trains_and_keeps_the_base(llama_folder: str, checkpointing: bool) -> None:
    backbone = load_shared_backbone(
        llama_folder,
        lora(target_modules="all-linear"),
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float32,
    )
    randomise_adapters(backbone)
    assert backbone.causal_model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    before, batch = fingerprint(backbone.causal_model), ragged_batch()
    if checkpointing:
        backbone.activation_checkpointing_enable()
    inputs = batch.input_ids, batch.attention_mask, batch.response_mask
    together, stacked_gradients, apart = backbone.train()(*inputs), {}, {}
    together["policy"]["logprobs"].sum().backward()
    stacked_gradients = gradients(backbone)
    backbone.zero_grad()
    apart = backbone(*inputs, roles=("policy",))
    apart["policy"]["logprobs"].sum().backward()

    # 8-bit layers round activations to 8 bits row by row, each row by itself, in fp16.
    close = {"rtol": 0.0, "atol": 5e-3}
    for name, tensor in apart["policy"].items():
        torch.testing.assert_close(together["policy"][name], tensor, **close)
    policy = {n: g for n, g in stacked_gradients.items() if ".policy." in n}
    assert largest_difference(policy, gradients(backbone)) < 0.02
    train_step(backbone)
    assert fingerprint(backbone.causal_model) == before


def test_a_quantization_that_does_not_work_here_is_a_config_error(
    llama_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a device without a kernel, raised by the loader of transformers itself."""

    class Broken:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("no kernel for this device")

    with pytest.raises(ConfigError, match=r"cannot be loaded with nf4 on cpu: no kernel"):
        load_base(llama_folder, quantization_config=nf4_config(), auto_class=Broken)
