"""`generate`: responses to queries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trl_sync.errors import ConfigError

# What a list of queries cannot be given, because it decides what the model gets or returns.
_OF_ONE_QUERY = {
    **dict.fromkeys(("input_ids", "inputs", "inputs_embeds"), "the queries are the inputs"),
    **dict.fromkeys(("attention_mask", "position_ids"), "it follows from the queries' lengths"),
    "num_return_sequences": "repeat each query in the list",
    "return_dict_in_generate": "call generate of the model with padded queries",
}


class GenerationMixin:
    """`generate` of the trainer."""

    accelerator: Any
    current_device: Any
    model: Any
    optional_peft_ctx: Any
    ref_model: Any
    tokenizer: Any

    def generate(
        self,
        query_tensor: Any,
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """What the model's `generate` returns for a query, or a list of responses to a list.

        A query is a tensor of token ids, (P,); arrays and lists of numbers become one.

        For one query that is a tensor (1, length) unless `generation_kwargs` ask for another
        output; for a list each response ends with its first stop token or eos token of the
        tokenizer. `return_prompt` puts the query before its response; `length_sampler` draws
        `max_new_tokens`, of a list once for every `batch_size` queries, which are answered
        together. With `generate_ref_response` a pair: the responses of the model and those of the
        reference. `generation_kwargs` go to transformers' `generate`.

        Raises:
            ConfigError: a query is not a sequence of tokens, or an argument cannot be honoured.
        """
        queries = _queries(query_tensor)

        def answer(model: Any) -> Any:
            if isinstance(query_tensor, (list, tuple)):
                return self._generate_batched(
                    model, queries, length_sampler, batch_size, return_prompt, **generation_kwargs
                )
            options = dict(generation_kwargs)
            if length_sampler is not None:
                options["max_new_tokens"] = length_sampler()
            return self._generate_one(model, queries[0], return_prompt, options)

        responses = answer(self.model)
        if not generate_ref_response:
            return responses
        with self.optional_peft_ctx():
            return responses, answer(self.model if self.ref_model is None else self.ref_model)

    def _generate_batched(
        self,
        model: Any,
        query_tensors: list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        pad_to_multiple_of: int | None = None,
        remove_padding: bool = True,
        **generation_kwargs: Any,
    ) -> list[Tensor]:
        _check_options_of_list(generation_kwargs)
        inner = self.accelerator.unwrap_model(model)
        with generating(inner):
            return generate_list(
                inner.pretrained_model,
                query_tensors,
                pad_token_id=self._padding(),
                eos_token_id=self.tokenizer.eos_token_id,
                batch_size=batch_size,
                length_sampler=length_sampler,
                return_prompt=return_prompt,
                remove_padding=remove_padding,
                pad_to_multiple_of=pad_to_multiple_of,
                device=self.current_device,
                options=generation_kwargs,
            )

    def _generate_one(
        self, model: Any, query: Tensor, return_prompt: bool, options: dict[str, Any]
    ) -> Any:
        """What the model's own `generate` returns, without the query if it is a tensor."""
        inner = self.accelerator.unwrap_model(model)
        tokens = query.to(self.current_device).unsqueeze(0)
        # Every token of a query counts, also one that is the padding token.
        options = {"attention_mask": torch.ones_like(tokens)} | options
        options = _with_padding(options, self._padding())
        with generating(inner):
            generated = inner.generate(input_ids=tokens, **options)
        if return_prompt or inner.config.is_encoder_decoder:
            return generated
        if not isinstance(generated, Tensor):
            raise ConfigError(
                "return_prompt=False has no effect with return_dict_in_generate=True: cut the "
                "query off the sequences that come back."
            )
        return generated[:, len(query) :]

    def _padding(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; the mode is as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def generate_list(
    model: Any,
    queries: Sequence[Tensor],
    *,
    pad_token_id: int,
    eos_token_id: int | None,
    batch_size: int,
    length_sampler: Callable[[], int] | None,
    return_prompt: bool,
    remove_padding: bool,
    pad_to_multiple_of: int | None,
    device: Any,
    options: dict[str, Any],
) -> list[Tensor]:
    """A response to each query, in their order, without padding.

    A response ends with the first token that ends generation, or with `eos_token_id`, as in TRL,
    whose scripts switch the end of generation off and expect it. What is padding follows from
    lengths, so padding with that same token hides nothing.
    """
    encoder_decoder = bool(model.config.is_encoder_decoder)
    stops = _stop_tokens(model, options)
    if eos_token_id is not None:
        stops.append(eos_token_id)
    responses: list[Tensor] = []
    for start in range(0, len(queries), batch_size):
        batch = queries[start : start + batch_size]
        if length_sampler is not None:
            options = options | {"max_new_tokens": length_sampler()}
        tokens, mask = _pad_left(batch, pad_token_id, pad_to_multiple_of)
        generated = model.generate(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            **_with_padding(options, pad_token_id),
        )
        # The decoder's start token stands where a causal model has the prompt.
        prompt_width = 1 if encoder_decoder else tokens.shape[1]
        for row, query in zip(generated, batch, strict=True):
            end = len(row)
            if remove_padding:
                end = prompt_width + _length(row[prompt_width:], stops)
            begin = 0
            if not encoder_decoder:
                begin = prompt_width - (len(query) if return_prompt else 0)
            responses.append(row[begin:end])
    return responses


def _queries(given: Any) -> list[Tensor]:
    """One query or several as a list of tensors.

    Raises:
        ConfigError: they are not sequences of tokens.
    """
    queries = []
    for query in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(query, (np.ndarray, list, tuple)):
            query = torch.as_tensor(query)
        if not isinstance(query, Tensor) or query.dim() != 1 or query.is_floating_point():
            found = list(query.shape) if isinstance(query, Tensor) else type(query).__name__
            raise ConfigError(
                "query_tensor must be a tensor of tokens, of one dimension, or a list of them; "
                f"got {found}."
            )
        if len(query) == 0:
            raise ConfigError("A query is empty: there is nothing to continue.")
        queries.append(query)
    return queries


def _check_options_of_list(options: dict[str, Any]) -> None:
    """Nothing, if a list of queries can be answered with these arguments of `generate`.

    Raises:
        ConfigError: it cannot.
    """
    config = options.get("generation_config")
    for name, instead in _OF_ONE_QUERY.items():
        value = options.get(name, getattr(config, name, None))
        one = name == "num_return_sequences" and value == 1
        if not (value is None or value is False or one):
            raise ConfigError(f"generate() of a list of queries cannot take {name}: {instead}.")


def _with_padding(options: dict[str, Any], pad_token_id: int) -> dict[str, Any]:
    """The options with that padding, if they name none.

    With a `generation_config`, what transformers wants in it instead of beside it moves there.
    """
    options = dict(options)
    config = options.pop("generation_config", None)
    if config is None:
        return {"pad_token_id": pad_token_id} | options
    config = copy.deepcopy(config)
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id
    return config.update(**options) | {"generation_config": config}


def _pad_left(
    queries: Sequence[Tensor], pad_token_id: int, multiple: int | None
) -> tuple[Tensor, Tensor]:
    width = max(len(query) for query in queries)
    if multiple is not None:
        width = -(-width // multiple) * multiple
    tokens = torch.full((len(queries), width), pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, query in enumerate(queries):
        tokens[row, width - len(query) :] = query.cpu()
        mask[row, width - len(query) :] = 1
    return tokens, mask


def _stop_tokens(model: Any, options: dict[str, Any]) -> list[int]:
    stops = options.get("eos_token_id")
    if stops is None:
        config = options.get("generation_config") or model.generation_config
        stops = config.eos_token_id
    if stops is None:
        return []
    return [int(stop) for stop in torch.as_tensor(stops).flatten()]


def _length(response: Tensor, stops: list[int]) -> int:
    """Tokens up to the first stop token and with it; all if there is none."""
    if not stops:
        return len(response)
    ends = torch.isin(response, torch.tensor(stops, device=response.device)).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(response)
