"""The helpers that scripts import from TRL's `ppo_trainer` and `utils` modules, under their names.

The trainer of this package uses none of them: it passes masks along, while these read padding off
the token ids. They are here so that a script that calls them keeps its numbers. Axes: B sequences,
P prompt tokens, R response tokens, T = P + R, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from jaxtyping import Bool, Float, Int, Shaped
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import GenerationConfig, TrainerState
from transformers.utils import is_torch_xpu_available
from trl.trainer.utils import selective_log_softmax

from trl_sync.backbone.checkpointing import (
    disable_checkpointing,
    enable_checkpointing,
    is_checkpointing,
)
from trl_sync.backbone.views import RoleView
from trl_sync.errors import ConfigError

__all__ = [
    "INVALID_LOGPROB",
    "SIMPLE_CHAT_TEMPLATE",
    "OnlineTrainerState",
    "PolicyAndValueWrapper",
    "batch_generation",
    "exact_div",
    "first_true_indices",
    "forward",
    "generate",
    "get_kbit_device_map",
    "get_reward",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "print_rich_table",
    "selective_log_softmax",
    "truncate_response",
]

# What TRL writes where a response has no token.
INVALID_LOGPROB = 1.0

# "User: Hello.", an empty line, and "Assistant:" where an answer is asked for.
SIMPLE_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}{{ '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass
class OnlineTrainerState(TrainerState):
    """A `TrainerState` that also counts episodes, in `episode`."""

    episode: int = 0


class PolicyAndValueWrapper(nn.Module):
    """Policy and value model as one module: calling it gives the policy's output and the values.

    `value_model` is a sequence classifier with a `score` head. Unlike TRL's, its trunk is not
    registered a second time, so `state_dict` holds each tensor once, and checkpointing is switched
    for both models.

    Raises:
        ConfigError: `value_model` has no `score` head on a trunk, or is a view of a shared
            backbone.
    """

    def __init__(self, policy: Any, value_model: Any) -> None:
        super().__init__()
        self.policy: Any = policy
        self.value_model: Any = value_model
        _trunk(value_model)
        self.is_gradient_checkpointing = is_checkpointing(policy)

    @property
    def critic_backbone(self) -> nn.Module:
        """The value model without its head."""
        return _trunk(self.value_model)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recomputes activations in backward, in both models.

        The arguments are those of torch's `checkpoint`.

        Raises:
            ConfigError: one of them cannot.
        """
        for model in (self.policy, self.value_model):
            enable_checkpointing(model, gradient_checkpointing_kwargs)
        self.is_gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations for backward, in both models.

        Raises:
            ConfigError: one of them could never recompute them.
        """
        for model in (self.policy, self.value_model):
            disable_checkpointing(model)
        self.is_gradient_checkpointing = False

    def forward(self, **kwargs: Any) -> tuple[Any, Float[Tensor, "B T 1"]]:
        """The policy's output, and one value a position. Pass `output_hidden_states=True`."""
        hidden = self.critic_backbone(**kwargs).hidden_states[-1]
        return self.policy(**kwargs), self.value_model.score(hidden)


def generate(
    lm_backbone: Any,
    queries: Int[Tensor, "B P"],
    pad_token_id: int,
    generation_config: GenerationConfig,
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B R V"]]:
    """The queries with their sampled responses, and the scores each token was drawn from.

    The queries come back as they were, left padding included.
    """
    inputs = _padded_inputs(queries, pad_token_id)
    output = lm_backbone.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_config=generation_config,
        return_dict_in_generate=True,
        output_scores=True,
    )
    responses = output.sequences[:, queries.shape[1] :]
    return torch.cat((queries, responses), dim=1), torch.stack(output.scores, dim=1)


