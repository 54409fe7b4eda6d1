"""Reward functions: what they are given, and how their answers are read."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_sync.errors import RewardError
from trl_sync.ppo.batch import Rollout
from trl_sync.ppo.rewards.event_loop import run_together
from trl_sync.ppo.rewards.source import Reward, Source

RewardFunction = Callable[..., Any]

_OWN_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state")


class FunctionReward(Source):
    """A function of prompts, completions and the dataset's other columns, or an object like one.

    It is called with those of these keywords that it accepts; all of them if it takes `**kwargs` or
    has no signature to read:

    - `prompts`, `completions`: lists of text, or of messages for a conversational dataset;
    - `completion_ids`: the token ids of each response, a list of lists;
    - `trainer_state`: the trainer's `TrainerState`, if it has one;
    - each further column of the dataset. Columns with one of the names above are not passed.

    It returns one entry per episode, in a list, a tensor or an array: a number, None where it does
    not apply, or instead of numbers one list per episode with a number for each response token. An
    `async` function is awaited; several of them run concurrently.
    """

    def __init__(
        self,
        function: RewardFunction,
        tokenizer: PreTrainedTokenizerBase,
        *,
        conversational: bool,
        trainer_state: Callable[[], Any] | None = None,
    ) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self.is_async = _is_async(function)
        self._function = function
        self._tokenizer = tokenizer
        self._conversational = conversational
        self._trainer_state = trainer_state
        self._accepted = _keywords(function)

    def reward(self, rollout: Rollout, adapter_scores: Float[Tensor, " B"] | None = None) -> Reward:
        if self.is_async:
            reward: Reward = run_together([self.reward_async(rollout)])[0]
            return reward
        answer = self._function(**self._arguments(rollout))
        if inspect.isawaitable(answer):
            answer = run_together([_result(answer)])[0]
        return self._read(answer, rollout)

    async def reward_async(self, rollout: Rollout) -> Reward:
        """What an `async` function says, for several of them in one event loop."""
        return self._read(await self._function(**self._arguments(rollout)), rollout)

    def _arguments(self, rollout: Rollout) -> dict[str, Any]:
        texts = completion_texts(rollout, self._tokenizer)
        own: dict[str, Any] = {
            "prompts": rollout.prompts.prompts,
            "completions": completion_messages(texts) if self._conversational else texts,
            "completion_ids": completion_ids(rollout),
        }
        if self._trainer_state is not None:
            own["trainer_state"] = self._trainer_state()
        columns = {n: v for n, v in rollout.prompts.columns.items() if n not in _OWN_KEYWORDS}
        missing = sorted(_required(self._function) - (own | columns).keys())
        if missing:
            raise RewardError(
                f"{self.name} takes {', '.join(missing)}, which the dataset does not have: its "
                f"columns are {sorted(columns)}. Add it, or give the parameter a default."
            )
        return {
            name: value
            for name, value in (own | columns).items()
            if self._accepted is None or name in self._accepted
        }

    def _read(self, answer: Any, rollout: Rollout) -> Reward:
        entries = _entries(answer, len(rollout.prompts), self.name)
        device = rollout.prompt_ids.device
        applies = torch.tensor([entry is not None for entry in entries], device=device)
        everywhere = bool(applies.all())
        first = next((entry for entry in entries if entry is not None), None)
        if isinstance(first, list):
            by_token = _token_rewards(entries, rollout, self.name).to(device)
            return Reward(
                scores=by_token.sum(1),
                token_rewards=by_token,
                applies=None if everywhere else applies,
            )
        lengths = rollout.response_mask.sum(1).tolist()
        for position, entry in enumerate(entries):
            if entry is not None and not isinstance(entry, (int, float)):
                raise RewardError(_wrong_entry(self.name, entry, position, lengths[position]))
        scores = torch.tensor([entry or 0.0 for entry in entries], dtype=torch.float32)
        return Reward(scores=scores.to(device), applies=None if everywhere else applies)


def completion_ids(rollout: Rollout) -> list[list[int]]:
    """The token ids of each response."""
    rows = zip(rollout.response_ids, rollout.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def completion_texts(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The responses as text, without special tokens."""
    texts: list[str] = tokenizer.batch_decode(completion_ids(rollout), skip_special_tokens=True)
    return texts


def completion_messages(texts: list[str]) -> list[list[dict[str, str]]]:
    """Each text as what the assistant says."""
    return [[{"role": "assistant", "content": text}] for text in texts]


async def _result(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _is_async(function: RewardFunction) -> bool:
    of_object = getattr(type(function), "__call__", None)  # noqa: B004 - the method is looked at
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(of_object)


def _keywords(function: RewardFunction) -> set[str] | None:
    """The keywords that `function` accepts, or None if that is any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # written in C, without a signature
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def _required(function: RewardFunction) -> set[str]:
    """The keywords that `function` cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # written in C, without a signature
        return set()
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name for p in parameters if p.default is p.empty and p.kind not in several}


def _entries(answer: Any, expected: int, name: str) -> list[Any]:
    """One entry per episode, in Python's own numbers and lists."""
    rows = isinstance(answer, Iterable) and not isinstance(answer, Mapping)
    if not rows or getattr(answer, "ndim", 1) == 0:
        raise RewardError(
            f"{name} returned {answer!r}: expected a list of {expected} numbers, one a completion."
        )
    entries = [
        [_number(value) for value in entry] if _is_row(entry) else _number(entry)
        for entry in answer
    ]
    if len(entries) != expected:
        raise RewardError(f"{name} returned {len(entries)} scores for {expected} completions.")
    return entries


def _is_row(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) or getattr(entry, "ndim", 0) == 1


def _number(value: Any) -> Any:
    """Python's own number for an element of a tensor or an array."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _token_rewards(entries: list[Any], rollout: Rollout, name: str) -> Float[Tensor, "B R"]:
    rewards = torch.zeros(rollout.response_mask.shape, dtype=torch.float32)
    for position, (row, length) in enumerate(
        zip(entries, rollout.response_mask.sum(1).tolist(), strict=True)
    ):
        if row is None:
            continue
        numbers = isinstance(row, list) and all(isinstance(v, (int, float)) for v in row)
        if not numbers or len(row) != length:
            raise RewardError(_wrong_entry(name, row, position, length))
        # The tokens of a response lie at its beginning.
        rewards[position, :length] = torch.tensor(row, dtype=torch.float32)
    return rewards


def _wrong_entry(name: str, entry: Any, position: int, length: int) -> str:
    return (
        f"{name} returned {entry!r} for completion {position}: expected a number, or for every "
        f"completion a list with a number for each of its tokens (here {length})."
    )
