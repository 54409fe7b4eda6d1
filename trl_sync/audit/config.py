"""What the user chooses about the audit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_sync.audit.findings import Scope
from trl_sync.errors import ConfigError

ON_DESYNC = ("raise", "warn", "stop", "repair")
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """Options of `SyncAuditCallback` and `SyncAuditor`, which take them as keywords.

    | option | default | meaning |
    |---|---|---|
    | `every_steps` | `1` | audit the trainable state at every Nth optimizer step |
    | `frozen_cover_steps` | `64` | every frozen byte is checked once within this many audits |
    | `scopes` | `None` | names out of those below; `None`: all |
    | `modules` | `{}` | further models by role name, e.g. `{"reference": ref_model}` |
    | `on_desync` | `"raise"` | `raise`, `warn`, `stop` (unverified checkpoint, end) or `repair` |
    | `journal` | `"auto"` | a file; `"auto"`: `sync_audit.jsonl` in the output folder; or `None` |
    | `timeout_s` | `60.0` | how long a rank may lag before it is named and all end (exit code 75) |
    | `blocking` | `None` | verdict at the same step, else one late; `None`: on CPU, or to repair |
    | `self_test` | `True` | prove at the start, with a flipped bit on one rank, that it is seen |
    | `manifest` | `True` | write `sync_manifest.json` beside each checkpoint, verify it on resume |
    | `resume_from` | `None` | the checkpoint this run continues, if not in the output folder |
    | `on_event` | `None` | called on the main process with name and fields of each journal event |

    Scopes: `trainable`, `gradients`, `frozen`, `quantization`, `buffers`, `optimizer`, `roles`,
    `rng`.

    Raises:
        ConfigError: names the option that cannot work.
    """

    every_steps: int = 1
    frozen_cover_steps: int = 64
    scopes: Collection[str] | None = None
    modules: Mapping[str, Any] = field(default_factory=dict)
    on_desync: str = "raise"
    journal: str | Path | None = AUTO
    timeout_s: float = 60.0
    blocking: bool | None = None
    self_test: bool = True
    manifest: bool = True
    resume_from: str | Path | None = None
    on_event: Callable[[str, dict[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        for name in ("every_steps", "frozen_cover_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be positive, not {self.timeout_s!r}.")
        if self.on_event is not None and not callable(self.on_event):
            raise ConfigError(
                f"on_event must be a function of an event's name and fields, not {self.on_event!r}."
            )
        if self.on_desync not in ON_DESYNC:
            raise ConfigError(
                f"on_desync is {self.on_desync!r}; it must be one of {', '.join(ON_DESYNC)}."
            )
        if self.on_desync == "repair" and (self.every_steps > 1 or self.blocking is False):
            raise ConfigError(
                "on_desync='repair' needs every_steps=1 and blocking=True: after another update "
                "the damage is in the gradients of all ranks."
            )
        if isinstance(self.scopes, str):
            raise ConfigError(f"scopes must be a list of names, not the text {self.scopes!r}.")
        known = [scope.value for scope in Scope]
        unknown = sorted(set(self.scopes or ()) - set(known))
        if unknown:
            raise ConfigError(
                f"Unknown audit scope(s) {', '.join(unknown)}; there are {', '.join(known)}."
            )
        for name, module in self.modules.items():
            if not callable(getattr(module, "named_parameters", None)):
                raise ConfigError(
                    f"modules[{name!r}] must be a torch module, not {type(module).__name__}."
                )

    def audits(self, scope: Scope) -> bool:
        """True if `scope` was asked for."""
        return self.scopes is None or scope in self.scopes
