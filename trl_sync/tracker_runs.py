"""Runs of trackers that are open in this process, as transformers' callbacks open them."""

from __future__ import annotations

from typing import Any


def open_wandb_run() -> Any | None:
    """wandb's run under way, or None. wandb must be installed."""
    import wandb

    return wandb.run


def trackio_has_run() -> bool:
    """True while a run of trackio is open in this context. trackio must be installed."""
    import trackio

    return trackio.context_vars.current_run.get() is not None
