"""Rows of a conversational dataset as arguments of a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template


def render(
    conversation: Mapping[str, Sequence[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Any = None,
    own_arguments: Any = None,
    arguments: Mapping[str, Any],
) -> dict[str, str]:
    """Messages under `prompt` or `messages` as text under the same name.

    `tools` and `own_arguments` are as a row holds them: nested, as JSON, or None. The row's own
    template arguments win over `arguments`. Raises what templates raise.
    """
    messages = {name: [_message(part) for part in parts] for name, parts in conversation.items()}
    options = {**arguments, **(_nested(own_arguments) or {})}
    rendered: dict[str, str] = apply_chat_template(
        messages, tokenizer, tools=_nested(tools), **options
    )
    return rendered


def _nested(value: Any) -> Any:
    """A nested column: from JSON, or without the keys that only other rows have."""
    return json.loads(value) if isinstance(value, str) else _without_none(value)


def _without_none(value: Any) -> Any:
    """`value` without dictionary entries that are None: Arrow gives a row the keys of all rows."""
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _message(message: dict[str, Any]) -> dict[str, Any]:
    # Templates look at `content` even where tool calls stand in its place.
    kept = {"content": message["content"]} if "content" in message else {}
    return {**_without_none(message), **kept}
