"""The weight of the KL penalty, where it adapts to the KL that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_sync.errors import ConfigError
from trl_sync.ppo.config import PPOConfig

# One update changes the coefficient by at most this share of episodes / horizon.
_MAX_ERROR = 0.2


class KLControl:
    """The KL coefficient of the next rollout: constant, or steered towards `kl_target`.

    With a target, after each rollout of n episodes whose mean KL was k nats a sequence:

        coefficient *= 1 + clip(k / kl_target - 1, -0.2, 0.2) * n / kl_horizon

    `k` is the mean over all processes, so every process holds the same coefficient.
    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), 2.2.

    Raises:
        ConfigError: the coefficient is 0 and could never change, or the horizon is so short that
            one update could make it negative.
    """

    def __init__(self, config: PPOConfig, batch_size: int) -> None:
        self.coefficient = config.kl_coef
        self.target = config.kl_target
        self._share = batch_size / config.kl_horizon
        if self.target is None:
            return
        if self.coefficient == 0:
            raise ConfigError(
                f"kl_target={self.target} scales kl_coef, and kl_coef=0 stays 0: set kl_coef above "
                "0, or leave kl_target unset."
            )
        if self._share * _MAX_ERROR >= 1:
            raise ConfigError(
                f"kl_horizon={config.kl_horizon:g} is too short for a rollout batch of "
                f"{batch_size} episodes: one update could take away the whole kl_coef. Use more "
                f"than {batch_size * _MAX_ERROR:g}; usual are many batches."
            )

    @property
    def adaptive(self) -> bool:
        """Whether there is a target."""
        return self.target is not None

    def update(self, kl: float) -> None:
        """Adapts the coefficient to the mean KL of a rollout, in nats a sequence."""
        if self.target is None:
            return
        error = max(-_MAX_ERROR, min(_MAX_ERROR, kl / self.target - 1))
        self.coefficient *= 1 + error * self._share

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs, as plain JSON."""
        return {"coefficient": self.coefficient} if self.adaptive else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`; without a target there is nothing to continue."""
        if self.adaptive and "coefficient" in state:
            self.coefficient = float(state["coefficient"])
