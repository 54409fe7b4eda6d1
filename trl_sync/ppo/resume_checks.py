"""Which checkpoints can be continued: whole ones, of the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_sync.errors import CheckpointError
from trl_sync.ppo.config import PPOConfig
from trl_sync.ppo.staged_save import CHECKPOINT_NAME

STATE_FILE = "ppo_state.json"
# People edit text; a state in it that is cut short is noticed on reading. Nobody reads the pickled
# arguments, which some delete before they pass a checkpoint on.
_TEXT = (".json", ".md", ".txt", ".jinja", ".py")


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
    """What `folder` lacks of all that resuming needs: files that are not there or cut short."""
    saved = read_json(folder / STATE_FILE)
    if "sizes" in saved:
        missing = [name for name, size in saved["sizes"].items() if _size(folder / name) != size]
    else:
        # Written before sizes were recorded.
        names = rng_files(int(saved.get("world_size", 1)))
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
    states = {STATE_FILE: saved, TRAINER_STATE_NAME: read_json(folder / TRAINER_STATE_NAME)}
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
    """The content of `file`; nothing if it does not exist or is cut short."""
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return content


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
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: {', '.join(missing)} missing or cut short. "
            "Was the run killed while it saved?"
        )
    step = json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"]
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
            f"{saved.get('base_fingerprint')}, that of this model {own['base_fingerprint']}. "
            "Load the same model with the same quantization."
        )
    if not set(different) - {"world_size"}:
        return
    changes = ", ".join(f"{n}: {saved.get(n)} then, {own[n]} now" for n in different)
    advice = "Use the settings of that run, or start anew in another output_dir."
    if {"world_size", "batch_size"} <= set(different):
        advice = _batch_advice(saved, own, per_device)
    raise CheckpointError(
        f"{folder} comes from another configuration and cannot be continued ({changes}). {advice}"
    )


def _batch_advice(saved: Mapping[str, Any], own: Mapping[str, Any], per_device: int) -> str:
    """How to make the rollout batch of `saved` on the processes of `own`."""
    batch, ranks, parts = saved["batch_size"], own["world_size"], saved["num_mini_batches"]
    said = f"The number of processes may change, the {batch} episodes of a rollout batch may not"
    if batch % (ranks * parts):
        fitting = [n for n in range(1, batch // parts + 1) if batch % (n * parts) == 0]
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