@torch.no_grad()
def batch_generation(
    model: nn.Module,
    queries: Int[Tensor, "B P"],
    local_rollout_forward_batch_size: int,
    pad_token_id: int,
    generation_config: GenerationConfig,
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B R V"]]:
    """`generate` in batches of that size, without gradients.

    Responses of different lengths are padded on the right, tokens with `pad_token_id` and scores
    with zeros. The scores of the whole batch are held in memory: B x R x V floats.
    """
    parts = [
        generate(model, some, pad_token_id, generation_config)
        for some in queries.split(local_rollout_forward_batch_size)
    ]
    sequences, scores = zip(*parts, strict=True)
    return _stacked(sequences, pad_token_id), _stacked(scores, 0)


def truncate_response(
    stop_token_id: int, pad_token_id: int, responses: Int[Tensor, "*B R"]
) -> Int[Tensor, "*B R"]:
    """The responses with everything after their first stop token replaced by padding."""
    stops = first_true_indices(responses == stop_token_id).unsqueeze(-1)
    positions = torch.arange(responses.shape[-1], device=responses.device)
    return responses.masked_fill(positions > stops, pad_token_id)


def forward(model: nn.Module, query_responses: Int[Tensor, "B T"], pad_token_id: int) -> Any:
    """The model's output for sequences padded with that token, all hidden states included."""
    inputs = _padded_inputs(query_responses, pad_token_id)
    return model(**inputs, return_dict=True, output_hidden_states=True)


def get_reward(
    model: Any, query_responses: Int[Tensor, "B T"], pad_token_id: int, context_length: int
) -> tuple[Float[Tensor, "B T 1"], Float[Tensor, " B"], Int[Tensor, " B"]]:
    """A sequence classifier's score at every position, at each response's end, and where that is.

    A response begins at `context_length` and ends before its first padding token; an empty one is
    scored at the last token of the query.

    Raises:
        ConfigError: the model has no `score` head on a trunk, or is a view of a shared backbone.
    """
    inputs = _padded_inputs(query_responses, pad_token_id)
    # Without a cache: some architectures refuse right-padded sequences with one.
    output = _trunk(model)(**inputs, return_dict=True, output_hidden_states=True, use_cache=False)
    scores = model.score(output.hidden_states[-1])
    padding = query_responses[:, context_length:] == pad_token_id
    ends = context_length + first_true_indices(padding) - 1
    rows = torch.arange(scores.shape[0], device=scores.device)
    return scores, scores[rows, ends].squeeze(-1), ends


def first_true_indices(
    bools: Bool[Tensor, "*B R"], dtype: torch.dtype = torch.long
) -> Shaped[Tensor, "*B"]:
    """For each row the index of its first True, or the length of the row if there is none."""
    length = bools.shape[-1]
    positions = torch.arange(length, dtype=dtype, device=bools.device)
    return torch.where(bools, positions, torch.full_like(positions, length)).amin(dim=-1)


def masked_mean(
    values: Shaped[Tensor, "*B"], mask: Shaped[Tensor, "*M"], axis: int | None = None
) -> Shaped[Tensor, "*A"]:
    """The mean of the values where the mask is True, of everything or along one axis.

    NaN where the mask is empty.
    """
    if axis is None:
        return (values * mask).sum() / mask.sum()
    return (values * mask).sum(dim=axis) / mask.sum(dim=axis)


def masked_var(
    values: Shaped[Tensor, "*B"], mask: Shaped[Tensor, "*M"], unbiased: bool = True
) -> Shaped[Tensor, ""]:
    """The variance of the values where the mask is True; infinite or NaN for one value, unbiased.

    Raises:
        ValueError: the mask is empty and the variance is to be unbiased.
    """
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    if not unbiased:
        return variance
    count = mask.sum()
    if count == 0:
        raise ValueError(
            "The mask is empty, so there is no variance. A mini-batch without a single response "
            "token does this: use a larger mini-batch."
        )
    return variance * (count / (count - 1))


def masked_whiten(
    values: Shaped[Tensor, "*B"], mask: Shaped[Tensor, "*M"], shift_mean: bool = True
) -> Shaped[Tensor, "*B"]:
    """The values scaled to unit variance where the mask is True, with mean 0 or their own mean.

    (x - mean) / sqrt(var + 1e-8) with the unbiased variance. Masked positions are scaled too; they
    do not count in mean and variance.

    Raises:
        ValueError: the mask is empty.
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return whitened if shift_mean else whitened + mean


def exact_div(a: int, b: int, custom_error_message: str = "") -> int:
    """`a / b` as an integer.

    Raises:
        ValueError: it is none; the message begins with `custom_error_message`.
    """
    quotient, rest = divmod(a, b)
    if rest:
        raise ValueError(f"{custom_error_message}, inexact division: {a} / {b} = {a / b}")
    return quotient


def print_rich_table(df: Any) -> None:
    """Prints a pandas DataFrame with a line between rows, its text as it is."""
    table = Table(show_lines=True)
    for name in df.columns:
        table.add_column(Text(str(name)))  # Text, because rich reads "[/b]" in a string as markup
    for row in df.itertuples(index=False, name=None):
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)


def get_kbit_device_map() -> dict[str, int | str] | None:
    """The `device_map` that puts a quantized model whole on this process's GPU; None on a CPU."""
    if is_torch_xpu_available():
        return {"": f"xpu:{PartialState().local_process_index}"}
    if torch.cuda.is_available():
        return {"": PartialState().local_process_index}
    return None


def _padded_inputs(tokens: Int[Tensor, "B T"], pad_token_id: int) -> dict[str, Tensor]:
    """Model inputs in which each padding token is token 0, unseen, and positions count the rest."""
    attention_mask = tokens != pad_token_id
    return {
        "input_ids": tokens.masked_fill(~attention_mask, 0),
        "attention_mask": attention_mask,
        "position_ids": attention_mask.cumsum(dim=1) - attention_mask.long(),
    }


def _stacked(parts: tuple[Tensor, ...], padding: int) -> Tensor:
    """The parts one below the other, padded on the right of their second axis to the longest."""
    length = max(part.shape[1] for part in parts)
    stacked = parts[0].new_full((sum(map(len, parts)), length, *parts[0].shape[2:]), padding)
    first = 0
    for part in parts:
        stacked[first : first + len(part), : part.shape[1]] = part
        first += len(part)
    return stacked


def _trunk(model: Any) -> nn.Module:
    """The model below the `score` head of a sequence classifier."""
    if isinstance(model, RoleView):
        raise ConfigError(
            "This is a view of a shared backbone, which has no trunk and no `score` head of its "
            "own: call it, trainer.value_model(input_ids).logits, or trainer.completions(). "
            "trainer.value_model is a model where separate models are used, with "
            "PPOTrainer(value_model=...)."
        )
    prefix = getattr(model, "base_model_prefix", None)
    if not prefix or not hasattr(model, prefix) or not hasattr(model, "score"):
        raise ConfigError(
            f"{type(model).__name__} is not a sequence classifier with a trunk (named by "
            "base_model_prefix) and a `score` head. Load the model with "
            "AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)."
        )
    return getattr(model, prefix)
