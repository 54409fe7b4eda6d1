"""`generate`: responses to queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl_sync.errors import ConfigError


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
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Responses to a query, as a tensor (1, length), or to a list of queries, as a list.

        `return_prompt` puts the query before its response; `length_sampler` draws
        `max_new_tokens`. With `generate_ref_response` a pair: the responses of the model and those
        of the reference.

        Raises:
            ConfigError: a query is not a tensor of one dimension.
        """
        queries = query_tensor if isinstance(query_tensor, list) else [query_tensor]
        if any(query.dim() != 1 for query in queries):
            raise ConfigError("query_tensor must be a tensor of one dimension or a list of them.")

        def answer(model: Any) -> Any:
            responses = self._generate_batched(
                model,
                queries,
                length_sampler,
                batch_size,
                return_prompt,
                **generation_kwargs,
            )
            return responses if isinstance(query_tensor, list) else responses[0].unsqueeze(0)

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
        inner = self.accelerator.unwrap_model(model)
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id
        with generating(inner):
            return generate_list(
                inner.pretrained_model,
                query_tensors,
                pad_token_id=pad or 0,
                batch_size=batch_size,
                length_sampler=length_sampler,
                return_prompt=return_prompt,
                remove_padding=remove_padding,
                pad_to_multiple_of=pad_to_multiple_of,
                device=self.current_device,
                options=generation_kwargs,
            )


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
    batch_size: int,
    length_sampler: Callable[[], int] | None,
    return_prompt: bool,
    remove_padding: bool,
    pad_to_multiple_of: int | None,
    device: Any,
    options: dict[str, Any],
) -> list[Tensor]:
    """A response to each query, in their order, without padding.

    A response ends with the first token that ends generation. What is padding follows from lengths,
    so padding with that same token hides nothing.
    """
    encoder_decoder = bool(model.config.is_encoder_decoder)
    stops = _stop_tokens(model, options)
    responses: list[Tensor] = []
    for start in range(0, len(queries), batch_size):
        batch = queries[start : start + batch_size]
        if length_sampler is not None:
            options = options | {"max_new_tokens": length_sampler()}
        tokens, mask = _pad_left(batch, pad_token_id, pad_to_multiple_of)
        generated = model.generate(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            **({"pad_token_id": pad_token_id} | options),
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
