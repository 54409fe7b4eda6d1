"""Reward models: frozen, and fed the tokens that they know."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from trl_sync.backbone.quantization import keep_packed_weights
from trl_sync.backbone.roles import freeze
from trl_sync.backbone.scalar_head import without_adapters
from trl_sync.errors import ConfigError
from trl_sync.ppo.batch import Rollout
from trl_sync.ppo.prompts import check_tokenizer
from trl_sync.ppo.rewards.heads import sequence_scorer
from trl_sync.ppo.rewards.source import Reward, Source
from trl_sync.ppo.rewards.tokens import (
    OwnTokens,
    PolicyTokens,
    find_tokenizer,
    parts_by_length,
    vocabulary_difference,
)

logger = logging.get_logger(__name__)


# Their first position is behind that of the padding token.
_OFFSET_POSITIONS = (
    "camembert",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)


class ModelReward(Source):
    """A frozen model that makes one number of prompt and response.

    | kind | its number |
    |---|---|
    | decoder classifier with a `score` head, also a PEFT model of one | at the last real token |
    | model with a value head (`pretrained_model`, `v_head`) | at the last real token |
    | any other, an encoder classifier for example | its `.logits`, of shape [B, 1] |

    The model reads the policy's token ids if its own tokenizer, found beside its weights or at
    `path`, has the same vocabulary, or if none is found. Otherwise it reads the text, tokenized by
    its own tokenizer. `own_tokenizer` says which that is, and that the text is always tokenized
    anew with it, even if the vocabularies agree.

    Raises:
        ConfigError: the model cannot score sequences, gives several numbers for each, or does not
            fit the tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        device: torch.device,
        own_tokenizer: PreTrainedTokenizerBase | None = None,
        path: str | None = None,
        conversational: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        # Scripts may have wrapped or compiled it.
        self.model = extract_model_from_parallel(model, keep_torch_compile=False)
        self.name = "reward model"
        self._batch_size = batch_size
        language_model = language_model_of(self.model)
        own = own_tokenizer or _other_tokenizer(language_model, path, tokenizer)
        embeddings = _num_embeddings(language_model)
        if embeddings is not None:
            check_tokenizer(own or tokenizer, embeddings, "reward model")
        freeze(self.model)
        keep_packed_weights(self.model)
        if not getattr(without_adapters(self.model), "is_quantized", False):
            self.model.to(device)
        pad_id = _pad_id(language_model, own or tokenizer)
        self._scorer = sequence_scorer(self.model, pad_id)
        context = _context(getattr(language_model, "config", None))
        self._tokens: PolicyTokens | OwnTokens = PolicyTokens(context=context)
        if own is not None:
            self._tokens = OwnTokens(
                own,
                tokenizer,
                context=context,
                conversational=conversational,
                chat_template_kwargs=chat_template_kwargs,
            )

    @torch.no_grad()
    def reward(self, rollout: Rollout, adapter_scores: Float[Tensor, " B"] | None = None) -> Reward:
        ids, mask = self._tokens(rollout)
        scores = torch.zeros(len(ids), device=ids.device)
        for rows, *part in parts_by_length(ids, mask, self._batch_size):
            scores[rows] = self._scorer(*part).float()
        return Reward(scores=scores)


def model_name(model: Any) -> str:
    """The hub name or folder a model was loaded from; empty if it was made here."""
    return str(
        getattr(getattr(language_model_of(model), "config", None), "_name_or_path", "") or ""
    )


def language_model_of(model: Any) -> Any:
    """The model inside PEFT's wrapper and below a value head."""
    inner = without_adapters(model)
    return without_adapters(getattr(inner, "pretrained_model", inner))


def _other_tokenizer(
    language_model: Any, path: str | None, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """The reward model's own tokenizer, if it is found and gives tokens other ids."""
    for name in (path, model_name(language_model)):
        own = find_tokenizer(name) if name else None
        if own is not None:
            difference = vocabulary_difference(own, tokenizer)
            if difference is None:
                return None
            logger.info(
                f"The reward model in {name} has another vocabulary ({difference}): it reads the "
                "text, tokenized with its own tokenizer."
            )
            return own
    return None


def _context(config: Any) -> int | None:
    """How many tokens fit; None if the config does not say."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and getattr(config, "model_type", "") in _OFFSET_POSITIONS:
        positions -= config.pad_token_id + 1
    return positions


def _num_embeddings(language_model: Any) -> int | None:
    get = getattr(language_model, "get_input_embeddings", None)
    try:
        embeddings = None if get is None else get()
    except NotImplementedError:
        return None
    return None if embeddings is None else int(embeddings.weight.shape[0])


def _pad_id(language_model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    of_model = getattr(getattr(language_model, "config", None), "pad_token_id", None)
    ids = (of_model, tokenizer.pad_token_id, 0)
    return next(int(i) for i in ids if i is not None)


def check_reward_tokenizer(tokenizer: Any) -> None:
    """Nothing, if `tokenizer` is one.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"reward_processing_classes must hold tokenizers, got {type(tokenizer).__name__}."
        )
