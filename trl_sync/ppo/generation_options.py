"""`generation_config` and `generation_kwargs` of a PPOConfig: what rollouts take over from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

from trl_sync.errors import ConfigError
from trl_sync.ppo.config import PPOConfig

logger = logging.get_logger(__name__)

# Settings with which a token is not drawn from softmax(logits / temperature), and the values that
# leave the distribution alone (besides None).
BENDING: dict[str, tuple[Any, ...]] = {
    "top_k": (0,),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0, -1),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "guidance_scale": (1.0,),
    "remove_invalid_values": (False,),
    "watermarking_config": (),
}
# Those of them that have a meaning only where tokens are drawn.
DRAWING_ONLY = ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

# What cannot work with PPO: the advice, and the names with the value that may stand there besides
# None.
_REFUSED: dict[str, dict[str, Any]] = {
    "set num_generations of PPOConfig instead": {"num_return_sequences": 1},
    "it counts the prompt too. Set response_length of PPOConfig instead": {"max_length": None},
    "PPO learns from what the policy samples, not from a search. Leave it out": {
        "do_sample": True,
        "num_beams": 1,
        "num_beam_groups": 1,
        "early_stopping": False,
        "length_penalty": 1.0,
        "diversity_penalty": 0.0,
        "penalty_alpha": None,
        "dola_layers": None,
        "constraints": None,
        "force_words_ids": None,
        "low_memory": False,
    },
    "rollouts generate with the policy alone. Leave it out": {
        "use_mtp": False,
        "is_assistant": False,
        "prompt_lookup_num_tokens": None,
        "max_matching_ngram_size": None,
        "num_assistant_tokens": None,
        "num_assistant_tokens_schedule": None,
        "assistant_confidence_threshold": None,
        "assistant_early_exit": None,
        "assistant_lookbehind": None,
        "target_lookbehind": None,
        "assistant_ensemble_weight": None,
        "speculation_type": None,
    },
    "rollouts use the tokens alone. Leave it out": {
        "return_dict_in_generate": False,
        "output_scores": False,
        "output_logits": False,
        "output_attentions": False,
        "output_hidden_states": False,
    },
    "a response ends at a token. Use stop_token, stop_token_id or eos_token_id": {
        "stop_strings": None,
    },
    "responses would depend on the clock. Set response_length of PPOConfig": {"max_time": None},
    "it rewrites the prompt. Leave it out": {"token_healing": False},
    "rollouts call generate in plain batches. Leave it out": {"continuous_batching_config": None},
}
_REFUSED_NAMES = tuple(name for names in _REFUSED.values() for name in names)
# The same in PPOConfig; a second, different value is refused.
_OF_PPO = {"max_new_tokens": "response_length", "temperature": "temperature"}
# Ids that fill ended rows are hidden by masks, and an id outside the embeddings would crash there.
_WITHOUT_A_TRACE = ("pad_token_id", "transformers_version", "_from_model_config", "_commit_hash")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """What the two fields add to PPO's own settings, checked; empty where they say nothing.

    `settings` are fields of `GenerationConfig`, those of `generation_kwargs` before those of
    `generation_config`. The end tokens stand apart: those of `generation_kwargs` always end a
    response, those of `generation_config` with `stop_token="eos"`.
    """

    settings: Mapping[str, Any]
    eos_of_config: tuple[int, ...]
    eos_of_kwargs: tuple[int, ...]

    @classmethod
    def of(cls, config: PPOConfig) -> GenerationOptions:
        """The options of `config`; warns once where they bend the sampling distribution.

        Raises:
            ConfigError: a generation config that cannot be read, a name that `GenerationConfig`
                does not have, or a setting that contradicts PPO or cannot work with it.
        """
        assert not isinstance(config.generation_kwargs, str)  # read by PPOConfig
        base, further = _base_settings(config), dict(config.generation_kwargs or {})
        known = set(GenerationConfig().to_dict())
        unknown = sorted(set(further) - known)
        if unknown:
            raise ConfigError(
                f"generation_kwargs has {', '.join(unknown)}, which transformers' GenerationConfig "
                "does not know: only its fields can be given."
            )
        for source, given in (("generation_config", base), ("generation_kwargs", further)):
            _check(source, given, config)
        eos_of_config = token_ids("generation_config", base.pop("eos_token_id", None))
        eos_of_kwargs = token_ids("generation_kwargs", further.pop("eos_token_id", None))
        _check_stop_tokens(config, eos_of_config, eos_of_kwargs)
        dropped = (*_REFUSED_NAMES, *_OF_PPO, *_WITHOUT_A_TRACE)
        merged = {n: v for n, v in (base | further).items() if n not in dropped}
        settings = {n: v for n, v in merged.items() if v not in (None, *BENDING.get(n, ()))}
        bent = ", ".join(f"{n}={settings[n]!r}" for n in sorted(settings) if n in BENDING)
        if bent:
            logger.warning_once(
                f"Rollouts sample with {bent}, but log-probabilities, ratios and the KL are those "
                "of softmax(logits / temperature): PPO trains another distribution than the one it "
                "samples from."
            )
        return cls(settings=settings, eos_of_config=eos_of_config, eos_of_kwargs=eos_of_kwargs)


def _base_settings(config: PPOConfig) -> dict[str, Any]:
    """What `generation_config` sets, as plain data.

    Raises:
        ConfigError: it is the path or name of none, or of another type.
    """
    given: Any = config.generation_config
    if isinstance(given, (str, Path)):
        file = Path(given)
        place = (file.parent, file.name) if file.is_file() else (given, None)
        try:
            given = GenerationConfig.from_pretrained(*place)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"generation_config={str(config.generation_config)!r} is neither a folder or file "
                f"with a generation config nor the hub name of a model that has one: {error}"
            ) from error
    if isinstance(given, GenerationConfig):
        given = given.to_dict()
    if given is not None and not isinstance(given, dict):
        raise ConfigError(
            "generation_config must be a transformers GenerationConfig, or the path or hub name of "
            f"one, got {type(given).__name__}."
        )
    return {name: value for name, value in (given or {}).items() if value is not None}


def _check(source: str, given: Mapping[str, Any], config: PPOConfig) -> None:
    for name, own in _OF_PPO.items():
        value = given.get(name)
        if value is not None and value != getattr(config, own):
            raise ConfigError(
                f"{name}={value} in {source} contradicts {own}={getattr(config, own)} of "
                f"PPOConfig: set {own} and leave {name} out."
            )
    for advice, names in _REFUSED.items():
        for name, allowed in names.items():
            if given.get(name) not in (None, allowed):
                raise ConfigError(
                    f"{name}={given[name]!r} in {source} does not work with PPO: {advice}."
                )
    if given.get("cache_implementation") == "paged":
        raise ConfigError(
            f"cache_implementation='paged' in {source} does not work with PPO: it makes generate "
            "batch continuously. Leave it out."
        )


def _check_stop_tokens(
    config: PPOConfig, eos_of_config: tuple[int, ...], eos_of_kwargs: tuple[int, ...]
) -> None:
    own = config.stop_token_id
    if own is not None and eos_of_kwargs and set(eos_of_kwargs) != {own}:
        raise ConfigError(
            f"eos_token_id={list(eos_of_kwargs)} in generation_kwargs contradicts stop_token_id="
            f"{own}: leave one of them out."
        )
    if eos_of_config and own is None and config.stop_token is None and not eos_of_kwargs:
        raise ConfigError(
            f"generation_config has eos_token_id={list(eos_of_config)}, but without a stop token "
            "every response has response_length tokens: set stop_token='eos' or stop_token_id, or "
            "take eos_token_id out of generation_config."
        )


def token_ids(source: str, given: Any) -> tuple[int, ...]:
    """One id or several as a tuple; none for None.

    Raises:
        ConfigError: an id is negative, which no token is.
    """
    several = given if isinstance(given, (list, tuple)) else [given]
    ids = tuple(dict.fromkeys(int(i) for i in several if i is not None))
    if any(i < 0 for i in ids):
        raise ConfigError(
            f"eos_token_id={given} in {source} is no token: leave it out. Without a stop token "
            "every response has response_length tokens."
        )
    return ids
