"""A recipe's flags, and what they name: the policy, the reward and the prompts."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
from trl import ScriptArguments as TrlScriptArguments

from trl_sync import (
    ConfigError,
    PPOConfig,
    SharedBackbone,
    load_reward_model,
    load_shared_backbone,
)
from trl_sync.backbone.loading import is_adapter
from trl_sync.backbone.quantization import nf4_config


@dataclass
class ScriptArguments:
    """Data, reward, precision of the base, and the audit."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the hub with a `prompt` column."}
    )
    dataset_path: str | None = field(
        default=None, metadata={"help": "Local dataset: json, jsonl, csv, parquet, or a folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: 5%% of the train split."}
    )
    reward_function: str | None = field(
        default=None,
        metadata={"help": "Reward from Python, as file.py:name, instead of --reward_model_path."},
    )
    reward_load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the reward model in 4-bit NF4."}
    )
    no_quantization: bool = field(
        default=False, metadata={"help": "Keep the base in --dtype instead of 4-bit NF4."}
    )
    audit: bool = field(
        default=True, metadata={"help": "Check after every update that all ranks agree."}
    )


class _HelpFormatter(RawDescriptionHelpFormatter):
    """The description as it is written, and each default behind its flag."""

    def _get_help_string(self, action: Any) -> str:
        shown = action.default not in (None, "", [], SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if shown else "")

    def _format_action_invocation(self, action: Any) -> str:
        # Without the second spelling of each flag, with dashes.
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"


def make_parser(description: str) -> TrlParser:
    """The flags of a recipe in groups: the recipe's own, PPO, model, and those of every Trainer."""
    classes = (ScriptArguments, PPOConfig, ModelConfig)
    parser = TrlParser(
        classes,
        description=description,
        usage="accelerate launch recipes/%(prog)s [--config FILE.yaml] [--flag value ...]",
        formatter_class=_HelpFormatter,
    )
    trainer = {f.name for f in fields(TrainingArguments)}
    owners = {
        "data, reward and precision": {f.name for f in fields(ScriptArguments)},
        "PPO": {f.name for f in fields(PPOConfig)} - trainer,
        "model, LoRA and quantization": {f.name for f in fields(ModelConfig)},
        "training, as in every Trainer": trainer,
    }
    options = parser._optionals._group_actions
    for title, names in owners.items():
        group = parser.add_argument_group(title)
        group._group_actions += [action for action in options if action.dest in names]
    for action in options:
        if (action.help or "").startswith(("Computed:", "Read by scripts only: path of the SFT")):
            action.help = SUPPRESS
    options[:] = [action for action in options if action.dest == "help"]
    return parser


def trainer_parser(
    classes: tuple[type, ...], description: str, embedded_settings: dict[str, Any]
) -> TrlParser:
    """The flags of a recipe for one of TRL's trainers; without a model, the embedded settings."""
    parser = TrlParser(
        classes,
        description=description,
        usage="accelerate launch recipes/%(prog)s [--config FILE.yaml] [--flag value ...]",
        formatter_class=_HelpFormatter,
    )
    model_args, *_ = TrlParser(ModelConfig, add_help=False).parse_args_and_config(
        return_remaining_strings=True
    )
    if model_args.model_name_or_path is None:
        parser.set_defaults_with_config(**embedded_settings)
    # On CPUs several processes know of one another only with use_cpu: without it each is alone.
    on_cpu = not torch.accelerator.is_available()
    parser.set_defaults(use_cpu=on_cpu, bf16=not on_cpu)
    return parser


def load_causal_model(path: str, model_args: ModelConfig) -> PreTrainedModel:
    """The language model at `path`, in --dtype and the quantization that the flags name."""
    return AutoModelForCausalLM.from_pretrained(
        path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
    )


def load_train_split(script: TrlScriptArguments) -> Dataset:
    """The split to train on: of a dataset on the hub, or of a local file or folder."""
    if script.dataset_name is None:
        raise ConfigError("No data: give --dataset_name, a dataset on the hub or a local path.")
    return load_named_split(script.dataset_name, script.dataset_config, script.dataset_train_split)


def load_named_split(name: str, config: str | None, split: str) -> Dataset:
    """A split of a dataset on the hub, or of a local file or folder."""
    data = load_local(Path(name)) if Path(name).exists() else load_dataset(name, config)
    splits = data if isinstance(data, DatasetDict) else DatasetDict(train=data)
    if split not in splits:
        raise ConfigError(f"The dataset has no split {split!r}, only {list(splits)}.")
    return splits[split]


