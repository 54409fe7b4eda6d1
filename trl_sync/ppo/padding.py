"""Rows of a batch with no more padding than the longest of them needs.

A batch has its prompts padded on the left and its responses on the right, each as wide as the
longest of all. Some of its rows are moved right until each ends in the last column, so that they
are together only as wide as the longest of their sequences; the tokens stay in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How many tokens the prompt and the response of each row have, in the host's memory.

    What is cut by them needs no synchronisation with a device.
    """

    prompts: Int[Tensor, " B"]
    responses: Int[Tensor, " B"]

    @classmethod
    def of(cls, prompt_mask: Bool[Tensor, "B P"], response_mask: Bool[Tensor, "B R"]) -> Lengths:
        """Those of the masks; waits for the device once."""
        sums = torch.stack([prompt_mask.sum(1), response_mask.sum(1)]).cpu()
        return cls(prompts=sums[0], responses=sums[1])

    def parts(
        self, size: int, rows: Int[Tensor, " N"] | None = None
    ) -> tuple[Int[Tensor, " n"], ...]:
        """`rows` (default: all) in parts of at most `size`, those of similar length together."""
        totals = self.prompts + self.responses
        if rows is None:
            rows = torch.arange(len(totals))
        return rows[totals[rows].argsort(stable=True)].split(size)


class RightAligned:
    """The `rows` of a batch, each of which ends in the last column.

    `prompt_width` is how many columns the batch has for prompts.
    """

    def __init__(
        self,
        rows: Int[Tensor, " N"],
        lengths: Lengths,
        *,
        prompt_width: int,
        device: torch.device,
    ) -> None:
        prompts, responses = lengths.prompts[rows], lengths.responses[rows]
        # A column stays where all responses are empty, so that a pass has an output, and one in
        # front of it, from which the first token is predicted.
        self._num_response = max(1, int(responses.max()))
        counted = torch.arange(self._num_response) >= self._num_response - responses.unsqueeze(1)
        # Of the response tokens in the flattened mask of the cut responses.
        self.response_positions = counted.flatten().nonzero().squeeze(1).to(device)
        width = max(2, int((prompts.clamp(min=1) + responses).max()))
        moved = torch.stack([rows, prompts, responses]).to(device)
        self._rows, prompts, responses = moved.unsqueeze(2)  # each [N, 1]
        columns = torch.arange(width, device=device)
        self._sequence_columns = (columns + prompt_width + responses - width).clamp(min=0)
        self._is_token = columns >= width - prompts - responses
        columns = torch.arange(self._num_response, device=device)
        self._response_columns = (columns + responses - self._num_response).clamp(min=0)
        self._is_response = columns >= self._num_response - responses
        self._columns_back = (columns + self._num_response - responses).clamp(
            max=self._num_response - 1
        )
        self._is_back = columns < responses

    def sequences(self, tensor: Shaped[Tensor, "B T"]) -> Shaped[Tensor, "N t"]:
        """What `tensor` holds for the tokens of prompts and responses, 0 elsewhere."""
        return tensor[self._rows, self._sequence_columns].masked_fill(~self._is_token, 0)

    def responses(self, tensor: Shaped[Tensor, "B R"]) -> Shaped[Tensor, "N r"]:
        """What `tensor` holds for the tokens of responses, 0 elsewhere."""
        return tensor[self._rows, self._response_columns].masked_fill(~self._is_response, 0)

    def write_back(self, part: Shaped[Tensor, "N r"], into: Shaped[Tensor, "B R"]) -> None:
        """The inverse of `responses`: writes the rows of `part` where `into` has them."""
        values = part.gather(1, self._columns_back).masked_fill(~self._is_back, 0)
        into[self._rows.squeeze(1), : self._num_response] = values.to(into.dtype)
