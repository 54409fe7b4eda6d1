"""Checkpoints -> models: an SFT model or SFT adapter, a reward model, initial values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from trl_sync.backbone.adapter_files import (
    ADAPTER_CONFIG,
    adapter_config,
    adapter_folder,
    applying,
    is_adapter,
    local_folder,
    lora_config,
    read_tensors,
    reading,
    reward_lora_config,
    score_tensors,
)
from trl_sync.backbone.adapter_patterns import check_patterns
from trl_sync.backbone.export import ADAPTER_WEIGHTS, adapter_state
from trl_sync.backbone.partitioned import loaded_whole
from trl_sync.backbone.quantization import keep_packed_weights
from trl_sync.backbone.roles import POLICY, REFERENCE, VALUE, freeze
from trl_sync.backbone.routing import set_adapter_trainable
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError
from trl_sync.processes import this_process

__all__ = [
    "initialise_value",
    "is_adapter",
    "load_base",
    "load_reward_model",
    "load_shared_backbone",
]


def load_base(
    model_name_or_path: str,
    *,
    quantization_config: BitsAndBytesConfig | None = None,
    auto_class: Any = AutoModelForCausalLM,
    **options: Any,
) -> PreTrainedModel:
    """The model at a hub name or directory, on this process's device, quantized if asked for.

    `options` go to `from_pretrained` (dtype, revision, attn_implementation, ...).

    Raises:
        ConfigError: the quantization does not work on this device.
    """
    if quantization_config is None:
        with loaded_whole():
            return auto_class.from_pretrained(model_name_or_path, **options)
    device = this_process().device
    try:
        with loaded_whole():
            model = auto_class.from_pretrained(
                model_name_or_path,
                quantization_config=quantization_config,
                device_map={"": device},
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"{model_name_or_path} cannot be loaded with {_describe(quantization_config)} on "
            f"{device.type}: {error}. Load it without quantization."
        ) from error
    keep_packed_weights(model)
    _let_go_of_files(model)
    return model


def load_shared_backbone(
    model_name_or_path: str,
    peft_config: LoraConfig | None = None,
    *,
    quantization_config: BitsAndBytesConfig | None = None,
    value_init_path: str | None = None,
    reward_adapter: str | None = None,
    **options: Any,
) -> SharedBackbone:
    """A SharedBackbone from an SFT model, or from an SFT adapter and the base it names.

    Of an SFT adapter the policy starts as a trainable copy, the reference is a frozen copy, and
    the value adapter starts from it too. `value_init_path` names a reward model: its adapter (if
    it is one) becomes the initial value adapter and its score head the initial value head.
    `reward_adapter` names a reward adapter trained on this base, which then scores responses: see
    `SharedBackbone.add_reward_adapter`. `options` go to `from_pretrained` of the base (dtype,
    revision, attn_implementation, ...).

    Raises:
        ConfigError: `peft_config` was given together with an SFT adapter, an adapter cannot be read
            or does not fit its base, its base cannot be loaded, the reward model does not fit the
            base, the quantization does not work on this device, or as `SharedBackbone`.
    """
    folder = adapter_folder(model_name_or_path)
    if folder is None:
        base = load_base(model_name_or_path, quantization_config=quantization_config, **options)
        value_config = _value_lora(value_init_path, base)
        backbone = SharedBackbone(base, peft_config, value_peft_config=value_config)
    else:
        if peft_config is not None:
            raise ConfigError(
                f"{model_name_or_path} is an adapter already, so its own LoRA options hold: pass "
                "no peft_config, or merge the adapter into its base first."
            )
        config = lora_config(folder)
        tensors = read_tensors(folder / ADAPTER_WEIGHTS)
        base = _load_base_of(folder, config, quantization_config=quantization_config, **options)
        value_config = _value_lora(value_init_path, base)
        with applying(folder, config, base):
            backbone = SharedBackbone(
                base, config, value_peft_config=value_config, reference_adapter=True
            )
        for role in (POLICY, REFERENCE):
            _load_lora(backbone, role, tensors)
        if value_init_path is None or adapter_folder(value_init_path) is None:
            # The value adapter is the policy's without the LM head.
            _load_lora(backbone, VALUE, {n: tensors[n] for n in adapter_state(backbone, VALUE)})
    if value_init_path is not None:
        initialise_value(backbone, value_init_path)
    if reward_adapter is not None:
        backbone.add_reward_adapter(reward_adapter)
    set_adapter_trainable(backbone.peft_model, (POLICY, VALUE))
    return backbone


def load_reward_model(
    model_name_or_path: str,
    *,
    quantization_config: BitsAndBytesConfig | None = None,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """A frozen sequence classifier with one label, full or PEFT, in evaluation mode.

    `options` go to `from_pretrained`, of an adapter to that of its base.

    Raises:
        ConfigError: the model has more than one label, or no score head, its adapter cannot be read
            or put on its base, its base cannot be loaded, or the quantization does not work on this
            device.
    """
    folder = adapter_folder(model_name_or_path)
    options = {"num_labels": 1, **options}
    if folder is None:
        _check_score_head(model_name_or_path)
        model = load_base(
            model_name_or_path,
            quantization_config=quantization_config,
            auto_class=AutoModelForSequenceClassification,
            **options,
        )
    else:
        heads = [t for name, t in score_tensors(folder).items() if name.endswith("weight")]
        if heads:
            _check_one_label(model_name_or_path, (*heads[0].shape, 0)[0])
        config = adapter_config(folder)
        if not _has_whole_modules(folder):
            # Then the head is the base's own, if it has one.
            _check_score_head(_base_name(folder, config))
        base = _load_base_of(
            folder,
            config,
            quantization_config=quantization_config,
            auto_class=AutoModelForSequenceClassification,
            **options,
        )
        with applying(folder, config, base):
            model = PeftModel.from_pretrained(base, str(folder))
    return freeze(model)


def initialise_value(backbone: SharedBackbone, reward_model_path: str) -> None:
    """Copies a reward model's score head, and its adapter if it is one, into the value role.

    Raises:
        ConfigError: the head has another hidden size or more than one label.
    """
    folder = adapter_folder(reward_model_path)
    tensors = score_tensors(Path(folder or local_folder(reward_model_path)))
    weight = next((t for name, t in tensors.items() if name.endswith("weight")), None)
    expected = tuple(backbone.value_head.weight.shape)
    if weight is None or tuple(weight.shape) != expected:
        found = None if weight is None else tuple(weight.shape)
        raise ConfigError(
            f"The score head of {reward_model_path} has shape {found}, but this base needs "
            f"{expected} for its value head: use a reward model with one label on the same base."
        )
    bias = next((t for name, t in tensors.items() if name.endswith("bias")), None)
    if bias is not None and tuple(bias.shape) != (1,):
        raise ConfigError(
            f"The score head of {reward_model_path} has a bias of shape {tuple(bias.shape)}, "
            "expected (1,): use a reward model with one label."
        )
    with torch.no_grad():
        backbone.value_head.weight.copy_(weight)
        if bias is not None:
            backbone.value_head.bias.copy_(bias)
    if folder is not None:
        adapter = read_tensors(folder / ADAPTER_WEIGHTS)
        _load_lora(backbone, VALUE, {n: t for n, t in adapter.items() if "lora_" in n})


def _value_lora(reward_model_path: str | None, base: PreTrainedModel) -> LoraConfig | None:
    """The LoRA options of a reward adapter as those of the value adapter; None for other inputs."""
    folder = None if reward_model_path is None else adapter_folder(reward_model_path)
    if folder is None:
        return None
    config = reward_lora_config(folder)
    check_patterns(config, base, folder / ADAPTER_CONFIG)
    return config


def _load_lora(backbone: SharedBackbone, adapter: str, tensors: dict[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in adapter_state(backbone, adapter).items()}
    found = {name: tensor.shape for name, tensor in tensors.items() if "lora_" in name}
    different = sorted(n for n in expected | found if expected.get(n) != found.get(n))
    if different:
        raise ConfigError(
            f"The adapter does not fit this base: {len(different)} tensors differ, for example "
            f"{different[0]}. Was it trained on another base?"
        )
    set_peft_model_state_dict(backbone.peft_model, tensors, adapter_name=adapter)


def _has_whole_modules(folder: Path) -> bool:
    """Whether an adapter holds modules that were trained whole, as a score head is."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return True
    file = folder / ADAPTER_WEIGHTS
    with reading(file), safe_open(file, framework="pt") as tensors:
        return any("lora_" not in name for name in tensors.keys())  # noqa: SIM118 - no dict


