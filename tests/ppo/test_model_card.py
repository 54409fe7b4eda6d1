"""The model card and what is uploaded; a stand-in for the hub keeps what it is sent."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import trainer as stock_trainer
from transformers import trainer_utils

import runs
import tiny
from trl_sync import PPOTrainer

SAVED = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "ppo_state.json"),
    *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "training_args.bin"),
}


class HubStandIn:
    """Stands in for `huggingface_hub.HfApi`: no hub is reached, uploads are copied to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.created: list[str] = []
        self.uploads: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.created.append(repo_id)
        return SimpleNamespace(repo_id=f"someone/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, *, folder_path: str, **options: Any) -> Any:
        copy = self.folder / str(len(self.uploads))
        shutil.copytree(folder_path, copy, ignore=shutil.ignore_patterns("_*", "checkpoint-*"))
        self.uploads.append(options | {"copy": copy})
        return SimpleNamespace(done=lambda: True, result=lambda: None, exception=lambda: None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    stand_in = HubStandIn(tmp_path / "hub")
    monkeypatch.setattr(stock_trainer, "hf_api", lambda: stand_in)
    return stand_in


def card_in(folder: Path) -> Any:
    """The card as the hub's own library reads it; its metadata must be valid YAML."""
    card = ModelCard.load(folder / "README.md")
    assert yaml.safe_load(card.content.split("---")[1])["tags"] == card.data.tags
    return card


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_card_tells_what_the_model_is_and_how_it_was_trained(tmp_path: Path) -> None:
    model = tiny.llama()
    model.config._name_or_path = "someone/tiny-llama"
    trainer = runs.train(tmp_path, model=model, kl_coef=0.07)
    trainer.create_model_card("my-model", dataset_name="someone/prompts", tags=["first", "ppo"])
    card = card_in(tmp_path / "out")
    assert card.data.tags == ["trl", "ppo", "trl-sync", "lora", "first"]
    assert card.data.base_model == "someone/tiny-llama"
    assert card.data.base_model_relation == "adapter"
    assert card.data.library_name == "peft"
    assert card.data.datasets == "someone/prompts"
    assert card.data.pipeline_tag == "text-generation"
    text = card.text
    assert text.strip().splitlines()[2] == "# my-model"
    assert "`someone/tiny-llama`" in text
    assert "48 episodes" in text
    assert "| kl_coef | 0.07 |" in text
    assert "| batch_size | 16 |" in text
    assert "| stop_token | eos |" in text
    assert "cliprange_high" not in text  # unset
    assert f"- transformers: {transformers.__version__}" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("my-model")' in text
    assert "arXiv:1707.06347" in text
    assert "arXiv:1909.08593" in text
    assert "hub_token" not in text
    assert str(tmp_path) not in text


def test_a_local_base_is_no_metadata(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    runs.make(tmp_path, model=model).create_model_card(tags="one")
    card = card_in(tmp_path / "out")
    assert not {"base_model", "base_model_relation"} & card.data.to_dict().keys()
    assert card.data.tags == ["trl", "ppo", "trl-sync", "lora", "one"]
    assert "of `base`" in card.text
    assert "# out\n" in card.text
    assert str(tmp_path) not in card.text


def test_checkpoints_and_save_model_write_the_card_but_not_over_a_hand_written_one(
    tmp_path: Path,
) -> None:
    written: list[str] = []
    file = tmp_path / "out" / "README.md"
    trainer = runs.make(
        tmp_path,
        save_strategy="steps",
        save_steps=4,
        callbacks=[runs.At("on_save", lambda state, control: written.append(file.read_text()))],
    )
    trainer.train()
    episodes = [next(n for n in (16, 32, 48) if f": {n} episodes" in text) for text in written]
    assert episodes == [16, 32, 48]
    trainer.create_model_card("named", dataset_name="someone/prompts")
    trainer.save_model()
    assert "# named" in file.read_text()
    assert card_in(tmp_path / "out").data.datasets == "someone/prompts"
    file.write_text("by hand")
    trainer.save_model()
    assert file.read_text() == "by hand"
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert "# named" in (tmp_path / "elsewhere" / "README.md").read_text()
    trainer.create_model_card()
    assert "# out" in file.read_text()


@pytest.mark.newest
def test_push_to_hub_uploads_the_whole_policy_and_the_value_model(
    tmp_path: Path, hub: HubStandIn
) -> None:
    trainer = runs.train(tmp_path, hub_model_id="someone/name")
    trainer.push_to_hub(commit_message="Done", dataset_name="someone/prompts", tags="mine")
    assert hub.created == ["someone/name"]
    [upload] = hub.uploads
    assert upload["repo_id"] == "someone/name"
    assert upload["commit_message"] == "Done"
    assert files_in(upload["copy"]) == SAVED | {"value", "run_record.json"}
    assert "value_head.safetensors" in files_in(upload["copy"] / "value")
    card = card_in(upload["copy"])
    assert card.data.datasets == "someone/prompts"
    assert "mine" in card.data.tags
    assert "# name\n" in card.text
    assert 'from_pretrained("someone/name")' in card.text
    loaded = PeftModel.from_pretrained(tiny.llama(), str(upload["copy"]))
    assert any("lora_" in name for name, _ in loaded.named_parameters())


@pytest.mark.newest
@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_uploads_from_checkpoints_hold_the_value_model_of_the_same_step(
    tmp_path: Path, hub: HubStandIn
) -> None:
    trainer = runs.train(
        tmp_path, push_to_hub=True, save_strategy="steps", save_steps=4, hub_always_push=True
    )
    trainer.save_model()
    assert hub.created == ["out"]
    messages = [upload["commit_message"] for upload in hub.uploads]
    assert messages == [*(f"Training in progress, step {n}" for n in (4, 8, 12)), "Model save"]
    for upload, step in zip(hub.uploads, (4, 8, 12, 12), strict=True):
        assert SAVED - {"ppo_state.json"} <= files_in(upload["copy"])
        checkpoint = tmp_path / "out" / f"{trainer_utils.PREFIX_CHECKPOINT_DIR}-{step}"
        for file in ("adapter_model.safetensors", "value/value_head.safetensors"):
            assert (upload["copy"] / file).read_bytes() == (checkpoint / file).read_bytes()
        assert f": {step * 4} episodes" in card_in(upload["copy"]).text


@pytest.mark.newest
def test_separate_models_are_uploaded_whole(tmp_path: Path, hub: HubStandIn) -> None:
    model = tiny.llama()
    model.config._name_or_path = "someone/tiny-llama"
    trainer = PPOTrainer(
        tiny.config(tmp_path / "out", total_episodes=16),
        tiny.tokenizer(),
        model,
        reward_model=runs.count_e,
        train_dataset=tiny.prompts(),
        value_model=tiny.reward_llama(),
    )
    trainer.train()
    trainer.push_to_hub()
    [upload] = hub.uploads
    assert {"README.md", "config.json", "model.safetensors", "value"} <= files_in(upload["copy"])
    card = card_in(upload["copy"])
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "someone/tiny-llama"
    assert card.data.base_model_relation == "finetune"
    assert "lora" not in card.data.tags
    assert 'AutoModelForCausalLM.from_pretrained("someone/out")' in card.text
