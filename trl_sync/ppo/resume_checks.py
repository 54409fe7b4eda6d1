"""Which checkpoints can be continued: whole ones, of the same run."""

from __future__ import annotations

import json
import random
import reprlib
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.trainer import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_sync.errors import CheckpointError
from trl_sync.ppo.config import PPOConfig
from trl_sync.ppo.staged_save import CHECKPOINT_NAME

STATE_FILE = "ppo_state.json"
# People edit text; a state in it that is cut short is noticed on reading. Nobody reads the pickled
# arguments, which some delete before they pass a checkpoint on.
_TEXT = (".json", ".md", ".txt", ".jinja", ".py")
# More than anybody starts; what a damaged file says beyond it is not gone through one by one.
_MAX_RANKS = 1 << 16
_SHOWN = 8
_LARGEST = sys.float_info.max


def record_sizes(folder: Path) -> None:
    """Adds to the state file how many bytes each other file has; the last change to a checkpoint.

    Files of text and the pickled arguments are left out.
    """
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in files
        if path.suffix not in _TEXT and path.name != TRAINING_ARGS_NAME
    }
    file = folder / STATE_FILE
    file.write_text(json.dumps(read_json(file) | {"sizes": sizes}, indent=2) + "\n")


def missing_files(folder: Path) -> list[str]:
    """What `folder` lacks of all that resuming needs: files not there, cut short or damaged."""
    states = {name: read_json(folder / name) for name in (STATE_FILE, TRAINER_STATE_NAME)}
    wrong = [
        f"{name} ({problem})"
        for name, problem in (
            (STATE_FILE, state_problem(states[STATE_FILE])),
            (TRAINER_STATE_NAME, trainer_state_problem(states[TRAINER_STATE_NAME])),
        )
        if problem is not None
    ]
    if wrong:
        return wrong
    saved = states[STATE_FILE]
    if "sizes" in saved:
        missing = [name for name, size in saved["sizes"].items() if _size(folder / name) != size]
    else:
        # Written before sizes were recorded.
        names = rng_files(saved.get("world_size", 1))
        missing = [name for name in names if not (folder / name).is_file()]
    missing += [name for name in saved.get("files", []) if not (folder / name).is_file()]
    # Without a file the stock loop would begin with a fresh optimizer, in silence. DeepSpeed keeps
    # optimizer and scheduler in a folder that it names in `latest`.
    if not (folder / "latest").is_file():
        missing += [
            name
            for name in ("optimizer", "scheduler")
            if not list(folder.glob(f"{name}*")) and f"{name}.pt" not in missing
        ]
    missing += [name for name, content in states.items() if not content]
    return list(dict.fromkeys(missing))


def rng_files(world_size: int) -> list[str]:
    """The files in which the processes keep their random states."""
    if world_size == 1:
        return ["rng_state.pth"]
    return [f"rng_state_{rank}.pth" for rank in range(world_size)]


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; nothing if it does not exist, is cut short or holds no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def state_problem(saved: Mapping[str, Any]) -> str | None:
    """What in the content of the state file is not as it was written; None if all is."""
    sizes, files, state = saved.get("sizes", {}), saved.get("files", []), saved.get("state", {})
    if not isinstance(sizes, dict) or not all(map(_is_count, sizes.values())):
        return "sizes does not hold files and their sizes"
    if not isinstance(files, list):
        return f"files is {_brief(files)}, expected a list"
    for name in (*sizes, *files):
        if not _is_inside(name):
            return f"it names the file {_brief(name)}, which cannot lie in this folder"
    for name in ("world_size", "batch_size", "num_mini_batches", "num_ppo_epochs"):
        number = saved.get(name, 1)
        if not _is_count(number) or number == 0:
            return f"{name} is {_brief(number)}, expected a whole number of at least 1"
    if saved.get("world_size", 1) > _MAX_RANKS:
        return f"world_size is {_brief(saved['world_size'])}, more than {_MAX_RANKS}"
    if not isinstance(state, dict) or not all(map(_holds_numbers, state.values())):
        return f"state is {_brief(state)}, expected finite numbers by name"
    return None


