"""What PPO trains is saved in PEFT's layout and comes back whole, or nothing changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import load, lora, ragged_batch, randomise_adapters
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from trl_sync.backbone.export import load_adapters, save_adapters, save_policy
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import CheckpointError, ConfigError

FILES = ("adapter_model.safetensors", "value/adapter_model.safetensors")
ALL_FILES = (*FILES, "value/value_head.safetensors")
# fp32 logits of order 1: the same products, added up in the same order but for the batch size.
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def backbone_of(folder: str, precision: str = "fp32", seed: int = 0, **options: Any) -> Any:
    options = {"target_modules": "all-linear", "lora_dropout": 0.1, **options}
    backbone = SharedBackbone(load(folder, precision), lora(**options))
    randomise_adapters(backbone, seed)
    with torch.no_grad():
        for parameter in backbone.value_head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return backbone


def state(backbone: SharedBackbone) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in backbone.named_parameters()}


def logits_of_policy(backbone: SharedBackbone) -> Tensor:
    batch = ragged_batch()
    with torch.no_grad(), backbone.eval().router.routes("policy"):
        return backbone.causal_model(batch.input_ids).logits


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["lm_head", "embed_tokens", "o_proj"]},
        # PEFT takes the one axis of a LoRA bias for an unfinished shard.
        pytest.param(
            {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
            marks=pytest.mark.filterwarnings("ignore:Adapter '.*LoRA tensor.*have invalid shape"),
        ),
    ],
    ids=["all-linear", "patterns", "embeddings", "lora bias"],
)
def test_plain_peft_loads_the_policy(
    llama_folder: str, tmp_path: Path, precision: str, options: dict[str, Any]
) -> None:
    backbone = backbone_of(llama_folder, precision, **options)
    save_adapters(backbone, tmp_path / "new" / "folder")

    base = load(llama_folder, precision)
    for module in base.modules():
        # Both sides compute in fp32 on every CPU (test_shared.py).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    peft = PeftModel.from_pretrained(base, str(tmp_path / "new" / "folder"))
    assert not any(p.requires_grad for n, p in peft.named_parameters() if "lora_" in n)
    batch = ragged_batch()
    with torch.no_grad():
        plain = base(batch.input_ids).logits
        with peft.disable_adapter():
            without = peft(batch.input_ids).logits
    found = logits_of_policy(backbone)
    torch.testing.assert_close(plain, found, **CLOSE)
    assert not torch.allclose(without, found, atol=0.01)


def test_the_saved_config_names_the_base_and_is_for_inference(
    llama_folder: str, tmp_path: Path
) -> None:
    backbone = backbone_of(llama_folder)
    save_policy(backbone, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == llama_folder
    assert saved["inference_mode"] is True
    assert saved["r"] == 4
    assert saved["lora_alpha"] == 8
    # The backbone itself still trains.
    assert backbone.peft_model.peft_config["policy"].inference_mode is False
    backbone.check_roles()


def test_the_base_is_not_in_the_files(llama_folder: str, tmp_path: Path) -> None:
    save_adapters(backbone_of(llama_folder), tmp_path)
    found = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    assert found == {*ALL_FILES, "adapter_config.json", "value/adapter_config.json"}
    for file in FILES:
        names = load_file(tmp_path / file)
        assert len(names) == 28  # A and B of 7 layers in 2 blocks
        assert all("lora_" in name for name in names)
        assert not any("policy" in name or "value." in name for name in names)
    head = load_file(tmp_path / ALL_FILES[2])
    assert {name: tuple(t.shape) for name, t in head.items()} == {"weight": (1, 64), "bias": (1,)}


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize(
    "targets", ["all-linear", ["lm_head", "embed_tokens", "o_proj"]], ids=["linear", "embeddings"]
)
def test_a_round_trip_restores_every_trained_byte(
    llama_folder: str, tmp_path: Path, precision: str, targets: Any
) -> None:
    saved = backbone_of(llama_folder, precision, seed=1, target_modules=targets)
    save_adapters(saved, tmp_path)
    loaded = backbone_of(llama_folder, precision, seed=2, target_modules=targets)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    before = state(loaded)
    assert not any(torch.equal(before[n], p) for n, p in saved.named_parameters() if n in trained)
    identities = {name: id(p) for name, p in loaded.named_parameters()}

    load_adapters(loaded, tmp_path)

    after = state(loaded)
    for name, parameter in saved.named_parameters():
        assert torch.equal(after[name], parameter), name
    # In place: an optimizer that was made before still holds the parameters.
    assert {name: id(p) for name, p in loaded.named_parameters()} == identities
    loaded.check_roles()
    assert torch.equal(logits_of_policy(loaded), logits_of_policy(saved))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def drop_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


def add_tensor(file: Path) -> None:
    save_file(load_file(file) | {"surplus": torch.zeros(2)}, file)


def change_shape(file: Path) -> None:
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name] = torch.zeros(3, 5)
    save_file(tensors, file)


@pytest.mark.parametrize("file", ALL_FILES)
@pytest.mark.parametrize(
    "damage, named",
    [
        (Path.unlink, "is missing"),
        (truncate, "cannot be read"),
        (empty, "cannot be read"),
        (drop_tensor, "1 tensors differ"),
        (add_tensor, "1 tensors differ, for example surplus"),
        (change_shape, "tensors differ"),
    ],
)
def test_a_damaged_checkpoint_changes_nothing(
    llama_folder: str, tmp_path: Path, file: str, damage: Callable[[Path], None], named: str
) -> None:
    save_adapters(backbone_of(llama_folder, seed=1), tmp_path)
    damage(tmp_path / file)
    loaded = backbone_of(llama_folder, seed=2)
    before = state(loaded)
    with pytest.raises(CheckpointError, match=named) as raised:
        load_adapters(loaded, tmp_path)
    assert str(tmp_path / file) in str(raised.value)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    "options",
    [{"r": 8}, {"target_modules": ["q_proj"]}, {"rank_pattern": {"up_proj": 2}}],
    ids=str,
)
def test_other_lora_options_are_refused_and_change_nothing(
    llama_folder: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    save_adapters(backbone_of(llama_folder, seed=1), tmp_path)
    loaded = backbone_of(llama_folder, seed=2, **options)
    before = state(loaded)
    with pytest.raises(CheckpointError, match=r"Were the LoRA options \(r, target_modules\)"):
        load_adapters(loaded, tmp_path)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_checkpoint_error_is_a_config_error() -> None:
    assert issubclass(CheckpointError, ConfigError)
