"""Checkpoints: when they are written, what they hold, and which ones can be continued."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import Trainer

import runs
import tiny
from trl_sync import SharedBackbone
from trl_sync.errors import CheckpointError
from trl_sync.ppo.checkpoint import CheckpointMixin
from trl_sync.ppo.engine_state import EngineStateMixin
from trl_sync.ppo.resume_checks import check_same_run, last_whole_checkpoint, missing_files

# What ppo/checkpoint.py and ppo/engine_state.py override, with the parameters they rely on.
OVERRIDDEN = {
    "_maybe_log_save_evaluate": [
        *("tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval"),
        *("start_time", "learning_rate"),
    ],
    "_save_checkpoint": ["model", "trial"],
    "_get_output_dir": ["trial"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_save": ["output_dir", "state_dict"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_load_rng_state": ["checkpoint"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_prepare_inputs": ["inputs"],
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_private_methods_are_where_they_were(name: str) -> None:
    stock = inspect.signature(getattr(Trainer, name))
    assert list(stock.parameters) == ["self", *OVERRIDDEN[name]]
    # And the training loop still calls them.
    assert inspect.getsource(Trainer).count(f"self.{name}(") >= 1


def test_no_other_private_method_is_overridden() -> None:
    members = vars(CheckpointMixin) | vars(EngineStateMixin)
    own = {n for n in members if n.startswith("_") and hasattr(Trainer, n)}
    assert {n for n in own if not n.startswith("__")} == set(OVERRIDDEN)


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in (folder / "out").glob("checkpoint-*"))


def test_a_save_inside_an_iteration_waits_for_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="trl_sync.ppo.checkpoint"):
        trainer = runs.train(
            tmp_path, save_strategy="steps", save_steps=5, logging_steps=7, total_episodes=64
        )
    # Due at 5, 10, 15 and at the end; iterations end at 4, 8, 12, 16.
    assert steps(tmp_path) == [8, 12, 16]
    said = [record.message for record in caplog.records]
    assert [text.split(" lies")[0] for text in said] == ["Step 5", "Step 10", "Step 15"]
    assert all("iteration of 4 updates" in text for text in said)
    assert [text.split()[-1] for text in said] == ["8.", "12.", "16."]
    # A checkpoint holds no metrics that wait for the next log line, so they are logged before.
    assert [row["step"] for row in runs.rows(trainer)] == [7, 8, 12, 14, 16]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 100}, [12]),
        ({"save_strategy": "steps", "save_steps": 4}, [4, 8, 12]),
        ({"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}, [8, 12]),
        ({"save_strategy": "epoch", "num_prompts": 16}, [4, 8, 12]),
        # Two iterations an epoch, and the end of training.
        ({"save_strategy": "epoch", "num_prompts": 40}, [8, 12]),
    ],
)
def test_when_checkpoints_are_written(
    tmp_path: Path, changes: dict[str, Any], expected: list[int]
) -> None:
    prompts = tiny.prompts(changes.pop("num_prompts", 64))
    runs.train(tmp_path, prompts=prompts, **changes)
    assert steps(tmp_path) == expected


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the checkpoints 4, 8, and 12."""
    folder = tmp_path_factory.mktemp("saved")
    runs.train(folder, save_strategy="steps", save_steps=4)
    return folder


def test_a_checkpoint_holds_no_weight_of_the_base(saved: Path) -> None:
    checkpoint = saved / "out" / "checkpoint-8"
    names = {}
    for file in checkpoint.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names[str(file.relative_to(checkpoint))] = list(tensors.keys())
    adapters = names["adapter_model.safetensors"], names["value/adapter_model.safetensors"]
    assert all("lora_" in name for adapter in adapters for name in adapter)
    assert sorted(names["value/value_head.safetensors"]) == ["bias", "weight"]
    assert len(names) == 3
    optimizer = torch.load(checkpoint / "optimizer.pt")
    assert len(optimizer["state"]) == sum(map(len, names.values()))
    # Two adapters, two moments of each, and little else: far below four copies of the adapters.
    adapter_bytes = (checkpoint / "adapter_model.safetensors").stat().st_size
    total = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
    base_bytes = 4 * tiny.llama().num_parameters()
    assert total < 8 * adapter_bytes + 60_000  # tokenizer, random state, log
    assert not any(f.stat().st_size > base_bytes for f in checkpoint.rglob("*"))