def _base_name(folder: Path, config: PeftConfig) -> str:
    name = config.base_model_name_or_path
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"The adapter in {folder} does not say which base it belongs to: its "
            f"base_model_name_or_path is {str(name)[:80]!r}, expected a folder or a hub name."
        )
    return name


def _load_base_of(folder: Path, config: PeftConfig, **options: Any) -> PreTrainedModel:
    name = _base_name(folder, config)
    try:
        return load_base(name, **options)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The adapter in {folder} belongs to the base {name[:200]!r}, which cannot be loaded: "
            f"{str(error)[:300]}. Set base_model_name_or_path in its adapter_config.json."
        ) from error


def _check_score_head(path: str) -> None:
    """Nothing, if the whole model at `path` is a classifier with one label."""
    config = AutoConfig.from_pretrained(path)
    architectures = config.architectures or []
    if not any("SequenceClassification" in name for name in architectures):
        raise ConfigError(
            f"The reward model {path} has no score head: its architectures are {architectures}, "
            "and a new head would give random rewards. Use a sequence classifier with one label."
        )
    _check_one_label(path, config.num_labels)


def _check_one_label(path: str, num_labels: int) -> None:
    if num_labels != 1:
        raise ConfigError(
            f"The reward model {path} has {num_labels} labels. PPO needs one number per "
            "episode: use a model with num_labels=1, or a callable that combines the labels."
        )


@torch.no_grad()
def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copies what is not quantized out of the mapped files it still lies in.

    As long as one tensor lies there, the pages of all that was read and quantized stay in memory.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and getattr(tensor, "quant_state", None) is None:
            tensor.data = tensor.data.clone()


def _describe(config: BitsAndBytesConfig) -> str:
    return str(config.quantization_method())
