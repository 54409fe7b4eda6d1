"""SharedBackbone: one frozen (4-bit) base that serves policy, value model, reference, reward."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel

from trl_sync.backbone.checkpointing import (
    OldCheckpointingNames,
    checkpointed_layers,
    disable_checkpointing,
    enable_checkpointing,
)
from trl_sync.backbone.fingerprint import base_tensors, fingerprint_of
from trl_sync.backbone.generation import continue_prompts, evaluation_mode
from trl_sync.backbone.logprob import CausalHead, chunked_token_statistics
from trl_sync.backbone.modes import set_training
from trl_sync.backbone.partitioned import make_whole
from trl_sync.backbone.passes import ResponseTokens, model_inputs, trunk_of
from trl_sync.backbone.quantization import check_not_repacked, keep_packed_weights
from trl_sync.backbone.reward_adapter import add_reward_lora
from trl_sync.backbone.roles import POLICY, REFERENCE, REWARD, VALUE, Role, RoleState
from trl_sync.backbone.routing import (
    AdapterRouter,
    adapter_parameters,
    check_lora_config,
    set_adapter_trainable,
)
from trl_sync.backbone.views import RoleView
from trl_sync.errors import ConfigError

RoleOutputs = dict[str, dict[str, Tensor]]


class SharedBackbone(OldCheckpointingNames, nn.Module):
    """One base in memory, seen through three roles, or four.

    | role | view | trained |
    |---|---|---|
    | policy | base + LoRA `policy`, LM head | yes |
    | value | base + LoRA `value`, value head (H -> 1) | yes |
    | reference | the base alone, or base + frozen LoRA `reference` | no |
    | reward | after `add_reward_adapter`: base + frozen LoRA `reward`, score head (H -> 1) | no |

    `model` is the causal LM that becomes the frozen base (any precision, 4-bit included); it is
    changed in place. `peft_config` describes the policy adapter (default: rank 16 on every linear
    layer but the LM head), `value_peft_config` the value adapter (default: the same without the LM
    head). With `reference_adapter=True` a third, frozen adapter holds the reference, for an SFT
    model that is itself an adapter. `logprob_chunk_bytes` is the most that fp32 logits take at a
    time (default: 64 MiB, on a CPU 16 MiB).

    The base stays in evaluation mode: its own dropout never runs. LoRA dropout follows `train()`.

    Sources: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), arXiv
    2106.09685; on a 4-bit base, Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs"
    (2023), arXiv 2305.14314.

    Raises:
        ConfigError: the model already has adapters, its LM head is unknown, the LoRA options are
            not supported by the routing, or its 4-bit weights were repacked for inference.
    """

    # Whether all roles of a pass go through the model as one batch.
    stacks_roles = True

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: LoraConfig | None = None,
        *,
        value_peft_config: LoraConfig | None = None,
        reference_adapter: bool = False,
        logprob_chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
            raise ConfigError(
                "The model already has adapters, and peft_config would add others on top. Pass "
                "the plain base with peft_config, or load base and SFT adapter together with "
                "trl_sync.backbone.loading.load_shared_backbone."
            )
        make_whole(model)
        peft_config = peft_config if peft_config is not None else default_lora_config()
        check_lora_config(peft_config)
        value_peft_config = value_peft_config or _without_output_embeddings(model, peft_config)
        check_lora_config(value_peft_config)
        check_not_repacked(model)
        keep_packed_weights(model)
        self.logprob_chunk_bytes = logprob_chunk_bytes
        self._head = CausalHead(model)
        model.eval()
        # PEFT writes the resolved target modules into the config it is given.
        self.peft_model = get_peft_model(model, copy.deepcopy(peft_config), adapter_name=POLICY)
        self.peft_model.add_adapter(VALUE, copy.deepcopy(value_peft_config))
        if reference_adapter:
            self.peft_model.add_adapter(REFERENCE, copy.deepcopy(peft_config))
        _check_value_adapter(model)
        self.router = AdapterRouter(self.peft_model)
        # fp32 whatever the base, and outside autocast: one row of weights costs nothing, and
        # returns are regressed on it.
        self.value_head = nn.Linear(_hidden_size(model), 1, device=self._trunk_device())
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.score_head: nn.Module | None = None
        self.reward_adapter_path: str | None = None
        set_adapter_trainable(self.peft_model, (POLICY, VALUE))
        self.roles = {
            POLICY: Role(name=POLICY, adapter=POLICY, trainable=True),
            VALUE: Role(name=VALUE, adapter=VALUE, trainable=True),
            REFERENCE: Role(
                name=REFERENCE, adapter=REFERENCE if reference_adapter else None, trainable=False
            ),
        }
        self.train(False)

    def add_reward_adapter(self, path: str) -> None:
        """Adds the role `reward`: the frozen LoRA adapter and score head at `path`.

        `path` is a folder or hub name as PEFT saves a sequence classifier (TRL's RewardTrainer
        with a `peft_config`), trained on this base. Its scores come from the same stacked pass as
        what the other roles say. It never trains and is not part of a checkpoint.

        Raises:
            ConfigError: there is a reward adapter already, or the one at `path` does not fit.
        """
        if self.has_reward:
            raise ConfigError(
                f"The base carries the reward adapter {self.reward_adapter_path} already, and has "
                f"one reward role: load {path} with trl_sync.load_reward_model instead."
            )
        try:
            self.score_head = add_reward_lora(self.peft_model, self.router, path)
        finally:
            set_adapter_trainable(self.peft_model, (POLICY, VALUE))
        self.reward_adapter_path = path
        self.roles[REWARD] = Role(name=REWARD, adapter=REWARD, trainable=False)
        self.train(self.training)

    @property
    def has_reward(self) -> bool:
        """Whether the base carries a reward adapter."""
        return REWARD in self.roles

    def reward_fingerprint(self) -> str | None:
        """A checksum of the reward adapter and its head, 32 hex digits; None without one.

        A run that continues must score as before.
        """
        if not self.has_reward:
            return None
        return fingerprint_of(self.role_parameters(REWARD))

    @property
    def causal_model(self) -> PreTrainedModel:
        """The causal LM whose layers carry the adapters."""
        return self.peft_model.base_model.model

    @property
    def policy(self) -> RoleView:
        """The policy as scripts expect a model: to call, to generate with, to save."""
        return RoleView(self, POLICY)

    @property
    def value_model(self) -> RoleView:
        """The value model as scripts expect a model; its `logits` [B, T, 1] are the values."""
        return RoleView(self, VALUE)

    @property
    def config(self) -> Any:
        return self.causal_model.config

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.causal_model, "_no_split_modules", None)

    def train(self, mode: bool = True) -> SharedBackbone:
        """Training mode for the trainable roles' LoRA dropout only; the base stays in evaluation.

        The layers that decide on gradient checkpointing by their own flag get it; what they
        contain does not.
        """
        set_training(self, self._modules_that_train(), mode)
        return self

    def _modules_that_train(self) -> Iterator[nn.Module]:
        yield self
        yield from self.value_head.modules()
        yield from checkpointed_layers(self.peft_model)
        for layer in self.router.layers:
            for role in self.roles.values():
                if role.trainable and role.adapter in layer.lora_dropout:
                    yield layer.lora_dropout[role.adapter]

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Recompute activations in backward, each slice through the adapter it had in forward.

        `activation_checkpointing_kwargs` are arguments of torch's `checkpoint`.

        Raises:
            ConfigError: reentrant checkpointing was asked for, which cannot carry the routes.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise ConfigError(
                "use_reentrant=True is not supported on a shared backbone: the recomputation would "
                "not know which adapter each slice went through. Remove it or set it to False."
            )
        options |= {"use_reentrant": False, "context_fn": self.router.checkpoint_contexts}
        enable_checkpointing(self.causal_model, options, **kwargs)
        # The non-reentrant kind needs no gradient at the embeddings, which stay frozen.
        self.causal_model.disable_input_require_grads()
        self.train(self.training)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations instead of recomputing them."""
        disable_checkpointing(self.causal_model)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B T"],
        response_mask: Bool[Tensor, "B R"],
        roles: Sequence[str] = (POLICY, VALUE),
        temperature: float = 1.0,
        response_positions: Int[Tensor, " N"] | None = None,
    ) -> RoleOutputs:
        """What each role says about the last R tokens, in one pass through the base.

        Language-model roles give `logprobs` and `entropies` (nats, of softmax(logits /
        temperature)), the value role gives `values`; all [B, R] in fp32, 0.0 where
        `response_mask` is False. The reward role gives `scores` [B] in fp32, at the last token
        that `attention_mask` counts. Prompts are padded on the left, responses on the right, or
        both on the left. `response_positions` are those that the flattened `response_mask` counts,
        for who has them without asking the device.
        """
        num_response = response_mask.shape[1]
        tokens = ResponseTokens(response_mask, response_positions)
        # The last token predicts nothing: only its score needs it in the pass.
        end = input_ids.shape[1] - (REWARD not in roles)
        hidden = self._hidden_states(input_ids[:, :end], attention_mask[:, :end], roles)
        outputs: RoleOutputs = {}
        for role, states in zip(roles, hidden.chunk(len(roles)), strict=True):
            if role == REWARD:
                outputs[role] = {"scores": self._scores(states, attention_mask)}
                continue
            states = states[:, : input_ids.shape[1] - 1][:, -num_response:]
            if role == VALUE:
                outputs[role] = {"values": self._values(states, response_mask)}
            else:
                ids = tokens.pick(input_ids[:, -num_response:])
                found = self._token_statistics(tokens.pick(states), ids, role, temperature)
                outputs[role] = tokens.statistics(*found)
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

        Runs in evaluation mode: checkpointed layers in training mode would drop the cache.
        Nothing is inherited from the model's own generation config: a repetition penalty stored
        there would make the sampling distribution differ from the one PPO takes gradients of.
        Prompts are padded on the left. `kwargs` go to transformers' `generate`.

        Raises:
            ConfigError: `role` has no language model.
        """
        if role not in (POLICY, REFERENCE):
            raise ConfigError(f"role={role!r} has no language model: use 'policy' or 'reference'.")
        model = self.causal_model
        with evaluation_mode(self), self.router.routes(self.roles[role].adapter):
            return continue_prompts(model, input_ids, attention_mask, generation_config, **kwargs)

    def role_parameters(self, role: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The named parameters that belong to `role` alone: its adapter, and its own head."""
        adapter = self.roles[role].adapter
        if adapter is not None:
            yield from adapter_parameters(self.peft_model, adapter)
        if role == VALUE:
            for name, parameter in self.value_head.named_parameters():
                yield f"value_head.{name}", parameter
        if role == REWARD and self.score_head is not None:
            for name, parameter in self.score_head.named_parameters():
                yield f"score_head.{name}", parameter

    def sync_roles(self) -> dict[str, RoleState]:
        """Each role with what it must keep, for an audit.

        The base belongs to the reference: it is what must not move while adapters on it train.
        """
        adapters = [role.adapter for role in self.roles.values() if role.adapter is not None]
        lora = {id(p) for name in adapters for _, p in adapter_parameters(self.peft_model, name)}
        base = tuple(p for p in self.peft_model.parameters() if id(p) not in lora)
        runs = tuple(
            module for name, module in self.causal_model.named_modules() if ".lora_" not in name
        )
        states = {}
        for name, role in self.roles.items():
            own = tuple(parameter for _, parameter in self.role_parameters(name))
            states[name] = RoleState(
                trainable=role.trainable,
                parameters=own + base if name == REFERENCE else own,
                modules=runs if name == REFERENCE else (),
            )
        if self.score_head is not None:
            states[REWARD] = dataclasses.replace(states[REWARD], modules=(self.score_head,))
        return states

    def frozen_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The base, of which nothing may differ when a run continues.

        Parameters, buffers and quantization state, under the names they have without adapters;
        4-bit weights as bytes, [number, 1].
        """
        yield from base_tensors(self.causal_model)

    def check_roles(self) -> None:
        """Nothing, if exactly the policy, the value adapter and the value head are trainable.

        Raises:
            ConfigError: names the first parameter that breaks this.
        """
        expected = {
            id(parameter)
            for role in self.roles.values()
            if role.trainable
            for _, parameter in self.role_parameters(role.name)
        }
        for name, parameter in self.named_parameters():
            if parameter.requires_grad != (id(parameter) in expected):
                state = "trains but is frozen" if id(parameter) in expected else "must not train"
                raise ConfigError(
                    f"{name} {state}: its requires_grad is {parameter.requires_grad}. Was it "
                    "changed after the SharedBackbone was made?"
                )

    def _hidden_states(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B T"],
        roles: Sequence[str],
    ) -> Float[Tensor, "roles_B T H"]:
        inputs = {
            name: tensor.repeat(len(roles), 1)
            for name, tensor in model_inputs(input_ids, attention_mask).items()
        }
        with self.router.routes(*(self.roles[role].adapter for role in roles)):
            output = trunk_of(self.causal_model)(**inputs, use_cache=False)
        return output.last_hidden_state

    def _values(
        self, states: Float[Tensor, "B R H"], mask: Bool[Tensor, "B R"]
    ) -> Float[Tensor, "B R"]:
        with torch.autocast(states.device.type, enabled=False):
            values = _in_fp32(self.value_head, states).squeeze(-1)
        return values.masked_fill(~mask, 0.0)

    def _scores(
        self, states: Float[Tensor, "B T H"], attention_mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, " B"]:
        assert self.score_head is not None
        columns = torch.arange(states.shape[1], device=states.device)
        last = (columns * attention_mask.bool()).amax(1)
        picked = states[torch.arange(len(last), device=states.device), last]
        with torch.autocast(states.device.type, enabled=False):
            return _in_fp32(self.score_head, picked).squeeze(-1)

    def _token_statistics(
        self,
        states: Float[Tensor, "N H"],
        tokens: Int[Tensor, " N"],
        role: str,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        with self.router.routes(self.roles[role].adapter):
            return chunked_token_statistics(
                states,
                tokens,
                self._head,
                vocabulary_size=self._head.vocabulary_size,
                head_trains=self._head.trains,
                temperature=temperature,
                chunk_bytes=self.logprob_chunk_bytes,
                context_fn=self.router.checkpoint_contexts,
            )

    def _trunk_device(self) -> torch.device:
        return self.causal_model.get_input_embeddings().weight.device


def _in_fp32(head: Any, states: Tensor) -> Tensor:
    """What a linear `head` says, in fp32 even where an engine holds its weights in 16 bits."""
    bias = None if head.bias is None else head.bias.float()
    return functional.linear(states.float(), head.weight.float(), bias)


def default_lora_config() -> LoraConfig:
    """LoRA of rank 16 on every linear layer but the LM head, without dropout."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _hidden_size(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[-1])


def _without_output_embeddings(model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """`config` for the value model, whose pass never reaches the LM head."""
    config = copy.deepcopy(config)
    targets = config.target_modules
    if isinstance(targets, (list, set, tuple)):
        head = model.get_output_embeddings()
        names = {
            name.rpartition(".")[2] for name, module in model.named_modules() if module is head
        }
        config.target_modules = set(targets) - names
        if not config.target_modules:
            raise ConfigError(
                "peft_config targets the LM head alone, which the value model does not have: name "
                "more target_modules, or pass value_peft_config."
            )
    return config


def _check_value_adapter(model: PreTrainedModel) -> None:
    """Nothing, if every part of the value adapter is used; DDP waits for unused gradients."""
    if VALUE in getattr(model.get_output_embeddings(), "scaling", {}):
        raise ConfigError(
            "target_modules matches the LM head, which the value model does not have: list module "
            "names instead of a pattern, or pass value_peft_config."
        )
