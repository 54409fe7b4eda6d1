"""One role of a shared backbone as scripts expect a model: callable, generating, saved alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_sync.backbone.roles import VALUE

_CHANGES_THE_BASE = frozenset(
    {
        *("train", "requires_grad_", "resize_token_embeddings", "set_adapter", "add_adapter"),
        *("load_adapter", "delete_adapter", "disable_adapters", "enable_adapters"),
    }
)


class RoleView:
    """Policy or value model of a `SharedBackbone`, for scripts that want a model.

    What it does not have itself (`config`, `device`, `dtype`, `generation_config`, ...) is the
    causal LM's. It holds no tensors of its own.
    """

    def __init__(self, backbone: Any, role: str) -> None:
        self._backbone = backbone
        self._role = role

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """What the model of this role returns; of the value role `logits` [B, T, 1] are the values.

        Arguments are those of the causal LM, or of its trunk for the value role.
        """
        model = self._backbone.causal_model
        with self._route():
            if self._role != VALUE:
                return model(input_ids=input_ids, **kwargs)
            trunk = getattr(model, model.base_model_prefix)
            output = trunk(input_ids=input_ids, **kwargs)
            mask = torch.ones_like(input_ids, dtype=torch.bool)
            output["logits"] = self._backbone._values(output.last_hidden_state, mask)[..., None]
            return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The causal LM's own `generate` with this role's adapter, in evaluation mode."""
        self._backbone.eval()
        with self._route():
            return self._backbone.causal_model.generate(*args, **kwargs)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that belong to this role alone."""
        yield from self._backbone.role_parameters(self._role)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that belong to this role alone."""
        for _, parameter in self.named_parameters():
            yield parameter

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes this role's adapter in PEFT's layout, of the value role its head too."""
        from trl_sync.backbone.export import save_policy, save_value

        save = save_value if self._role == VALUE else save_policy
        save(self._backbone, Path(save_directory))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _CHANGES_THE_BASE:
            raise AttributeError(
                f"{name}() of one role would change the base that all roles share: call it on the "
                "model before the trainer is made, or pass a value_model to train separate models."
            )
        return getattr(self._backbone.causal_model, name)

    def _route(self) -> Any:
        return self._backbone.router.routes(self._backbone.roles[self._role].adapter)
