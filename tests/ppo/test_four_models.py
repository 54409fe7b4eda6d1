"""The trainer with TRL's four models: they train, stay, save, resume, and agree over ranks."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import runs
import tiny
from ranks import run_on_ranks
from trl_sync import CheckpointError, ConfigError, PPOTrainer, SyncAuditCallback
from trl_sync.backbone.model_files import ADAPTER_WEIGHTS
from trl_sync.backbone.separate import SeparateModels
from trl_sync.backbone.shared import SharedBackbone

TRL_FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "training_args.bin"),
}


def make(folder: Path, **options: Any) -> PPOTrainer:
    """A trainer of four models, full unless told otherwise."""
    arguments = {
        "model": tiny.llama(),
        "ref_model": None,
        "reward_model": tiny.reward_llama(seed=5),
        "train_dataset": tiny.prompts(),
        "value_model": tiny.reward_llama(seed=3),
    }
    known = (*arguments, "peft_config", "callbacks", "eval_dataset", "optimizers")
    arguments |= {name: options.pop(name) for name in known if name in options}
    return PPOTrainer(tiny.config(folder / "out", **options), tiny.tokenizer(), **arguments)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.equal(before[name])}


def test_policy_and_value_model_train_and_the_others_stay(tmp_path: Path) -> None:
    policy, reference = tiny.llama(), tiny.llama(seed=4)
    value_model, reward_model = tiny.reward_llama(seed=3), tiny.reward_llama(seed=5)
    before = {m: weights(m) for m in (policy, reference, value_model, reward_model)}
    trainer = make(
        tmp_path,
        model=policy,
        ref_model=reference,
        value_model=value_model,
        reward_model=reward_model,
    )
    trainer.train()
    assert moved(policy, before[policy]) == before[policy].keys()
    # The head of a classifier has no bias, and every layer below it takes part.
    assert moved(value_model, before[value_model]) == before[value_model].keys()
    assert not moved(reference, before[reference])
    assert not moved(reward_model, before[reward_model])
    first = next(row for row in trainer.state.log_history if "val/ratio" in row)
    assert first["val/ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [runs.lora(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[])],
    ids=["lora", "ia3"],
)
def test_with_peft_config_the_adapter_trains_and_its_base_stays(
    tmp_path: Path, config: Any
) -> None:
    policy = tiny.llama()
    before = weights(policy)
    trainer = make(tmp_path, model=policy, peft_config=config)
    trainer.train()
    assert isinstance(trainer.policy_model, PeftModel)
    names = {name for name, p in trainer.policy_model.named_parameters() if p.requires_grad}
    assert names, "no adapter"
    assert all("lora_" in name or "ia3" in name for name in names)
    for name, parameter in trainer.policy_model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert name in names or parameter.equal(before[plain]), f"{name} moved"
    row = next(row for row in trainer.state.log_history if "objective/kl" in row)
    assert abs(row["objective/kl"]) < 1e-4, "the reference is not the policy at the beginning"


def test_quantized_models(tmp_path: Path) -> None:
    """A 4-bit policy with LoRA, and a 4-bit value model that trains its head and norms."""
    tiny.reward_llama(seed=3).save_pretrained(tmp_path / "value")
    policy = runs.base(tmp_path, "nf4")
    value_model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "value",
        num_labels=1,
        quantization_config=policy.config.quantization_config,
        device_map={"": "cpu"},
    )
    head = value_model.score.weight.detach().clone()
    packed = {n: p.detach().clone() for n, p in policy.named_parameters()}
    trainer = make(
        tmp_path,
        model=policy,
        value_model=value_model,
        peft_config=runs.lora(),
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    assert not value_model.score.weight.equal(head)
    for name, parameter in trainer.policy_model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert "lora_" in name or parameter.equal(packed[plain]), f"{name} moved"
    with pytest.raises(ConfigError, match="quantized weights do not train: pass peft_config"):
        make(tmp_path, model=runs.base(tmp_path, "nf4"))


def test_the_files_are_those_of_trl_and_the_value_model_is_kept(tmp_path: Path) -> None:
    """User issue 3293: TRL threw the value model away."""
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} >= TRL_FILES
    again = AutoModelForCausalLM.from_pretrained(out)
    assert not moved(again, weights(trainer.policy_model))
    value_model = AutoModelForSequenceClassification.from_pretrained(out / "value")
    assert not moved(value_model, weights(trainer.value_model))


def test_the_files_of_an_adapter(tmp_path: Path) -> None:
    trainer = make(tmp_path, peft_config=runs.lora())
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    names = {file.name for file in out.iterdir()}
    assert {"adapter_config.json", ADAPTER_WEIGHTS, "README.md", "training_args.bin"} <= names
    assert "model.safetensors" not in names
    again = PeftModel.from_pretrained(tiny.llama(), str(out), is_trainable=True)
    found = {n: p for n, p in again.named_parameters() if "lora_" in n}
    assert found
    assert all(p.equal(weights(trainer.policy_model)[n]) for n, p in found.items())


@pytest.mark.parametrize("peft_config", [None, runs.lora(lora_dropout=0.1)], ids=["full", "lora"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    tmp_path: Path, peft_config: LoraConfig | None
) -> None:
    """User issues 1643, 2444 and 2657."""

    def run(folder: str, resume: str | None = None) -> PPOTrainer:
        trainer = make(
            tmp_path / folder,
            peft_config=copy.deepcopy(peft_config),
            save_strategy="steps",
            save_steps=4,
            gradient_checkpointing=True,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole/out/checkpoint-8"))
    assert not moved(resumed.backbone, weights(whole.backbone))
    last = [row for row in whole.state.log_history if "val/ratio" in row][-1]
    again = [row for row in resumed.state.log_history if "val/ratio" in row][-1]
    assert last["loss"] == again["loss"]


def test_another_reference_is_not_continued_with(tmp_path: Path) -> None:
    make(tmp_path, save_strategy="steps", save_steps=4).train()
    trainer = make(tmp_path, ref_model=tiny.llama(seed=9))
    with pytest.raises(CheckpointError, match="another base"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-8"))


def test_what_trl_scripts_read_from_the_trainer(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    policy, reference, value_model = tiny.llama(), tiny.llama(), tiny.reward_llama(seed=3)
    trainer = make(tmp_path, model=policy, ref_model=reference, value_model=value_model)
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    assert unwrapped.policy is trainer.policy_model is policy
    assert unwrapped.value_model is trainer.value_model is value_model
    assert trainer.ref_model is reference
    assert isinstance(trainer.reward_model, torch.nn.Module)
    assert trainer.stop_token_id == tokenizer.eos_token_id
    assert trainer.is_peft_model is False
    assert trainer.local_seed == trainer.args.seed
    assert trainer.train_dataset_len == 64
    assert trainer.local_dataloader_batch_size == 16
    assert trainer.sample_generations_freq == 3
    assert trainer.callbacks is trainer.callback_handler.callbacks
    assert trainer.eval_dataloader is None
    assert len(trainer.dataloader) == len(trainer.get_train_dataloader())
    with trainer.null_ref_context():
        pass
    trainer.train()
    assert trainer.state.episode == 48
    with_adapter = make(tmp_path, peft_config=runs.lora())
    assert with_adapter.is_peft_model is True
    assert with_adapter.ref_model is None
    randomised = with_adapter.policy_model
    with torch.no_grad():
        for name, parameter in randomised.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), with_adapter.null_ref_context():
        assert randomised(ids).logits.equal(tiny.llama()(ids).logits)


def test_the_views_of_a_shared_backbone_answer_as_models(tmp_path: Path) -> None:
    backbone = SharedBackbone(tiny.llama(), runs.lora())
    runs.randomise(backbone)
    trainer = PPOTrainer(
        tiny.config(tmp_path / "out"),
        tiny.tokenizer(),
        backbone,
        reward_model=runs.count_e,
        train_dataset=tiny.prompts(),
    )
    policy, value_model = trainer.model.policy, trainer.model.value_model
    policy.save_pretrained(tmp_path / "policy")
    alone = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "policy"))
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        torch.testing.assert_close(policy(ids).logits, alone(ids).logits, rtol=0, atol=1e-5)
        # The value before the last token, which is what PPO asks for.
        ours = backbone(ids, mask.bool(), mask[:, 1:].bool(), roles=("value",))["value"]["values"]
        values = value_model(ids, attention_mask=mask).logits
    torch.testing.assert_close(values[:, :-1, 0], ours, rtol=0, atol=1e-5)
    answers = policy.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    wanted = alone.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert answers.equal(wanted)
    assert policy.config is backbone.config
    with pytest.raises(AttributeError, match="would change the base that all roles share"):
        policy.train()
    names = {name for name, _ in value_model.named_parameters()}
    assert "value_head.weight" in names
    assert not any(".policy." in name for name in names)


def test_a_classifier_that_is_also_the_value_model_would_train(tmp_path: Path) -> None:
    one = tiny.reward_llama()
    with pytest.raises(ConfigError, match="value_model and reward_model are the same object"):
        make(tmp_path, value_model=one, reward_model=one)


def test_four_models_prepared_by_the_user(tmp_path: Path) -> None:
    models = SeparateModels(tiny.llama(), tiny.reward_llama(seed=3), peft_config=runs.lora())
    trainer = make(tmp_path, model=models, value_model=None)
    assert trainer.backbone is models
    trainer.train()
    assert trainer.state.global_step == 12


def two_ranks(folder: Path) -> dict[str, Any]:
    """Full models and a PEFT policy under DDP, with a reward model that each rank drew anew."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    for name in ("full", "lora"):
        trainer = make(
            folder / name,
            reward_model=tiny.reward_llama(seed=100 + rank),
            peft_config=runs.lora() if name == "lora" else None,
            gradient_accumulation_steps=2,
            callbacks=[SyncAuditCallback()],
            gradient_checkpointing=True,
            save_strategy="steps",
            save_steps=12,
        )
        trainer.train()
        trainer.save_model()
        found[name] = {
            n: float(p.detach().double().sum()) for n, p in trainer.backbone.named_parameters()
        }
        reward = trainer.reward_model.score.weight.detach()
        found[f"{name} reward"] = float(reward.double().sum())
    return found


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_agree(tmp_path: Path) -> None:
    """Defect 11 (DDP with PEFT crashed, and so did saving) and user issues 2375, 3998 and 5151."""
    first, second = run_on_ranks(two_ranks, tmp_path)
    assert first["full"] == second["full"]
    assert first["lora"] == second["lora"]
    for name in ("full reward", "lora reward"):
        # Defect 12: each rank had drawn a head of its own.
        assert (
            first[name]
            == second[name]
            == pytest.approx(
                float(tiny.reward_llama(seed=100).score.weight.detach().double().sum())
            )
        )
    for name in ("full", "lora"):
        assert (tmp_path / name / "out/training_args.bin").is_file()