def trainer_state_problem(content: Mapping[str, Any]) -> str | None:
    """What in the content of trainer_state.json a Trainer cannot go on from; None if it can."""
    unknown = sorted(set(content) - {field.name for field in fields(TrainerState)})
    if unknown:
        return f"this version of transformers knows no field {_brief(unknown[0])}"
    for name in ("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen"):
        if name in content and not _is_count(content[name]):
            return f"{name} is {_brief(content[name])}, expected a whole number"
    if content and "global_step" not in content:
        return "it has no global_step"
    rows = content.get("log_history", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return f"log_history is {_brief(rows)}, expected a list of objects"
    callbacks = content.get("stateful_callbacks")
    # The next save writes there what the Trainer itself keeps.
    if content and not (isinstance(callbacks, dict) and "TrainerControl" in callbacks):
        return f"stateful_callbacks is {_brief(callbacks)}, expected an object with TrainerControl"
    for name in ("epoch", "best_metric", "total_flos", "best_global_step"):
        number = content.get(name)
        # A metric may be NaN.
        if number is not None and (type(number) not in (int, float) or abs(number) > _LARGEST):
            return f"{name} is {_brief(number)}, expected a number"
    best = content.get("best_model_checkpoint")
    if best is not None and not isinstance(best, str):
        return f"best_model_checkpoint is {_brief(best)}, expected a folder"
    return None


def check_readable(folder: Path, rng_file: str) -> None:
    """Nothing, if optimizer, scheduler and random state can be read; those of engines are theirs.

    Tensors are mapped, not read.

    Raises:
        CheckpointError: names the file that cannot be read.
    """
    for name, check in (
        (OPTIMIZER_NAME, _check_optimizer),
        (SCHEDULER_NAME, _check_scheduler),
        (rng_file, _check_random_state),
    ):
        file = folder / name
        if not file.is_file():
            continue
        try:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no zip archive, which torch.save writes")
            with safe_globals():
                check(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:  # of zip, pickle and torch, one for each kind of damage
            raise CheckpointError(
                f"{file} cannot be read ({_first_sentence(error)}). Resume from an earlier "
                "checkpoint, or from a copy of this one."
            ) from error


def _first_sentence(error: Exception) -> str:
    # The others of torch.load advise to read the file with pickle, which may run programs.
    return f"{type(error).__name__}: {str(error).partition('. ')[0][:300]}"


def _check_optimizer(state: Any) -> None:
    if not isinstance(state["state"], dict) or not isinstance(state["param_groups"], list):
        raise TypeError("it holds no state of an optimizer")


def _check_scheduler(state: Any) -> None:
    if not isinstance(state, dict) or not _is_count(state["last_epoch"]):
        raise TypeError("it holds no state of a learning rate schedule")


def _check_random_state(state: Any) -> None:
    random.Random().setstate(state["python"])
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["cpu"])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _holds_numbers(part: Any) -> bool:
    """Whether `part` is what a controller keeps between iterations."""
    if not isinstance(part, dict):
        return False
    return all(type(v) in (int, float) and abs(v) <= _LARGEST for v in part.values())


def _is_inside(name: Any) -> bool:
    """Whether `name` is the path of a file below a folder."""
    if not isinstance(name, str) or len(name) > 1024 or not name.isprintable():
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _brief(value: Any) -> str:
    """`value` as text of some eighty characters, however large or deep it is."""
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxdict = 20
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, 80, 80, 40


def last_whole_checkpoint(args: PPOConfig) -> str:
    """The checkpoint of the highest step in `output_dir` that every process finds whole.

    A collective. With `save_on_each_node` a kill may leave machines one checkpoint apart.

    Raises:
        CheckpointError: there is none.
    """
    output_dir = Path(args.output_dir)
    found = {path: CHECKPOINT_NAME.fullmatch(path.name) for path in output_dir.glob("*")}
    own = [int(match[1]) for path, match in found.items() if match and not missing_files(path)]
    everywhere = set.intersection(*(set(steps) for steps in gather_object([own])))
    if not everywhere:
        raise CheckpointError(
            f"No whole checkpoint in {args.output_dir}: nothing to resume from. Start without "
            "resume_from_checkpoint, or name the folder of a checkpoint."
        )
    return str(output_dir / f"{PREFIX_CHECKPOINT_DIR}-{max(everywhere)}")


def check_whole(folder: Path, updates_per_iteration: int) -> None:
    """Nothing, if `folder` holds all of a checkpoint from the end of an iteration.

    Raises:
        CheckpointError: it does not.
    """
    missing = missing_files(folder)
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: {', '.join(missing[:_SHOWN])}{more} missing, cut "
            "short or damaged. Was the run killed while it saved? Resume from an earlier one."
        )
    step = read_json(folder / TRAINER_STATE_NAME)["global_step"]
    if step % updates_per_iteration:
        raise CheckpointError(
            f"{folder} was saved at step {step}, inside an iteration of {updates_per_iteration} "
            "updates, and cannot be continued."
        )


def check_same_run(
    folder: Path, saved: Mapping[str, Any], own: Mapping[str, Any], per_device: int
) -> None:
    """Nothing, if a run with the identity `own` may continue that of `saved`.

    The number of processes may differ, if the rollout batch of all of them is the same.
    `per_device` is the size of a micro-batch here, for what the error proposes.

    Raises:
        CheckpointError: names what differs, and what to do.
    """
    # Checkpoints from before there were engines say nothing of it.
    saved = {"optimizer_state": "torch", **saved}
    different = [name for name in own if saved.get(name) != own[name]]
    if "base_fingerprint" in different:
        raise CheckpointError(
            f"{folder} was trained on another base: its checksum is "
            f"{_said(saved.get('base_fingerprint'))}, that of this model "
            f"{own['base_fingerprint']}. Load the same model with the same quantization."
        )
    if not set(different) - {"world_size"}:
        return
    changes = ", ".join(f"{n}: {_said(saved.get(n))} then, {own[n]} now" for n in different)
    advice = "Use the settings of that run, or start anew in another output_dir."
    known = {"batch_size", "num_mini_batches"} <= saved.keys()
    if {"world_size", "batch_size"} <= set(different) and known:
        advice = _batch_advice(saved, own, per_device)
    raise CheckpointError(
        f"{folder} comes from another configuration and cannot be continued ({changes}). {advice}"
    )


def _said(value: Any) -> str:
    return value[:80] if isinstance(value, str) else _brief(value)


def _batch_advice(saved: Mapping[str, Any], own: Mapping[str, Any], per_device: int) -> str:
    """How to make the rollout batch of `saved` on the processes of `own`."""
    batch, ranks, parts = saved["batch_size"], own["world_size"], saved["num_mini_batches"]
    said = f"The number of processes may change, the {batch} episodes of a rollout batch may not"
    if batch % (ranks * parts):
        most = min(batch // parts, _MAX_RANKS)
        fitting = [n for n in range(1, most + 1) if batch % (n * parts) == 0]
        return (
            f"{said}: {ranks} processes cannot share them in {parts} mini-batches. Start "
            f"{', '.join(map(str, fitting))} processes."
        )
    local = batch // ranks
    micro = max(size for size in range(1, min(per_device, local) + 1) if local % size == 0)
    return (
        f"{said}: on {ranks} processes set per_device_train_batch_size={micro} and "
        f"gradient_accumulation_steps={local // micro}."
    )
