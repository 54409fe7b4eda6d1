"""SeparateModels: policy, value model and reference as models of their own, as in TRL."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from trl_sync.backbone.adapter_roles import copy_adapter, reference_adapter, starts_as_nothing
from trl_sync.backbone.checkpointing import (
    OldCheckpointingNames,
    checkpointed_layers,
    disable_checkpointing,
    enable_checkpointing,
    is_checkpointing,
)
from trl_sync.backbone.fingerprint import base_tensors
from trl_sync.backbone.generation import continue_prompts, evaluation_mode
from trl_sync.backbone.logprob import (
    CausalHead,
    chunked_token_statistics,
    knows_head,
    token_statistics,
)
from trl_sync.backbone.modes import set_training
from trl_sync.backbone.partitioned import make_whole
from trl_sync.backbone.passes import ResponseTokens, model_inputs, trunk_of
from trl_sync.backbone.quantization import check_not_repacked, keep_packed_weights
from trl_sync.backbone.roles import POLICY, REFERENCE, VALUE, Role, RoleState, freeze
from trl_sync.backbone.scalar_head import find_scalar_head, without_adapters
from trl_sync.backbone.separate_checks import (
    check_adapter_names,
    check_disjoint,
    check_policy,
    check_reference,
    check_value_model,
)
from trl_sync.errors import ConfigError
from trl_sync.quantization_state import quantization_tensors

RoleOutputs = dict[str, dict[str, Tensor]]

logger = logging.get_logger(__name__)


class SeparateModels(OldCheckpointingNames, nn.Module):
    """A policy, a value model and a reference, each full, PEFT or quantized.

    | role | model | trained |
    |---|---|---|
    | policy | `policy`: a causal LM | what of it requires gradients |
    | value | `value_model`: one number a token, by a `score` head or a `v_head` | likewise |
    | reference | `ref_model`; without it the policy as it was in the beginning | no |

    Without `ref_model` the reference is, for a plain causal LM, a frozen copy of it; with
    `peft_config`, the policy without its new adapter; for a PEFT model, the adapter
    `ref_adapter_name` or else a frozen copy of its active adapter.

    All of it stays in evaluation mode: dropout never runs, but for LoRA's own in `train()`.

    Raises:
        ConfigError: models that cannot play their roles; the message names the model and says what
            to pass instead.
    """

    # Whether all roles of a pass go through the model as one batch.
    stacks_roles = False

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        value_model: nn.Module,
        ref_model: nn.Module | None = None,
        peft_config: PeftConfig | None = None,
        *,
        model_adapter_name: str | None = None,
        ref_adapter_name: str | None = None,
        logprob_chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_policy(policy, peft_config, has_reference=ref_model is not None)
        check_value_model(value_model)
        check_reference(ref_model)
        check_adapter_names(policy, peft_config, model_adapter_name, ref_adapter_name)
        check_disjoint(policy, value_model, ref_model)
        for model in (policy, value_model):
            check_not_repacked(model)
            make_whole(model)
        if ref_model is not None:
            make_whole(ref_model)
        self.logprob_chunk_bytes = logprob_chunk_bytes
        self._reference_adapter: str | None = None
        if ref_model is None and not isinstance(policy, PeftModel) and peft_config is None:
            ref_model = copy.deepcopy(policy)
        if isinstance(policy, PeftModel):
            if model_adapter_name not in (None, policy.active_adapter):
                policy.set_adapter(model_adapter_name)
            if ref_model is None:
                self._reference_adapter = ref_adapter_name or copy_adapter(policy)
        elif peft_config is not None:
            name = model_adapter_name or "default"
            policy = get_peft_model(policy, copy.deepcopy(peft_config), adapter_name=name)
            if ref_model is None and not starts_as_nothing(peft_config):
                self._reference_adapter = copy_adapter(policy)
        self.policy = policy
        self.value_model = value_model
        self.ref_model = None if ref_model is None else freeze(ref_model)
        for model in (policy, value_model, ref_model):
            if model is not None:
                keep_packed_weights(model)
        _freeze_unused_head(value_model)
        self.roles = {
            POLICY: Role(name=POLICY, adapter=_active_adapter(policy), trainable=True),
            VALUE: Role(name=VALUE, adapter=_active_adapter(value_model), trainable=True),
            REFERENCE: Role(name=REFERENCE, adapter=self._reference_adapter, trainable=False),
        }
        self.train(False)

    @property
    def causal_model(self) -> PreTrainedModel:
        """The policy's causal LM; adapters sit in its layers."""
        return without_adapters(self.policy)

    @property
    def config(self) -> Any:
        return self.causal_model.config

    @property
    def is_gradient_checkpointing(self) -> bool:
        return is_checkpointing(self.causal_model)

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.causal_model, "_no_split_modules", None)

    def train(self, mode: bool = True) -> SeparateModels:
        """Training mode for LoRA dropout only; every model stays in evaluation mode.

        The layers that decide on gradient checkpointing by their own flag get it; what they
        contain does not.
        """
        set_training(self, self._modules_that_train(), mode)
        return self

    def _modules_that_train(self) -> Iterator[nn.Module]:
        yield self
        for model in (self.policy, self.value_model):
            yield from checkpointed_layers(model)
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    yield from module.lora_dropout.modules()

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Recompute the activations of policy and value model in backward."""
        options = {"use_reentrant": False} | dict(activation_checkpointing_kwargs or {})
        for model in (self.causal_model, _transformers_model(self.value_model)):
            if not getattr(model, "supports_gradient_checkpointing", False):
                logger.warning(
                    f"{type(model).__name__} has no gradient checkpointing: its activations stay."
                )
                continue
            enable_checkpointing(model, options, **kwargs)
            if options["use_reentrant"]:
                # The reentrant kind needs a gradient at its input, which frozen layers lack.
                model.enable_input_require_grads()
            else:
                model.disable_input_require_grads()
        self.train(self.training)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations instead of recomputing them."""
        for model in (self.causal_model, _transformers_model(self.value_model)):
            disable_checkpointing(model)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B T"],
        response_mask: Bool[Tensor, "B R"],
        roles: Sequence[str] = (POLICY, VALUE),
        temperature: float = 1.0,
        response_positions: Int[Tensor, " N"] | None = None,
    ) -> RoleOutputs:
        """What each role says about the last R tokens.

        Language-model roles give `logprobs` and `entropies` (nats, of softmax(logits /
        temperature)), the value role gives `values`; all [B, R] in fp32, 0.0 where
        `response_mask` is False. Prompts are padded on the left, responses on the right, or both
        on the left. `response_positions` are those that the flattened `response_mask` counts, for
        who has them without asking the device.
        """
        inputs = model_inputs(input_ids[:, :-1], attention_mask[:, :-1])
        tokens = ResponseTokens(response_mask, response_positions)
        ids = tokens.pick(input_ids[:, -response_mask.shape[1] :])
        outputs: RoleOutputs = {}
        for role in roles:
            if role == VALUE:
                outputs[role] = {"values": self._values(inputs, response_mask)}
            else:
                with self._language_model(role) as model:
                    outputs[role] = self._statistics(model, inputs, tokens, ids, temperature)
        return outputs

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "B P"],
        attention_mask: Bool[Tensor, "B P"],
        generation_config: GenerationConfig,
        role: str = POLICY,
        **kwargs: Any,
    ) -> Int[Tensor, "B T"]:
        """Prompts with a continuation of `role`, sampled exactly as `generation_config` says.

        Runs in evaluation mode, and nothing is inherited from the model's own generation config.
        """
        with evaluation_mode(self), self._language_model(role) as model:
            return continue_prompts(model, input_ids, attention_mask, generation_config, **kwargs)

    def role_parameters(self, role: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The named parameters that train for `role`; for the reference, those of its model."""
        if role == REFERENCE:
            if self.ref_model is not None:
                yield from self.ref_model.named_parameters(prefix="ref_model")
            return
        prefix, model = {
            POLICY: ("policy", self.policy),
            VALUE: ("value_model", self.value_model),
        }[role]
        for name, parameter in model.named_parameters(prefix=prefix):
            if parameter.requires_grad:
                yield name, parameter

    def sync_roles(self) -> dict[str, RoleState]:
        """Each role with what it must keep, for an audit."""
        states = {
            role: RoleState(
                trainable=True,
                parameters=tuple(p for _, p in self.role_parameters(role)),
                modules=(),
            )
            for role in (POLICY, VALUE)
        }
        frozen = [p for p in self.policy.parameters() if not p.requires_grad]
        runs = self.causal_model if self.ref_model is None else self.ref_model
        own = frozen if self.ref_model is None else list(self.ref_model.parameters())
        states[REFERENCE] = RoleState(
            trainable=False,
            parameters=tuple(own),
            modules=tuple(m for name, m in runs.named_modules() if ".lora_" not in name),
        )
        return states

    def frozen_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the reference consists of; nothing of it may differ when a run continues."""
        if self.ref_model is not None:
            yield from base_tensors(self.ref_model)
            return
        trained = {name for name, p in self.policy.named_parameters() if p.requires_grad}
        for name, parameter in self.policy.named_parameters():
            if name not in trained:
                yield name, parameter
        yield from quantization_tensors(self.policy)

    def reward_fingerprint(self) -> str | None:
        """None: there is no reward adapter here, the reward model is elsewhere."""
        return None

    def check_roles(self) -> None:
        """Nothing, if policy and value model train, the reference does not, and none shares.

        Raises:
            ConfigError: names the first parameter that breaks this.
        """
        owners: dict[int, str] = {}
        for role in (POLICY, VALUE):
            named = list(self.role_parameters(role))
            if not named:
                raise ConfigError(
                    f"The {role} model has no parameter that requires a gradient, so it cannot "
                    "train: was it frozen?"
                )
            for name, parameter in named:
                owner = owners.setdefault(id(parameter), role)
                if owner != role:
                    raise ConfigError(
                        f"{name} belongs to {owner} and {role}: load the model twice."
                    )
        for name, parameter in self.role_parameters(REFERENCE):
            if parameter.requires_grad or id(parameter) in owners:
                raise ConfigError(
                    f"{name} of the reference trains: pass ref_model a model of its own, or None."
                )

    @contextlib.contextmanager
    def _language_model(self, role: str) -> Iterator[Any]:
        """The causal LM that plays `role` within the block."""
        if role not in (POLICY, REFERENCE):
            raise ConfigError(f"role={role!r} has no language model: use 'policy' or 'reference'.")
        if role == POLICY:
            yield self.causal_model
        elif self.ref_model is not None:
            yield without_adapters(self.ref_model)
        else:
            with reference_adapter(self.policy, self._reference_adapter):
                yield self.causal_model

    def _values(self, inputs: dict[str, Tensor], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        head = find_scalar_head(self.value_model)
        assert head is not None  # checked when the models came
        hidden = head.trunk(**inputs, use_cache=False).last_hidden_state
        return head(hidden[:, -mask.shape[1] :]).masked_fill(~mask, 0.0)

    def _statistics(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        tokens: ResponseTokens,
        ids: Int[Tensor, " N"],
        temperature: float,
    ) -> dict[str, Tensor]:
        num_response = tokens.mask.shape[1]
        if knows_head(model):
            hidden = trunk_of(model)(**inputs, use_cache=False).last_hidden_state
            hidden = hidden[:, -num_response:]
            head = CausalHead(model)
            statistics = chunked_token_statistics(
                tokens.pick(hidden),
                ids,
                head,
                vocabulary_size=head.vocabulary_size,
                head_trains=head.trains,
                temperature=temperature,
                chunk_bytes=self.logprob_chunk_bytes,
            )
        else:
            logits = model(**inputs, **_only_last(model, num_response)).logits[:, -num_response:]
            statistics = token_statistics(tokens.pick(logits), ids, temperature)
        return tokens.statistics(*statistics)


def _only_last(model: Any, num_tokens: int) -> dict[str, Any]:
    """Arguments by which the LM head runs on the last tokens alone, where the model has them."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return {"use_cache": False, "logits_to_keep": num_tokens}
    return {"use_cache": False}


def _active_adapter(model: Any) -> str | None:
    return model.active_adapter if isinstance(model, PeftModel) else None


def _transformers_model(model: Any) -> Any:
    """The transformers model in a PEFT model or below a value head."""
    return without_adapters(getattr(without_adapters(model), "pretrained_model", model))


def _freeze_unused_head(value_model: Any) -> None:
    """The LM head below a value head gets no gradient, for which DDP would wait."""
    inner = without_adapters(value_model)
    if hasattr(inner, "v_head"):
        language_model = without_adapters(inner.pretrained_model)
        embedding = language_model.get_input_embeddings().weight
        for parameter in language_model.get_output_embeddings().parameters():
            if parameter is not embedding:
                parameter.requires_grad_(False)
