"""The step API of TRL up to 0.11: generate, score, `step`.

```text
for batch in trainer.dataloader:
    responses = trainer.generate(queries, return_prompt=False)
    scores    = what you think of them
    stats     = trainer.step(queries, responses, scores)
    trainer.log_stats(stats, batch, scores)
```

`trl_sync.PPOTrainer` runs the whole loop itself, and is what new scripts should use.
"""

from __future__ import annotations

from typing import Any

from transformers import set_seed

from trl_sync.legacy.config import PPOConfig
from trl_sync.legacy.control import AdaptiveKLController, FixedKLController, RunningMoments
from trl_sync.legacy.core import LengthSampler, respond_to_batch
from trl_sync.legacy.reference import create_reference_model
from trl_sync.legacy.trainer import PPOTrainer
from trl_sync.value_head import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
)

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "FixedKLController",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "RunningMoments",
    "create_reference_model",
    "respond_to_batch",
    "set_seed",
]

_ELSEWHERE = {
    "BestOfNSampler": "generate several responses and keep the one with the best score",
    "PPOv2Config": "use trl_sync.PPOConfig",
    "PPOv2Trainer": "use trl_sync.PPOTrainer",
    "TextEnvironment": "pass the responses and response_masks of your environment to step()",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise ImportError(f"trl_sync.legacy has no {name}: {_ELSEWHERE[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
