"""A reward adapter on the shared base says what PEFT says of it on a base of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import (
    Batch,
    bytes_of,
    gradients,
    load,
    lora,
    ragged_batch,
    randomise_adapters,
)
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, GPT2ForSequenceClassification
from trl import RewardConfig, RewardTrainer

import tiny
from trl_sync.backbone.export import load_adapters, save_adapters
from trl_sync.backbone.fingerprint import fingerprint
from trl_sync.backbone.loading import load_base, load_shared_backbone
from trl_sync.backbone.quantization import nf4_config
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError

# fp32, two layers over sums of 64 terms; scores of order 10.
CLOSE = {"rtol": 0.0, "atol": 1e-5}
# Not those of the policy: gate_proj carries the reward adapter alone.
TARGETS = ["q_proj", "gate_proj"]


def save_reward_adapter(base: str, folder: Path, num_labels: int = 1, **options: Any) -> str:
    """As TRL's RewardTrainer saves it: LoRA and the score head that was trained with it."""
    torch.manual_seed(6)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=num_labels, dtype=torch.float32
    )
    options = {"r": 6, "target_modules": TARGETS} | options
    adapted = get_peft_model(model, LoraConfig(lora_alpha=12, task_type="SEQ_CLS", **options))
    randomise_adapters(adapted, seed=7)
    with torch.no_grad():
        adapted.base_model.model.score.modules_to_save["default"].weight.normal_()
    adapted.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def reward_adapter(llama_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reward_adapter(llama_folder, tmp_path_factory.mktemp("reward adapter"))


def quantization(precision: str) -> Any:
    return nf4_config() if precision == "nf4" else None


def shared(folder: str, precision: str, adapter: str | None) -> SharedBackbone:
    """A backbone whose other adapters and value head are random, the same in every call."""
    torch.manual_seed(0)
    backbone = load_shared_backbone(
        folder,
        lora(),
        quantization_config=quantization(precision),
        reward_adapter=adapter,
        dtype=torch.float32,
    )
    kept = dict(backbone.role_parameters("reward")) if adapter else {}
    saved = {name: parameter.detach().clone() for name, parameter in kept.items()}
    randomise_adapters(backbone)
    with torch.no_grad():
        for name, parameter in kept.items():
            parameter.copy_(saved[name])
        backbone.value_head.weight.fill_(0.01)
    return backbone


def said(backbone: SharedBackbone, roles: tuple[str, ...], batch: Batch) -> dict[str, Any]:
    with torch.no_grad():
        return backbone.eval()(
            batch.input_ids, batch.attention_mask, batch.response_mask, roles=roles
        )


def by_peft(model: Any, batch: Batch) -> Tensor:
    """The classifier's own scores of each row alone, without padding."""
    model.config.pad_token_id = None
    with torch.no_grad():
        rows = zip(batch.input_ids, batch.attention_mask, strict=True)
        return torch.stack([model(input_ids=ids[mask][None]).logits[0, 0] for ids, mask in rows])


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_the_scores_are_those_of_the_adapter_on_its_own_base(
    llama_folder: str, reward_adapter: str, precision: str
) -> None:
    batch = ragged_batch()
    own = load_base(
        llama_folder,
        quantization_config=quantization(precision),
        auto_class=AutoModelForSequenceClassification,
        num_labels=1,
        dtype=torch.float32,
    )
    expected = by_peft(PeftModel.from_pretrained(own, reward_adapter).eval(), batch)
    backbone = shared(llama_folder, precision, reward_adapter)
    stacked = said(backbone, ("policy", "reference", "value", "reward"), batch)["reward"]["scores"]
    alone = said(backbone, ("reward",), batch)["reward"]["scores"]
    assert stacked.dtype == torch.float32
    assert float(expected.std()) > 1.0  # or equality would say little
    torch.testing.assert_close(stacked, expected, **CLOSE)
    torch.testing.assert_close(alone, expected, **CLOSE)


def test_what_trls_reward_trainer_saves_works(llama_folder: str, tmp_path: Path) -> None:
    torch.manual_seed(6)
    model = AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=1)
    pairs = {"chosen": ["ab", "cd e", "f"] * 4, "rejected": ["b", "g", "hi j"] * 4}
    # transformers 5.23 renamed it
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = next(name for name in names if name in RewardConfig.__dataclass_fields__)
    config = RewardConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=0.05,
        use_cpu=True,
        bf16=False,  # its model would compare in that precision
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{checkpointing: False},
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    batch = ragged_batch()
    expected = by_peft(trainer.model.eval(), batch)
    backbone = shared(llama_folder, "fp32", str(tmp_path / "adapter"))
    found = said(backbone, ("policy", "reward"), batch)["reward"]["scores"]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert float(expected.std()) > 0.1


