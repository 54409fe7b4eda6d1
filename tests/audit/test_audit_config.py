"""Bad options are refused before training, with what is wrong and what would do."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from trl_sync import AuditConfig, ConfigError, SyncAuditCallback
from trl_sync.audit.findings import Scope


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every_steps": 0}, "every_steps must be a whole number of at least 1"),
        ({"every_steps": True}, "every_steps must be a whole number"),
        ({"frozen_cover_steps": -3}, "frozen_cover_steps must be"),
        ({"timeout_s": 0}, "timeout_s must be positive"),
        ({"timeout_s": float("nan")}, "timeout_s must be positive"),
        ({"on_desync": "panic"}, "'panic'; it must be one of raise, warn, stop, repair"),
        ({"scopes": ["weights"]}, "Unknown audit scope.* weights; there are trainable"),
        ({"scopes": "trainable"}, "scopes must be a list"),
        ({"modules": {"reward": len}}, r"modules\['reward'\] must be a torch module"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AuditConfig(**options)
    with pytest.raises(ConfigError, match=message):
        SyncAuditCallback(**options)


def test_an_unknown_option_is_no_option() -> None:
    with pytest.raises(TypeError, match="every_step"):
        SyncAuditCallback(every_step=1)


def test_accepted() -> None:
    config = AuditConfig(scopes=["frozen", "roles"], modules={"reference": nn.Linear(1, 1)})
    assert [scope for scope in Scope if config.audits(scope)] == [Scope.FROZEN, Scope.ROLES]
    assert AuditConfig().audits(Scope.RNG)
