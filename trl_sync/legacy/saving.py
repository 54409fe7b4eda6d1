"""Saving, publishing and describing the model of the step API."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from trl_sync.errors import ConfigError

MODEL_CARD = """---
library_name: transformers
tags:
- trl
- ppo
- trl-sync
---

# {model_name}

A language model trained with PPO by trl-sync, with a value
head.

```python
from transformers import AutoTokenizer
from trl_sync import {model_class}

tokenizer = AutoTokenizer.from_pretrained("{model_id}")
model = {model_class}.from_pretrained("{model_id}")
```

Without the value head it loads as any other model of transformers or PEFT.
"""


class SavingMixin:
    """`save_pretrained`, `push_to_hub` and `create_model_card` of the trainer."""

    accelerator: Any
    model: Any
    tokenizer: Any

    def save_pretrained(
        self,
        save_directory: Any,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_to_hub_kwargs: Any,
    ) -> None:
        """Saves model, value head, tokenizer and model card; every process must call it.

        With `push_to_hub` they are uploaded too, to `repo_id` or a repository named as the folder,
        with the other arguments of `push_to_hub`.

        Raises:
            ConfigError: arguments that have an effect with `push_to_hub` alone.
        """
        unused = [*(["repo_id"] if repo_id else []), *push_to_hub_kwargs]
        if unused and not push_to_hub:
            raise ConfigError(f"{', '.join(unused)} has no effect without push_to_hub=True.")
        if self.accelerator.is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self._save_pretrained(save_directory)
        self.accelerator.wait_for_everyone()
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **push_to_hub_kwargs)

    def _save_pretrained(self, save_directory: Any) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)
        self.create_model_card(str(save_directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: Any = None,
        ignore_patterns: Any = None,
        delete_patterns: Any = None,
        config: Any = None,
    ) -> str | None:
        """Uploads what `save_pretrained` saves, from the main process; returns the address.

        On the other processes, which must call it too, None. Patterns choose among the files, as in
        `huggingface_hub.HfApi.upload_folder`.

        Raises:
            ConfigError: a `config`, in place of which the model's own is saved.
        """
        if config is not None:
            raise ConfigError(
                "config has no effect: the model is saved with its own. Leave it out."
            )
        address = None
        if self.accelerator.is_main_process:
            api = HfApi(token=token)
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            with tempfile.TemporaryDirectory() as folder:
                self._save_pretrained(folder)
                self.create_model_card(folder, model_id=repo)
                commit = api.upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                    allow_patterns=allow_patterns,
                    ignore_patterns=ignore_patterns,
                    delete_patterns=delete_patterns,
                )
            address = str(commit)
        self.accelerator.wait_for_everyone()
        return address

    def create_model_card(
        self, path: str, model_name: str = "TRL Model", model_id: str | None = None
    ) -> None:
        """Writes `README.md` into that folder; asks no server."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        model_class = type(self.accelerator.unwrap_model(self.model)).__name__
        card = MODEL_CARD.format(
            model_name=model_name, model_class=model_class, model_id=model_id or folder.name
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
