"""The errors this package raises, so that callers can tell a wrong setting from a failed run."""


class ConfigError(ValueError):
    """A setting, model or dataset that cannot work; raised before training or writing."""


class CheckpointError(ConfigError):
    """A checkpoint that is incomplete, or that belongs to another base model or configuration."""


class RewardError(RuntimeError):
    """A reward source that returned something other than one finite number per episode."""
