"""The models: one frozen base, its roles, and how batches are routed through their adapters."""

from trl_sync.backbone.loading import load_base, load_shared_backbone
from trl_sync.backbone.shared import SharedBackbone

__all__ = ["SharedBackbone", "load_base", "load_shared_backbone"]
