"""Language models with a value head: the policy and the value function of PPO in one model.

The auto models of TRL, which removed them together with PPO: same names, arguments, attributes,
outputs and files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import PushToHubMixin

from trl_sync.backbone.checkpointing import (
    disable_checkpointing,
    enable_checkpointing,
    is_checkpointing,
)
from trl_sync.backbone.quantization import keep_packed_weights
from trl_sync.errors import ConfigError
from trl_sync.processes import this_process
from trl_sync.value_head_files import (
    PREFIX,
    check_fits,
    could_be_on_hub,
    read_score_head,
    read_value_head,
    write_value_head,
)
from trl_sync.value_head_loading import (
    check_adapter_kind,
    check_adapters,
    check_model_object,
    hidden_size,
    load_model,
    with_adapter,
)

logger = logging.getLogger(__name__)

_KBIT_OPTIONS = ("use_gradient_checkpointing", "gradient_checkpointing_kwargs")
_WRAPPED = "pretrained_model."


class ValueHead(nn.Module):
    """One number for each token: dropout and a linear layer on the last hidden state.

    `summary_dropout_prob`, from the arguments or else from the model's config, is 0.1 by default.

    Raises:
        ConfigError: the config does not tell the size of the hidden states.
    """

    def __init__(self, config: Any, summary_dropout_prob: float | None = None, **_: Any) -> None:
        super().__init__()
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(config, "summary_dropout_prob", 0.1)
        self.dropout = nn.Dropout(summary_dropout_prob) if summary_dropout_prob else nn.Identity()
        self.summary = nn.Linear(hidden_size(config), 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Values of shape (..., 1), in the precision of the head, which is fp32 unless cast."""
        values: Tensor = self.summary(self.dropout(hidden_states).to(self.summary.weight.dtype))
        return values


