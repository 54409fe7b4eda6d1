"""Reward sources: a model, its path, a function, an adapter on the shared base, or several."""

from trl_sync.ppo.rewards.adapter import AdapterReward
from trl_sync.ppo.rewards.build import (
    AnyReward,
    attach_adapter,
    reward_modules,
    reward_source,
    uses_adapter,
)
from trl_sync.ppo.rewards.functions import FunctionReward, RewardFunction, completion_texts
from trl_sync.ppo.rewards.models import ModelReward
from trl_sync.ppo.rewards.source import Reward, RewardSource, Source, check_scores, evaluate
from trl_sync.ppo.rewards.weighted import WeightedRewards

__all__ = [
    "AdapterReward",
    "AnyReward",
    "FunctionReward",
    "ModelReward",
    "Reward",
    "RewardFunction",
    "RewardSource",
    "Source",
    "WeightedRewards",
    "attach_adapter",
    "check_scores",
    "completion_texts",
    "evaluate",
    "reward_modules",
    "reward_source",
    "uses_adapter",
]
