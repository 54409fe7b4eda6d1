"""Faults in one process: what they write, what they refuse, and files of a checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trl_sync.audit import faults
from trl_sync.audit.drill import DrillJob, plant_on
from trl_sync.audit.faults import engines as fault_engines
from trl_sync.audit.findings import Cause


def test_killed_process_ends_by_signal_9_in_its_step() -> None:
    script = """
        import torch
        from trl_sync.audit.faults import rank_killed

        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with rank_killed(model, step=3, place="in_step", rank=0):
            for number in range(1, 6):
                model(torch.ones(1, 2)).sum().backward()
                print("begins", number, flush=True)
                optimizer.step()
                print("ends", number, flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.splitlines()[-2:] == ["ends 2", "begins 3"]


def step_once(block: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with block:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def test_fault_that_never_strikes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(faults.FaultNotPlantedError, match="for update 5 did not strike rank 0"):
        step_once(faults.step_skipped(step=5, rank=0), model, optimizer)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with faults.step_skipped(step=5, rank=1) as planted:  # not this process
        optimizer.step()
    assert not planted.struck


def test_error_of_the_audit_passes_through() -> None:
    with pytest.raises(KeyError, match="found"), faults.step_skipped(step=5, rank=0):
        raise KeyError("found")


def test_one_bit_is_one_bit() -> None:
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone().view(torch.int32)
    with faults.bit_flipped(model, step=1, rank=0, tensor="weight", element=5, bit=17):
        model(torch.ones(1, 4)).sum().backward()
    changed = (before ^ model.weight.detach().view(torch.int32)).view(-1).tolist()
    assert changed == [0, 0, 0, 0, 0, 1 << 17, 0, 0, 0, 0, 0, 0]


def test_two_rows_change_places() -> None:
    model = nn.Linear(2, 3, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])
    with faults.rows_swapped(model, step=1, rank=0):
        model(torch.ones(1, 2))
    assert model.weight.tolist() == [[3.0, 4.0], [1.0, 2.0], [1.0, 2.0]]


def test_branch_is_added_to_a_model_without_peft() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = model(torch.ones(1, 2)).tolist()
    with faults.adapter_added_after_wrapping(model, optimizer=optimizer) as planted:
        assert planted.tensor == "0.late_adapter.weight"
        model(torch.ones(1, 2)).sum().backward()
        assert model[0].late_adapter.weight.grad.tolist() == [[1.0, 1.0]] * 3
        assert len(optimizer.param_groups[0]["params"]) == 2
    assert model(torch.ones(1, 2)).tolist() == plain


@pytest.mark.parametrize(
    "plant, message",
    [
        (lambda m: faults.bit_flipped(m, step=0), "1-based"),
        (lambda m: faults.bit_flipped(m, step=1), r"rank is 1, but 1 process\(es\) run"),
        (lambda m: faults.bit_flipped(m, step=1, rank=0, tensor="w"), "called w; expected one of"),
        (lambda m: faults.base_byte_changed(m, step=1, rank=0), "none of the 2 parameters"),
        (lambda m: faults.optimizer_moment_changed(m, step=1), "expected 2 or more"),
        (lambda m: faults.adapter_merged(m, step=1), "no peft model"),
        (lambda m: faults.dropout_in_reference(m), "no dropout layer"),
        (lambda m: faults.parameter_not_in_optimizer(m), "pass `optimizer`"),
        (lambda m: faults.other_base(m), "no frozen parameter"),
    ],
)
def test_targets_that_do_not_fit_are_refused(plant: Any, message: str) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(Exception, match=message), plant(model):
        model(torch.ones(1, 2))


def test_files_of_a_checkpoint_are_damaged_and_mended(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    file = folder / "model.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.arange(4.0)}, file)
    (folder / "notes.txt").write_text("x" * 1000)
    content = file.read_bytes()
    with faults.byte_flipped(folder, file="model.safetensors", tensor="b"):
        damaged = load_file(file)
        assert damaged["a"].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert damaged["b"].view(torch.int32).tolist()[0] == 0xFF
    with faults.byte_flipped(folder) as planted:
        assert file.read_bytes() == content[:-1] + bytes([content[-1] ^ 0xFF])
        assert planted.tensor == "model.safetensors"
    with faults.shard_missing(folder):
        assert sorted(p.name for p in folder.iterdir()) == ["notes.txt"]
    assert file.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]


def test_other_base_holds_other_frozen_values_until_the_end() -> None:
    model = nn.Linear(2, 1)
    model.weight.requires_grad_(False)
    weight, bias = model.weight.tolist(), model.bias.tolist()
    with faults.other_base(model) as planted:
        assert planted.tensor == "weight"
        assert model.weight.tolist() != weight
        assert model.bias.tolist() == bias
    assert model.weight.tolist() == weight


def test_registry_names_causes_of_the_audit() -> None:
    assert {fault.cause for fault in faults.FAULTS.values()} == set(Cause) - {Cause.BUFFERS_DIFFER}
    assert all(name == fault.name for name, fault in faults.FAULTS.items())


def test_table_of_engines_speaks_of_known_faults_and_causes() -> None:
    tables = (
        fault_engines._ABSENT,
        fault_engines._ABSENT_LATE,
        fault_engines._ABSENT_AT_ONCE,
        fault_engines._UNSEEN,
        fault_engines._OTHERWISE,
    )
    assert set().union(*tables) | set(fault_engines._PAIRS) <= set(faults.FAULTS)
    causes = {row[1] for rows in fault_engines._OTHERWISE.values() for row in rows}
    assert causes <= {cause.value for cause in Cause}
    lines = fault_engines.as_markdown().splitlines()
    assert lines[0] == "| fault | zero1 | zero2 | zero3 | fsdp2 | hsdp |"
    diverged, late = "`optimizer_diverged`", "`structure_mismatch`"
    hidden = "unseen | unseen | unseen | unseen"
    assert f"| `other_learning_rate` | {hidden} | {diverged} |" in lines
    assert f"| `tensor_added` | {late} | {late} | {late}, at once only | {late} | {late} |" in lines
    assert not [line for line in lines if line.startswith("| `byte_flipped`")]


@pytest.mark.parametrize(
    "fault, message",
    [("byte_flip", "no fault is called byte_flip"), ("shard_missing", "running job")],
)
def test_drill_refuses_what_cannot_strike_a_job(fault: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plant_on(object.__new__(DrillJob), fault, step=1)