class PreTrainedModelWrapper(nn.Module, PushToHubMixin):
    """A transformers or PEFT model with a value head; see its two subclasses.

    `pretrained_model` is the model, `v_head` the head, `is_peft_model` whether the model is PEFT's.
    The state of the module is what is saved: the model's own names without a prefix and
    `v_head.*`; of a PEFT model the head alone. `kwargs` are the options of the value head, see
    `from_pretrained`, which fills in the other arguments. Names, arguments and files are those of
    the classes that TRL has removed.

    Raises:
        ConfigError: an option that a value head does not have, a `v_head_init_strategy` other than
            "normal", a model that is partly offloaded, or one whose config does not tell the size
            of its hidden states.
    """

    transformers_parent_class: ClassVar[Any] = None
    supported_args: ClassVar[tuple[str, ...]] = (
        "summary_dropout_prob",
        "v_head_initializer_range",
        "v_head_init_strategy",
    )
    supported_modules: ClassVar[tuple[str, ...]] = ("v_head",)
    supported_rm_modules: ClassVar[tuple[str, ...]] = ("score",)
    supported_pretrained_model_architectures: ClassVar[tuple[type, ...]] = (
        *(PreTrainedModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM),
    )
    lm_head_namings: ClassVar[tuple[str, ...]] = ("lm_head", "embed_out", "output_projection")

    def __init__(
        self,
        pretrained_model: Any = None,
        score_module: nn.Module | None = None,
        supports_rm_adapter: bool = False,
        rm_adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(kwargs) - set(self.supported_args))
        if unknown:
            raise ConfigError(
                f"{', '.join(unknown)} is no argument of a value head; it has "
                f"{', '.join(self.supported_args)}."
            )
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.is_peft_model = isinstance(pretrained_model, PeftModel)
        self.is_loaded_in_8bit = bool(getattr(pretrained_model, "is_loaded_in_8bit", False))
        self.is_loaded_in_4bit = bool(getattr(pretrained_model, "is_loaded_in_4bit", False))
        self.supports_rm_adapter = supports_rm_adapter
        self.rm_adapter_name = rm_adapter_name
        self.policy_adapter_name = (
            pretrained_model.active_adapter if self.is_peft_model else "default"
        )
        if score_module is not None:
            self.score = score_module
        self.v_head = ValueHead(self.config, **kwargs)
        self._init_weights(**kwargs)
        self._place_value_head()
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.register_load_state_dict_post_hook(_forgive_missing_base)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """A model with a value head, from a path, a hub name, an adapter's folder, or a model.

        - `peft_config`: adds this adapter; not for a folder that holds an adapter.
        - `is_trainable`: an adapter that is loaded can be trained further.
        - `reward_adapter`, `reward_adapter_name`: an adapter with a score head for
          `compute_reward_score`; PEFT models only.
        - `summary_dropout_prob`, `v_head_init_strategy` ("normal": weights drawn with standard
          deviation `v_head_initializer_range`, bias 0): the value head.
        - `use_gradient_checkpointing`, `gradient_checkpointing_kwargs`: how a quantized model is
          prepared for `peft_config`.

        Everything else goes to transformers' `from_pretrained`. A saved value head is loaded; where
        there is none a new one is drawn.

        Raises:
            ConfigError: arguments that do not go together or are of the wrong type, an adapter
                that cannot be read or does not fit, or as the class itself.
            CheckpointError: the saved value head cannot be read, does not fit the model, or
                contradicts another one in the folder.
        """
        peft_config = kwargs.pop("peft_config", None)
        reward_adapter = kwargs.pop("reward_adapter", None)
        reward_adapter_name = kwargs.pop("reward_adapter_name", "reward_adapter")
        is_trainable = kwargs.pop("is_trainable", False)
        head_options = {key: kwargs.pop(key) for key in cls.supported_args if key in kwargs}
        kbit_options = {key: kwargs.pop(key) for key in _KBIT_OPTIONS if key in kwargs}
        check_adapters(peft_config, reward_adapter)
        source = pretrained_model_name_or_path
        inner = cls._model_without_head(source, model_args, kwargs, peft_config, is_trainable)
        # Before the first forward pass.
        keep_packed_weights(inner)
        if peft_config is not None:
            inner = with_adapter(inner, peft_config, kbit_options)
        elif kbit_options:
            raise ConfigError(f"{', '.join(kbit_options)} has no effect without peft_config.")
        check_adapter_kind(inner, reward_adapter)
        if reward_adapter is not None:
            head_options |= {
                "score_module": cls.add_and_load_reward_modeling_adapter(
                    inner, reward_adapter, reward_adapter_name, token=kwargs.get("token")
                ),
                "supports_rm_adapter": True,
                "rm_adapter_name": reward_adapter_name,
            }
        model = cls(inner, **head_options)
        model.current_device = cls._get_current_device()
        if isinstance(source, (str, Path)):
            model._load_value_head(str(source), kwargs)
        return model

    @classmethod
    def _model_without_head(
        cls,
        source: Any,
        model_args: tuple[Any, ...],
        options: dict[str, Any],
        peft_config: Any,
        is_trainable: bool,
    ) -> Any:
        if isinstance(source, (str, Path)):
            return load_model(
                cls.transformers_parent_class,
                str(source),
                model_args,
                options,
                peft_config,
                is_trainable=is_trainable,
                device=cls._get_current_device(),
            )
        if isinstance(source, cls.supported_pretrained_model_architectures):
            check_model_object(source, peft_config, model_args, options)
            return source
        raise ConfigError(
            "pretrained_model_name_or_path must be a path, a hub name or a transformers or PEFT "
            f"model, got {type(source).__name__}."
        )

    @classmethod
    def add_and_load_reward_modeling_adapter(
        cls,
        pretrained_model: Any,
        adapter_model_id: str,
        adapter_name: str = "reward_model_adapter",
        token: Any = None,
    ) -> nn.Module:
        """Adds a frozen reward adapter to a PEFT model; returns its score head, H -> labels.

        Raises:
            ConfigError: the adapter is not there or has no score head.
            CheckpointError: its weights cannot be read.
        """
        state = read_score_head(adapter_model_id, {"token": token})
        pretrained_model.load_adapter(adapter_model_id, adapter_name, is_trainable=False)
        num_labels, hidden_size = state["weight"].shape
        score = nn.Linear(hidden_size, num_labels, bias="bias" in state)
        score.load_state_dict(state)
        score.to(pretrained_model.device, pretrained_model.dtype)
        return score.requires_grad_(False)

    @classmethod
    def _get_current_device(cls) -> Any:
        """The index of this process's GPU, or "cpu"."""
        device = this_process().device
        return device.type if device.type == "cpu" else device.index or 0

    def _init_weights(self, **kwargs: Any) -> None:
        strategy = kwargs.get("v_head_init_strategy")
        if strategy is None:
            return
        if strategy != "normal":
            raise ConfigError(f"v_head_init_strategy must be 'normal' or unset, got {strategy!r}.")
        deviation = kwargs.get("v_head_initializer_range", 0.2)
        nn.init.normal_(self.v_head.summary.weight, std=deviation)
        nn.init.zeros_(self.v_head.summary.bias)

    def _place_value_head(self) -> None:
        """On the device of the LM head; a model that is spread over devices says so."""
        devices = set(getattr(self.pretrained_model, "hf_device_map", {}).values())
        self.is_sequential_parallel = len(devices) > 1
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ConfigError(
                "The model is partly offloaded to CPU or disk, which models with a value head do "
                "not support: choose a device_map of GPUs alone, or quantize the model."
            )
        embeddings = self.pretrained_model.get_output_embeddings()
        if embeddings is not None and embeddings.weight.device.type != "meta":
            self.v_head.to(embeddings.weight.device)

    def _load_value_head(self, source: str, options: dict[str, Any]) -> None:
        state = read_value_head(source, options)
        if state is None:
            missing = "No value head was saved with %s"
            if could_be_on_hub(source, options):
                missing = "A value head of %s could not be looked up, the hub being out of reach"
            logger.warning(
                missing + ", so a new one was drawn. This is as it should be unless PPO training "
                "is resumed.",
                source,
            )
            return
        check_fits(state, self.v_head.state_dict(), source)
        self.v_head.load_state_dict(state)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """`(logits, loss, value)`: (B, T, V) in fp32, None without `labels`, and (B, T).

        Values are in the precision of the head, fp32 unless cast. Of an encoder-decoder T are the
        tokens of the decoder. With `return_past_key_values` the cache is the fourth.
        """
        kwargs["output_hidden_states"] = True
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = self._last_hidden_state(output).to(self.v_head.summary.weight.device)
        value = self.v_head(hidden).squeeze(-1)
        logits = output.logits.float()
        if self.is_sequential_parallel:
            logits = logits.to(value.device)
        results = (logits, output.loss, value)
        return (*results, output.past_key_values) if return_past_key_values else results

    def _last_hidden_state(self, output: Any) -> Tensor:
        raise NotImplementedError

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The `generate` of the wrapped model, with its arguments and results."""
        return self.pretrained_model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers recompute their activations."""
        return is_checkpointing(self.pretrained_model)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Layers recompute their activations; the arguments are those of torch's `checkpoint`."""
        enable_checkpointing(self.pretrained_model, gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Layers keep their activations."""
        disable_checkpointing(self.pretrained_model)

    def enable_input_require_grads(self) -> None:
        self.pretrained_model.enable_input_require_grads()

    def compute_reward_score(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Scores (B, T, labels) under the reward adapter, without gradients.

        What is trainable, the mode and the active adapter are as before afterwards.

        Raises:
            ConfigError: there is no reward adapter.
        """
        if not self.supports_rm_adapter:
            raise ConfigError("This model has no reward adapter: pass reward_adapter to load one.")
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        with self._reward_adapter_active(), torch.no_grad():
            output = self.pretrained_model(
                input_ids=input_ids, attention_mask=attention_mask, **kwargs
            )
            hidden = self._last_hidden_state(output)
            score: Any = self.score
            scores: Tensor = score(hidden.to(score.weight.dtype))
        return scores

    @contextmanager
    def _reward_adapter_active(self) -> Iterator[None]:
        model = self.pretrained_model
        # Changing the active adapter also changes what is trainable.
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        modes = {name: module.training for name, module in model.named_modules()}
        model.set_adapter(self.rm_adapter_name)
        model.eval()
        try:
            yield
        finally:
            model.set_adapter(self.policy_adapter_name)
            for name, module in model.named_modules():
                module.training = modes[name]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What is saved: the model's own names and `v_head.*`; of a PEFT model the head alone."""
        if args:  # the old positional form of nn.Module
            kwargs |= dict(zip(("destination", "prefix", "keep_vars"), args, strict=False))
        prefix = kwargs.pop("prefix", "")
        destination = kwargs.pop("destination", None)
        if destination is None:
            destination = {}
        if not self.is_peft_model:
            destination.update(self.pretrained_model.state_dict(prefix=prefix, **kwargs))
        destination.update(self.v_head.state_dict(prefix=f"{prefix}{PREFIX}", **kwargs))
        return destination

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves the model with its value head so that `from_pretrained` gives both back.

        Plain transformers (or PEFT) loads the same folder as a model without a value head. Of a
        PEFT or quantized model the head is `v_head.safetensors`; `safe_serialization=False` writes
        the `pytorch_model.bin` that TRL up to 0.11 reads, too. Further arguments go to the
        `save_pretrained` of the wrapped model.
        """
        given = kwargs.pop("state_dict", None)
        state = self.state_dict() if given is None else given
        state = {name.removeprefix(_WRAPPED): tensor for name, tensor in state.items()}
        quantizer = getattr(self.pretrained_model, "hf_quantizer", None)
        if (self.is_peft_model or quantizer is not None) and kwargs.get("is_main_process", True):
            head = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
            for_trl = not kwargs.get("safe_serialization", True)
            write_value_head(Path(save_directory), head, for_trl=for_trl)
        if not self.is_peft_model:
            kwargs["state_dict"] = state
        return self.pretrained_model.save_pretrained(save_directory, *args, **kwargs)


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A causal language model with a value head.

    Raises:
        ConfigError: the model is an encoder-decoder, or as `PreTrainedModelWrapper`.
    """

    transformers_parent_class = AutoModelForCausalLM

    def __init__(self, pretrained_model: Any, **kwargs: Any) -> None:
        if pretrained_model.config.is_encoder_decoder:
            raise ConfigError(
                f"{type(pretrained_model).__name__} is an encoder-decoder model: use "
                "AutoModelForSeq2SeqLMWithValueHead."
            )
        super().__init__(pretrained_model, **kwargs)

    def _last_hidden_state(self, output: Any) -> Tensor:
        hidden: Tensor = output.hidden_states[-1]
        return hidden


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder model with a value head on the decoder.

    Raises:
        ConfigError: the model has no LM head, or no encoder, or as `PreTrainedModelWrapper`.
    """

    transformers_parent_class = AutoModelForSeq2SeqLM

    def __init__(self, pretrained_model: Any, **kwargs: Any) -> None:
        if not pretrained_model.config.is_encoder_decoder:
            raise ConfigError(
                f"{type(pretrained_model).__name__} has no encoder: use "
                "AutoModelForCausalLMWithValueHead."
            )
        super().__init__(pretrained_model, **kwargs)
        self.is_encoder_decoder = True
        names = [name for name, _ in pretrained_model.named_modules()]
        if not any(part in name for name in names for part in self.lm_head_namings):
            raise ConfigError(
                f"{type(pretrained_model).__name__} has no LM head: pass a model for generation, "
                "such as T5ForConditionalGeneration."
            )

    def _last_hidden_state(self, output: Any) -> Tensor:
        hidden: Tensor = output.decoder_hidden_states[-1]
        return hidden


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets the module load the state that it saves, whose names lack `pretrained_model.`."""
    own = tuple(f"{prefix}{name}" for name in (PREFIX, "score.", _WRAPPED))
    for name in [name for name in state if name.startswith(prefix)]:
        if not name.startswith(own):
            state[f"{prefix}{_WRAPPED}{name.removeprefix(prefix)}"] = state.pop(name)


def _forgive_missing_base(module: Any, incompatible: Any) -> None:
    """The state of a PEFT model is its value head, so the rest is not missing."""
    if module.is_peft_model:
        kept = [name for name in incompatible.missing_keys if PREFIX in name]
        incompatible.missing_keys[:] = kept