def test_the_adapter_counts_and_not_only_its_head(llama_folder: str, reward_adapter: str) -> None:
    batch = ragged_batch()
    backbone = shared(llama_folder, "fp32", reward_adapter)
    with_lora = said(backbone, ("reward",), batch)["reward"]["scores"]
    with torch.no_grad():
        for name, parameter in backbone.role_parameters("reward"):
            if "lora_B" in name:
                parameter.zero_()
    without = said(backbone, ("reward",), batch)["reward"]["scores"]
    assert float((with_lora - without).abs().min()) > 0.01


def test_the_other_roles_say_what_they_said_without_it(
    llama_folder: str, reward_adapter: str
) -> None:
    batch, roles = ragged_batch(), ("policy", "reference", "value")
    expected = said(shared(llama_folder, "fp32", None), roles, batch)
    backbone = shared(llama_folder, "fp32", reward_adapter)
    # Without the reward role the pass is the same, to the last bit.
    for role, tensors in said(backbone, roles, batch).items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[role][name])
    together = said(backbone, (*roles, "reward"), batch)
    for role in roles:
        for name, tensor in together[role].items():
            torch.testing.assert_close(tensor, expected[role][name], **CLOSE)


def test_gpt2_adapters_work_too(gpt2_folder: str, tmp_path: Path) -> None:
    adapter = save_reward_adapter(
        gpt2_folder, tmp_path, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    batch = ragged_batch()
    own = GPT2ForSequenceClassification.from_pretrained(gpt2_folder, num_labels=1)
    expected = by_peft(PeftModel.from_pretrained(own, adapter).eval(), batch)
    backbone = load_shared_backbone(
        gpt2_folder,
        lora(target_modules=["c_attn"], fan_in_fan_out=True),
        reward_adapter=adapter,
    )
    found = said(backbone, ("policy", "reward"), batch)["reward"]["scores"]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_it_never_trains(llama_folder: str, reward_adapter: str, precision: str) -> None:
    backbone = shared(llama_folder, precision, reward_adapter)
    backbone.check_roles()
    assert not backbone.roles["reward"].trainable
    own = dict(backbone.role_parameters("reward"))
    # Two layers with two targets, A and B each, and the head.
    assert len(own) == 2 * 2 * 2 + 1
    assert not any(parameter.requires_grad for parameter in own.values())
    before = bytes_of(iter(own.items()))
    checksum = fingerprint(backbone.causal_model)
    batch = ragged_batch()
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    found = backbone.train()(
        batch.input_ids,
        batch.attention_mask,
        batch.response_mask,
        roles=("policy", "value", "reward"),
    )
    loss = found["policy"]["logprobs"].sum() + found["value"]["values"].sum()
    (loss + found["reward"]["scores"].sum()).backward()
    assert not any("reward" in name or "score_head" in name for name in gradients(backbone))
    optimizer.step()
    assert bytes_of(iter(dict(backbone.role_parameters("reward")).items())) == before
    assert fingerprint(backbone.causal_model) == checksum


def test_every_parameter_has_at_most_one_role(llama_folder: str, reward_adapter: str) -> None:
    backbone = shared(llama_folder, "fp32", reward_adapter)
    owned = [id(p) for role in backbone.roles for _, p in backbone.role_parameters(role)]
    assert len(owned) == len(set(owned))
    states = backbone.sync_roles()
    assert set(states) == {"policy", "value", "reference", "reward"}
    listed = [id(p) for state in states.values() for p in state.parameters]
    assert len(listed) == len(set(listed)) == sum(1 for _ in backbone.parameters())
    assert states["reward"].modules == (backbone.score_head,)


def test_checkpoints_are_those_without_it(
    llama_folder: str, reward_adapter: str, tmp_path: Path
) -> None:
    plain, carrying = (
        shared(llama_folder, "fp32", None),
        shared(llama_folder, "fp32", reward_adapter),
    )
    for name, backbone in {"plain": plain, "carrying": carrying}.items():
        save_adapters(backbone, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*.*"))
    others = sorted(
        p.relative_to(tmp_path / "carrying") for p in (tmp_path / "carrying").rglob("*.*")
    )
    assert files == others
    for file in files:
        if file.suffix == ".safetensors":
            assert (tmp_path / "plain" / file).read_bytes() == (
                tmp_path / "carrying" / file
            ).read_bytes()
    load_adapters(carrying, tmp_path / "plain")
    assert fingerprint(plain.causal_model) == fingerprint(carrying.causal_model)


def test_the_checksum_tells_reward_adapters_apart(
    llama_folder: str, reward_adapter: str, tmp_path: Path
) -> None:
    backbone = shared(llama_folder, "fp32", reward_adapter)
    first = backbone.reward_fingerprint()
    assert first == shared(llama_folder, "fp32", reward_adapter).reward_fingerprint()
    assert shared(llama_folder, "fp32", None).reward_fingerprint() is None
    with torch.no_grad():
        head = dict(backbone.role_parameters("reward"))["score_head.weight"]
        head[0, 0] += 1e-6
    assert backbone.reward_fingerprint() != first


def no_adapter(base: str, folder: Path) -> str:
    return base


def two_labels(base: str, folder: Path) -> str:
    return save_reward_adapter(base, folder, num_labels=2)


def without_head(base: str, folder: Path) -> str:
    model = get_peft_model(load(base, "fp32"), lora())
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


def with_dora(base: str, folder: Path) -> str:
    return save_reward_adapter(base, folder, use_dora=True)


def of_fewer_layers(base: str, folder: Path) -> str:
    """Its options say more layers than its file has."""
    path = save_reward_adapter(base, folder, layers_to_transform=[0])
    config = Path(path) / "adapter_config.json"
    options = json.loads(config.read_text())
    assert options["layers_to_transform"] == [0]
    config.write_text(json.dumps(options | {"layers_to_transform": None}))
    return path


@pytest.mark.parametrize(
    ("build", "said_of_it"),
    [
        (no_adapter, "is no adapter: it has no adapter_config.json"),
        (two_labels, r"score head of shape \(1, 64\), but has one of shape \(2, 64\)"),
        (without_head, r"score head of shape \(1, 64\), but has none"),
        (with_dora, "use_dora=True is not supported"),
        (of_fewer_layers, "does not fit this base: 4 tensors differ"),
    ],
)
def test_what_is_no_reward_adapter_of_this_base_is_refused(
    llama_folder: str,
    reward_adapter: str,
    tmp_path: Path,
    build: Callable[[str, Path], str],
    said_of_it: str,
) -> None:
    path = build(llama_folder, tmp_path / "adapter")
    backbone = shared(llama_folder, "fp32", None)
    batch, roles = ragged_batch(), ("policy", "reference", "value")
    before = said(backbone, roles, batch)
    with pytest.raises(ConfigError, match=said_of_it):
        backbone.add_reward_adapter(path)
    # The backbone is as it was, and takes one that fits.
    backbone.check_roles()
    after = said(backbone, roles, batch)
    assert all(torch.equal(t, after[r][n]) for r in roles for n, t in before[r].items())
    backbone.add_reward_adapter(reward_adapter)
    assert backbone.has_reward


def test_a_second_reward_adapter_is_refused(
    llama_folder: str, reward_adapter: str, tmp_path: Path
) -> None:
    backbone = shared(llama_folder, "fp32", reward_adapter)
    other = shutil.copytree(reward_adapter, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"carries the reward adapter .* already"):
        backbone.add_reward_adapter(str(other))


def test_it_can_be_added_in_training_mode_with_checkpointing(
    llama_folder: str, reward_adapter: str
) -> None:
    backbone = shared(llama_folder, "fp32", None)
    backbone.activation_checkpointing_enable()
    backbone.train()
    backbone.add_reward_adapter(reward_adapter)
    assert backbone.training
    backbone.check_roles()
    batch = ragged_batch()
    found = backbone(batch.input_ids, batch.attention_mask, batch.response_mask)
    found["policy"]["logprobs"].sum().backward()
    # Of the value adapter they are zeros: its slice went through the same base.
    found_for = {name.split(".")[-2] for name in gradients(backbone) if "lora_" in name}
    assert found_for == {"policy", "value"}