@pytest.mark.parametrize("stop_after, prompts", [(8, 64), (8, 40), (12, 40)])
def test_another_trainer_continues_where_the_first_one_stopped(
    tmp_path: Path, stop_after: int, prompts: int
) -> None:
    """Amid an epoch of 4 iterations, at the end of one of 2, and amid one of 2."""

    def run(folder: Path, stop: int | None, resume: bool = False) -> tuple[Any, list[str]]:
        seen: list[str] = []

        def reward(prompts: list[str], completions: list[str]) -> list[float]:
            seen.extend(prompts)
            return runs.count_e(prompts, completions)

        def halt(state: Any, control: Any) -> None:
            control.should_training_stop |= state.global_step == stop

        trainer = runs.make(
            folder,
            reward=reward,
            prompts=tiny.prompts(prompts),
            callbacks=[runs.At("on_step_end", halt)],
            total_episodes=96,
            save_strategy="steps",
            save_steps=4,
            peft_config=runs.lora(lora_dropout=0.1),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen

    whole, all_prompts = run(tmp_path / "whole", None)
    stopped, first_prompts = run(tmp_path / "cut", stop_after)
    assert stopped.state.global_step == stop_after
    torch.manual_seed(123)  # whatever happened in between
    resumed, other_prompts = run(tmp_path / "cut", None, resume=True)
    assert first_prompts + other_prompts == all_prompts
    assert len(first_prompts) == stop_after // 4 * 16
    assert runs.same(runs.trained(whole), runs.trained(resumed))
    assert resumed.state.global_step == whole.state.global_step == 24
    assert resumed.state.epoch == whole.state.epoch
    for name in ("epoch", "episode", "lr", "loss", "val/ratio"):
        logged = [[row[name] for row in runs.rows(trainer)] for trainer in (whole, resumed)]
        assert logged[0] == logged[1], name


def test_the_last_whole_checkpoint_is_taken(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "out", tmp_path / "out")
    config = tiny.config(tmp_path / "out")
    # Numbers, not text: 12 is above 8. Other folders are none of ours.
    (tmp_path / "out" / "checkpoint-99-old").mkdir()
    (tmp_path / "out" / "checkpoint-50").mkdir()
    assert last_whole_checkpoint(config) == str(tmp_path / "out" / "checkpoint-12")
    (tmp_path / "out" / "checkpoint-12" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(config) == str(tmp_path / "out" / "checkpoint-8")
    state = tmp_path / "out" / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text()[:-40])
    assert last_whole_checkpoint(config) == str(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"No whole checkpoint in .*out: nothing to resume"):
        runs.make(tmp_path).train(resume_from_checkpoint=True)


NEEDED = ("adapter_model.safetensors", "value/adapter_model.safetensors", "ppo_state.json")
NEEDED += ("value/value_head.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt")
NEEDED += ("rng_state.pth",)


def forget_sizes(checkpoint: Path) -> None:
    """Leaves the checkpoint as versions wrote it that did not record sizes."""
    state = json.loads((checkpoint / "ppo_state.json").read_text())
    del state["sizes"]
    (checkpoint / "ppo_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("name", [n for n in NEEDED if not n.endswith(".json")])
@pytest.mark.parametrize("with_sizes", [True, False], ids=["sizes", "before_sizes"])
def test_files_that_are_cut_short_are_found(
    saved: Path, tmp_path: Path, name: str, with_sizes: bool
) -> None:
    checkpoint = tmp_path / "checkpoint-8"
    shutil.copytree(saved / "out" / "checkpoint-8", checkpoint)
    if not with_sizes:
        forget_sizes(checkpoint)
    assert missing_files(checkpoint) == []
    # One byte of 4 kB, as a copy to a full disk would leave it.
    with (checkpoint / name).open("r+b") as file:
        file.truncate((checkpoint / name).stat().st_size - 1)
    assert missing_files(checkpoint) == ([name] if with_sizes else [])


def test_text_may_be_edited(saved: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-8"
    shutil.copytree(saved / "out" / "checkpoint-8", checkpoint)
    for name in ("trainer_state.json", "tokenizer_config.json"):
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(content))
    assert missing_files(checkpoint) == []


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_without_one_of_its_files_is_refused(
    saved: Path, tmp_path: Path, name: str
) -> None:
    checkpoint = tmp_path / "checkpoint-8"
    shutil.copytree(saved / "out" / "checkpoint-8", checkpoint)
    assert missing_files(checkpoint) == []
    (checkpoint / name).unlink()
    trainer = runs.make(tmp_path)
    before = runs.trained(trainer)
    with pytest.raises(CheckpointError, match=f"not a whole checkpoint: {name.split('.')[0]}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert runs.same(before, runs.trained(trainer))


def test_cut_short_adapters_are_refused_before_training(saved: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-8"
    shutil.copytree(saved / "out" / "checkpoint-8", checkpoint)
    forget_sizes(checkpoint)
    weights = checkpoint / "value" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    trainer = runs.make(tmp_path)
    before = runs.trained(trainer)
    with pytest.raises(CheckpointError, match=r"value/adapter_model.safetensors cannot be read"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert runs.same(before, runs.trained(trainer))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    return {
        str(f.relative_to(folder)): (f.stat().st_size, f.stat().st_mtime_ns)
        for f in folder.rglob("*")
        if f.is_file()
    }


@pytest.mark.parametrize(
    "message, changes",
    [
        ("another base", {"model": "other"}),
        ("batch_size: 16 then, 32 now", {"per_device_train_batch_size": 8}),
        ("num_mini_batches: 2 then, 1 now", {"num_mini_batches": 1}),
        ("num_ppo_epochs: 2 then, 3 now", {"num_ppo_epochs": 3}),
        ("num_prompts: 64 then, 65 now", {"num_prompts": 65}),
        ("response_length: 8 then, 9 now", {"response_length": 9}),
        ("seed: 42 then, 43 now", {"seed": 43}),
        # Other prompts matter, another number of processes does not.
        (r"\(num_prompts: 64 then, 65 now, prompts: [^)]*\)", {"num_prompts": 65}),
        ("world_size: 2 then, 1 now", {"world_size": 2, "per_device_train_batch_size": 8}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    saved: Path, tmp_path: Path, message: str, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(saved / "out", folder)
    changes = dict(changes)
    if "world_size" in changes:
        # As two ranks would have left it.
        checkpoint = folder / "checkpoint-12"
        state = json.loads((checkpoint / "ppo_state.json").read_text())
        state["world_size"] = changes.pop("world_size")
        (checkpoint / "ppo_state.json").write_text(json.dumps(state))
        for rank in (0, 1):
            shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    model = tiny.llama(seed=5 if changes.pop("model", None) else 0)
    prompts = tiny.prompts(changes.pop("num_prompts", 64))
    trainer = runs.make(tmp_path, model=model, prompts=prompts, **changes)
    files, before = listing(folder), runs.trained(trainer)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert listing(folder) == files
    assert runs.same(before, runs.trained(trainer))


def test_other_lora_options_are_refused(saved: Path, tmp_path: Path) -> None:
    trainer = runs.make(tmp_path, peft_config=runs.lora(r=8))
    before = runs.trained(trainer)
    with pytest.raises(CheckpointError, match="LoRA options"):
        trainer.train(resume_from_checkpoint=str(saved / "out" / "checkpoint-8"))
    assert runs.same(before, runs.trained(trainer))


def test_a_quantized_base_is_told_from_the_plain_one(saved: Path, tmp_path: Path) -> None:
    backbone = SharedBackbone(runs.base(tmp_path, "nf4"), runs.lora())
    trainer = runs.make(tmp_path, model=backbone)
    with pytest.raises(CheckpointError, match="Load the same model with the same quantization"):
        trainer.train(resume_from_checkpoint=str(saved / "out" / "checkpoint-8"))


def test_a_stop_inside_an_iteration_waits_for_the_checkpoint_asked_for(tmp_path: Path) -> None:
    def save_and_stop(state: Any, control: Any) -> None:
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True

    trainer = runs.train(tmp_path, callbacks=[runs.At("on_step_end", save_and_stop)])
    assert trainer.state.global_step == runs.UPDATES
    assert steps(tmp_path) == [runs.UPDATES]


def test_a_checkpoint_from_inside_an_iteration_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(saved / "out" / "checkpoint-4", folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps(state | {"global_step": 6}))
    with pytest.raises(CheckpointError, match="inside an iteration of 4 updates"):
        runs.make(tmp_path).train(resume_from_checkpoint=str(folder))


def left_by(ranks: int, saved: Path, folder: Path) -> Path:
    """Checkpoint 8 as that many processes would have left it."""
    checkpoint = folder / "out" / "checkpoint-8"
    shutil.copytree(saved / "out" / "checkpoint-8", checkpoint)
    state = json.loads((checkpoint / "ppo_state.json").read_text())
    random_state = state["sizes"].pop("rng_state.pth")
    state["sizes"] |= {f"rng_state_{rank}.pth": random_state for rank in range(ranks)}
    (checkpoint / "ppo_state.json").write_text(json.dumps(state | {"world_size": ranks}))
    for rank in range(ranks):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    return checkpoint


@pytest.mark.parametrize(
    "changes, advice",
    [
        # 32 episodes here, in micro-batches of 8, and then of 3.
        (
            {"per_device_train_batch_size": 8},
            "per_device_train_batch_size=8 and gradient_accumulation_steps=2.",
        ),
        (
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 6},
            "per_device_train_batch_size=2 and gradient_accumulation_steps=8.",
        ),
    ],
)
def test_another_batch_on_other_ranks_is_refused_with_sizes_that_would_do(
    saved: Path, tmp_path: Path, changes: dict[str, Any], advice: str
) -> None:
    left_by(2, saved, tmp_path)
    trainer = runs.make(tmp_path, **changes)
    batch = trainer.plan.batch_size
    said = f"batch_size: 16 then, {batch} now, world_size: 2 then, 1 now"
    with pytest.raises(CheckpointError, match=said) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert str(caught.value).endswith(f"on 1 processes set {advice}")
    # What it says does do.
    sizes = dict(part.split("=") for part in advice.rstrip(".").split(" and "))
    fitting = runs.make(tmp_path, **{name: int(size) for name, size in sizes.items()})
    fitting.train(resume_from_checkpoint=True)
    assert runs.rows(fitting)[8]["step"] == 9


def test_ranks_that_cannot_share_the_batch_are_told_how_many_can() -> None:
    saved = {"batch_size": 24, "num_mini_batches": 2, "world_size": 2}
    own = {"batch_size": 30, "num_mini_batches": 2, "world_size": 5}
    with pytest.raises(CheckpointError, match="5 processes cannot share them in 2") as caught:
        check_same_run(Path("checkpoint-8"), saved, own, 3)
    # Those that leave each process an even number of the 24.
    assert str(caught.value).endswith("Start 1, 2, 3, 4, 6, 12 processes.")


def test_another_number_of_ranks_is_said(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_by(2, saved, tmp_path)
    runs.make(tmp_path).train(resume_from_checkpoint=True)
    assert "2 process(es) began this run, 1 continue it" in caplog.text


def test_a_run_that_is_complete_trains_no_further(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = runs.train(tmp_path, save_strategy="steps", save_steps=4)
    said = "All 12 updates are done: nothing is left to train."
    assert said not in caplog.text
    again = runs.make(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12
    assert runs.same(runs.trained(done), runs.trained(again))
    assert said in caplog.text
    longer = runs.make(tmp_path, total_episodes=64)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 16
