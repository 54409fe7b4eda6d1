"""Faults inside transformers' Trainer, which makes its optimizer and wraps its model late."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fault_observer import Observer, differing, first_difference, moments, rows_of

import ranks
from trl_sync.audit import faults

STEPS = 4
STEP = 3
FACTOR = 0.7
TRAINER_FAULTS: dict[str, dict[str, Any]] = {
    "bit_flipped": {},
    "optimizer_moment_changed": {},
    "step_skipped": {},
    "other_learning_rate": {},
    "extra_optimizer_step": {},
    "gradients_clipped": {"factor": FACTOR},
    "reduction_returned_zeros": {},
    "forward_unwrapped": {},
    "no_sync_on_last_micro_batch": {},
}


def trained(folder: str, fault: str | None) -> dict[str, Any]:
    """What this rank saw in a transformers Trainer with the fault."""
    import datasets
    import transformers

    import tiny

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            observer.before(given["optimizer"])

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            observer.after(given["optimizer"])

    model = tiny.llama(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    observer = Observer(model)
    tokens = torch.randint(3, 64, (64, 8), generator=torch.Generator().manual_seed(5)).tolist()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.1,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        callbacks=[Watch()],
    )
    block: Any = nullcontext()
    if fault is not None:
        plant, options = faults.FAULTS[fault].plant, dict(TRAINER_FAULTS[fault])
        # Those that act inside the step find the optimizer by themselves.
        if fault not in ("step_skipped", "other_learning_rate", "extra_optimizer_step"):
            options["model"] = model
        block = plant(step=STEP, **options)
    with block as planted:
        trainer.train()
    return {"rows": observer.rows, "tensor": planted and planted.tensor}


def all_trainers(folder: str) -> dict[str, Any]:
    names = [None, *TRAINER_FAULTS]
    found = {str(name): trained(folder, name) for name in names}
    return found | {"again": trained(folder, None)}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run_on_ranks(all_trainers, str(tmp_path_factory.mktemp("run")), deadline_s=200)


@pytest.mark.ranks
@pytest.mark.parametrize("fault", [None, *TRAINER_FAULTS])
def test_faults_in_a_trainer(trainers: list[dict[str, Any]], fault: str | None) -> None:
    rows = rows_of(trainers, str(fault))
    assert [len(rank) for rank in rows] == [STEPS, STEPS]
    names = set(rows[0][0]["gradients"])
    tensor = trainers[1][str(fault)]["tensor"]
    first = first_difference(rows)
    match fault:
        case None:
            assert first is None
            assert [rank["again"]["rows"] for rank in trainers] == rows
        case "bit_flipped":
            assert first == (STEP, "before", {tensor})
        case "optimizer_moment_changed":
            assert first == (STEP, "before", {f"{tensor}.exp_avg"})
            assert tensor in differing(rows, STEP, "after")
        case "step_skipped" | "extra_optimizer_step":
            assert first == (STEP, "after", names | moments(sorted(names)))
        case "other_learning_rate":
            assert first == (STEP, "after", names)
        case "reduction_returned_zeros":
            assert first == (STEP, "gradients", {tensor})
            assert rows[1][STEP - 1]["sizes"][tensor] == 0.0
        case _:
            assert first == (STEP, "gradients", names)


@pytest.mark.ranks
def test_clipping_in_a_trainer_comes_after_its_own(trainers: list[dict[str, Any]]) -> None:
    """max_grad_norm is small enough to clip, which would undo a factor applied before."""
    rows = rows_of(trainers, "gradients_clipped")
    one, other = (rank[STEP - 1]["sizes"] for rank in rows)
    for name, size in one.items():
        assert other[name] / size == pytest.approx(FACTOR, rel=1e-6)
    healthy = trainers[0]["None"]["rows"][STEP - 1]["gradients"]
    assert rows[0][STEP - 1]["gradients"] == healthy
