"""PPO on one shared 4-bit backbone, and synchronization auditing, for Hugging Face TRL.

Public names are imported when they are first used: `import trl_sync` alone loads neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trl_sync._version import __version__

if TYPE_CHECKING:
    from trl_sync.audit.auditor import SyncAuditor
    from trl_sync.audit.callback import SyncAuditCallback
    from trl_sync.audit.config import AuditConfig
    from trl_sync.audit.findings import AuditSummary
    from trl_sync.backbone.loading import load_reward_model, load_shared_backbone
    from trl_sync.backbone.merge import export_merged
    from trl_sync.backbone.shared import SharedBackbone
    from trl_sync.errors import (
        AuditError,
        CheckpointError,
        ConfigError,
        DesyncError,
        RewardError,
    )
    from trl_sync.ppo.config import PPOConfig
    from trl_sync.ppo.trainer import PPOTrainer
    from trl_sync.value_head import (
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        PreTrainedModelWrapper,
    )

_MODULES = {
    "AuditConfig": "trl_sync.audit.config",
    "AuditError": "trl_sync.errors",
    "AuditSummary": "trl_sync.audit.findings",
    "AutoModelForCausalLMWithValueHead": "trl_sync.value_head",
    "AutoModelForSeq2SeqLMWithValueHead": "trl_sync.value_head",
    "CheckpointError": "trl_sync.errors",
    "ConfigError": "trl_sync.errors",
    "DesyncError": "trl_sync.errors",
    "PPOConfig": "trl_sync.ppo.config",
    "PPOTrainer": "trl_sync.ppo.trainer",
    "PreTrainedModelWrapper": "trl_sync.value_head",
    "RewardError": "trl_sync.errors",
    "SharedBackbone": "trl_sync.backbone.shared",
    "SyncAuditCallback": "trl_sync.audit.callback",
    "SyncAuditor": "trl_sync.audit.auditor",
    "export_merged": "trl_sync.backbone.merge",
    "load_reward_model": "trl_sync.backbone.loading",
    "load_shared_backbone": "trl_sync.backbone.loading",
}

__all__ = [
    "AuditConfig",
    "AuditError",
    "AuditSummary",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "CheckpointError",
    "ConfigError",
    "DesyncError",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "RewardError",
    "SharedBackbone",
    "SyncAuditCallback",
    "SyncAuditor",
    "__version__",
    "export_merged",
    "load_reward_model",
    "load_shared_backbone",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
