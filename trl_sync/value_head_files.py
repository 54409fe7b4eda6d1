"""Where the weights of a value head stand in a saved model, and of the score head of an adapter.

A full model holds the value head in its weight files, under `v_head.`. A PEFT model is saved as its
adapter, and a quantized one without foreign tensors, so there the value head has a file of its own:
`v_head.safetensors`. TRL reads and writes `pytorch_model.bin`, a pickle.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trl_sync.errors import CheckpointError, ConfigError

PREFIX = "v_head."
OWN_FILE = "v_head.safetensors"
TRL_FILE = "pytorch_model.bin"
_WEIGHT_FILES = ("model.safetensors", TRL_FILE)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_ABSENT: tuple[type[Exception], ...] = (
    *(EntryNotFoundError, LocalEntryNotFoundError),
    *(HFValidationError, RepositoryNotFoundError),
)
_LONGEST_NAME = 255
# The arguments of from_pretrained that say where on the hub a file lies.
_HUB_OPTIONS = ("token", "revision", "cache_dir", "local_files_only", "subfolder")


def write_value_head(folder: Path, tensors: dict[str, Tensor], *, for_trl: bool = False) -> None:
    """Writes `v_head.safetensors`, and `for_trl` its `pytorch_model.bin` with the same tensors.

    A `pytorch_model.bin` of an earlier save does not stay beside a newer head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, folder / OWN_FILE, metadata={"format": "pt"})
    if for_trl:
        torch.save(on_cpu, folder / TRL_FILE)
    else:
        (folder / TRL_FILE).unlink(missing_ok=True)


def read_value_head(source: str, hub_options: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of the value head that were saved in that folder or repository, or None.

    Names come without `v_head.`. Shards without a tensor of the value head are not read.

    Raises:
        CheckpointError: two files hold value heads that differ, or one cannot be read.
    """
    own = find_file(source, OWN_FILE, hub_options)
    if own is None:
        for name in _WEIGHT_FILES:
            files = _whole_or_shards(source, name, hub_options)
            if files:
                return _value_head(files) or None
        return None
    state = _value_head([own])
    of_trl = find_file(source, TRL_FILE, hub_options)
    if of_trl is not None and not _equal(state, _value_head([of_trl])):
        raise CheckpointError(
            f"{source} holds two value heads that differ, in {OWN_FILE} and in {TRL_FILE}: delete "
            "the file that is out of date."
        )
    return state


def read_score_head(adapter: str, hub_options: dict[str, Any]) -> dict[str, Tensor]:
    """The `score` tensors of a reward adapter, as a state of `nn.Linear`.

    Raises:
        ConfigError: there is no adapter, it cannot be read, or it has no score head.
    """
    files = (find_file(adapter, name, hub_options) for name in _ADAPTER_FILES)
    file = next((file for file in files if file is not None), None)
    if file is None:
        raise ConfigError(
            f"reward_adapter={adapter!r} holds none of {', '.join(_ADAPTER_FILES)}: pass the "
            "folder or hub name of an adapter of a sequence classifier."
        )
    tensors = _tensors(file, lambda name: ".score." in name)
    if not any(name.endswith(".weight") for name in tensors):
        raise ConfigError(
            f"The adapter {adapter!r} has no score head: train it as a sequence classifier "
            "(task_type='SEQ_CLS'), which saves `score` beside the adapter."
        )
    return {name.rsplit(".", 1)[-1]: tensor for name, tensor in tensors.items()}


def check_fits(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> None:
    """Nothing, if a saved value head has the tensors of a model's own, in their shapes.

    Raises:
        CheckpointError: it has not.
    """
    found, needed = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (state, wanted)
    )
    if found != needed:
        raise CheckpointError(
            f"The value head saved in {source} does not fit this model: it has {_shapes(found)}, "
            f"and the model needs {_shapes(needed)}. Load it with the model it was trained on."
        )


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "no tensors"


def find_file(source: str, name: str, hub_options: dict[str, Any]) -> Path | None:
    """That file of a local folder or of a hub repository; None if it is not there."""
    folder = Path(source)
    if folder.is_dir():
        file = folder / str(hub_options.get("subfolder") or "") / name
        return file if file.is_file() else None
    options = {key: value for key, value in hub_options.items() if key in _HUB_OPTIONS}
    try:
        return Path(hf_hub_download(source, name, **options))
    except _ABSENT:
        return None


def could_be_on_hub(source: str, hub_options: dict[str, Any]) -> bool:
    """Whether a repository may hold a value head that was not found because nobody answered.

    The cache remembers which files the hub did not have when it was last asked.
    """
    if Path(source).is_dir():
        return False
    options = {key: hub_options.get(key) for key in ("cache_dir", "revision")}
    subfolder = hub_options.get("subfolder")
    name = f"{subfolder}/{OWN_FILE}" if subfolder else OWN_FILE
    return try_to_load_from_cache(source, name, **options) is None


def _whole_or_shards(source: str, name: str, hub_options: dict[str, Any]) -> list[Path]:
    """That weight file, or those of its shards that hold the value head."""
    whole = find_file(source, name, hub_options)
    if whole is not None:
        return [whole]
    index = find_file(source, f"{name}.index.json", hub_options)
    if index is None:
        return []
    shards = sorted({file for tensor, file in _weight_map(index).items() if PREFIX in tensor})
    files = [find_file(source, shard, hub_options) for shard in shards]
    return [file for file in files if file is not None]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file beside the index."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(_unreadable(index, error)) from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        raise CheckpointError(_unreadable(index, "it has no weight_map from tensors to files"))
    for file in shards.values():
        plain = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not plain or len(file) > _LONGEST_NAME:
            text = f"its weight_map names {file!r:.80}, expected a file beside it"
            raise CheckpointError(_unreadable(index, text))
    return shards


def _unreadable(file: Path, reason: object) -> str:
    return (
        f"{file} cannot be read: {str(reason)[:300]}. Copy the file again from where it was "
        "saved, or take an earlier checkpoint."
    )


def _value_head(files: list[Path]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _tensors(file, lambda name: PREFIX in name).items():
            state[name.split(PREFIX, 1)[1]] = tensor
    return state


def _tensors(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        return _read(file, wanted)
    except Exception as error:  # each kind of damage has its own, of torch, pickle or safetensors
        # Of torch.load the first sentence only: others advise to read it with pickle, which may run
        # programs.
        reason = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        raise CheckpointError(_unreadable(file, reason)) from error


def _read(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            names: Iterable[str] = opened.keys()
            return {name: opened.get_tensor(name) for name in names if wanted(name)}
    # Only the zip format can be mapped into memory instead of read as a whole.
    mapped = zipfile.is_zipfile(file)
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise TypeError("it holds no state of a model, names and their tensors")
    found = {name: tensor for name, tensor in state.items() if wanted(name)}
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    return found


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
