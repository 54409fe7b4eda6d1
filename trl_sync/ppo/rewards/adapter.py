"""The reward adapter on a shared backbone as a reward source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel

from trl_sync.backbone.reward_adapter import can_share_a_base
from trl_sync.backbone.roles import REWARD
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.ppo.batch import Rollout
from trl_sync.ppo.rewards.source import Reward, Source


class AdapterReward(Source):
    """LoRA `reward` and a score head on the base that all roles share.

    In training its scores come from the pass that scores the other roles; alone it makes a pass of
    its own. `path` is the adapter that `attach` puts on the backbone; None if it has one already.
    """

    def __init__(self, path: str | None, *, batch_size: int) -> None:
        self.name = "reward adapter"
        self.path = path
        self._batch_size = batch_size
        self._backbone: Any = None

    def attach(self, backbone: SharedBackbone) -> None:
        """Uses `backbone`, and adds the adapter to it if it is not there yet.

        Raises:
            ConfigError: the adapter does not fit, or the backbone has another one.
        """
        if self.path is not None and backbone.reward_adapter_path != self.path:
            backbone.add_reward_adapter(self.path)
        self._backbone = backbone

    @torch.no_grad()
    def reward(self, rollout: Rollout, adapter_scores: Float[Tensor, " B"] | None = None) -> Reward:
        if adapter_scores is None:
            parts = zip(
                rollout.input_ids.split(self._batch_size),
                rollout.attention_mask.split(self._batch_size),
                rollout.response_mask.split(self._batch_size),
                strict=True,
            )
            outputs = [self._backbone(*part, roles=(REWARD,)) for part in parts]
            adapter_scores = torch.cat([output[REWARD]["scores"] for output in outputs])
        return Reward(scores=adapter_scores)


def belongs_on(path: str, base: Any) -> bool:
    """Whether `path` is a reward adapter that was trained on the base of `base`.

    Only a `SharedBackbone`, or a causal LM that becomes one, can carry it. One with options that a
    shared base does not support, such as DoRA, is loaded with a base of its own.
    """
    if not isinstance(base, (SharedBackbone, PreTrainedModel)):
        return False
    own = str(base.config._name_or_path or "")
    if not own or not can_share_a_base(path):
        return False
    trained_on = str(PeftConfig.from_pretrained(path).base_model_name_or_path or "")
    return _place(trained_on) == _place(own)


def _place(name: str) -> str:
    """A folder by its full path, anything else as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