def load_policy(path: str, script: ScriptArguments, model_args: ModelConfig) -> SharedBackbone:
    """The base, in NF4 unless told otherwise, with LoRA on every linear layer by default."""
    if script.no_quantization and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ConfigError("--no_quantization and --load_in_4bit/8bit exclude each other.")
    if not (script.no_quantization or model_args.load_in_4bit or model_args.load_in_8bit):
        model_args.load_in_4bit, model_args.use_bnb_nested_quant = True, True
    if is_adapter(path):
        peft_config = None  # an SFT adapter brings its own
    else:
        model_args.use_peft = True
        model_args.lora_target_modules = model_args.lora_target_modules or "all-linear"
        peft_config = get_peft_config(model_args)
    return load_shared_backbone(
        path,
        peft_config,
        quantization_config=get_quantization_config(model_args),
        dtype=model_args.dtype,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
    )


def load_reward(script: ScriptArguments, config: PPOConfig, embedded: Any) -> Any:
    """The function, else the reward model, else the one of the embedded default."""
    if script.reward_function is not None:
        return load_function(script.reward_function)
    path = config.reward_model_path
    if path == PPOConfig.reward_model_path:  # TRL's default, which is not a reward model
        if embedded is None:
            return None
        path = str(embedded.reward_model_path)
    return load_reward_model(
        path, quantization_config=nf4_config() if script.reward_load_in_4bit else None
    )


def load_function(place: str) -> Callable[..., Any]:
    """The function of a Python file, given as file.py:name."""
    file, _, name = place.partition(":")
    if not Path(file).is_file() or not name:
        raise ConfigError(
            f"--reward_function {place}: expected an existing file and a function in it, as "
            "rewards.py:my_reward."
        )
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ConfigError(f"--reward_function {place}: {file} has no function {name}.")
    return getattr(module, name)


def load_prompts(
    script: ScriptArguments, config: PPOConfig, embedded: Any
) -> tuple[Dataset, Dataset]:
    """Prompts to train and to evaluate on."""
    if script.dataset_path is not None:
        data = load_local(Path(script.dataset_path))
    elif script.dataset_name is not None:
        data = load_dataset(script.dataset_name, script.dataset_config)
    elif embedded is not None:
        return embedded.train_prompts, embedded.eval_prompts
    else:
        raise ConfigError("No prompts: give --dataset_name or --dataset_path.")
    splits = data if isinstance(data, DatasetDict) else DatasetDict(train=data)
    for split in (script.dataset_train_split, script.dataset_test_split):
        if split is not None and split not in splits:
            raise ConfigError(f"The dataset has no split {split!r}, only {list(splits)}.")
    train = splits[script.dataset_train_split]
    if script.dataset_test_split is not None:
        return train, splits[script.dataset_test_split]
    if len(train) < 2:
        raise ConfigError(f"The dataset has {len(train)} prompts: too few to hold any out.")
    held_out = train.train_test_split(test_size=max(1, len(train) // 20), seed=config.seed)
    return held_out["train"], held_out["test"]


def load_local(path: Path) -> Dataset | DatasetDict:
    """A folder written by save_to_disk or with data files in it, or a file by its ending."""
    if path.is_dir():
        with _reading(path):
            if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
                return load_dataset(str(path))
            _check_saved(path)
            return load_from_disk(str(path))
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if not path.is_file() or path.suffix not in kinds:
        raise ConfigError(
            f"--dataset_path {path}: expected a folder of data or a file ending in "
            f"{', '.join(kinds)}."
        )
    with _reading(path):
        return load_dataset(kinds[path.suffix], data_files=str(path))


def _check_saved(folder: Path) -> None:
    """Nothing, if the folder of save_to_disk names only what lies in it.

    Where its files lie, `datasets` writes others when rows are tokenized.
    """
    splits = folder / "dataset_dict.json"
    names = json.loads(splits.read_text())["splits"] if splits.is_file() else []
    for state in (folder / "state.json", *folder.glob("*/state.json")):
        if state.is_file():
            names += [file["filename"] for file in json.loads(state.read_text())["_data_files"]]
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise ConfigError(
                f"The dataset {folder} names {name[:80]!r}, expected a name of what lies in it: "
                "write it again with save_to_disk."
            )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Names the dataset that cannot be read, for whichever of many reasons."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of datasets, Arrow, pandas, json and the file system
        cause = error.__cause__ or error
        raise ConfigError(
            f"The dataset {path} cannot be read ({type(cause).__name__}: {str(cause)[:300]}): "
            "repair the file, or write it again."
        ) from error


def resume_choice(config: PPOConfig) -> str | bool | None:
    choice = config.resume_from_checkpoint
    return choice.lower() == "true" if choice and choice.lower() in ("true", "false") else choice
