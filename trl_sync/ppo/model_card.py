"""The README.md of a trained policy, and what the stock Trainer leaves out when it uploads."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_sync._version import __version__
from trl_sync.backbone.export import VALUE_FOLDER
from trl_sync.ppo.config import PPOConfig

FILE = "README.md"
TAGS = ("trl", "ppo", "trl-sync")
# By this line a card that was written by hand is told from one that may be replaced.
_GENERATED = "<!-- Written by trl_sync when the model was saved. -->"
_PACKAGES = ("trl", "transformers", "peft", "accelerate", "torch", "datasets", "tokenizers")
_SETTINGS = (
    *("learning_rate", "value_learning_rate", "lr_scheduler_type", "batch_size"),
    *("num_mini_batches", "num_ppo_epochs", "num_generations", "response_length", "temperature"),
    *("stop_token", "stop_token_id", "missing_eos_penalty", "kl_coef", "kl_estimator", "kl_target"),
    *("target_kl", "cliprange", "cliprange_high", "cliprange_value", "vf_coef", "gamma", "lam"),
    *("value_lam", "whiten_rewards", "reward_weights", "max_grad_norm", "bf16", "seed"),
)
_REFERENCES = """\
```bibtex
@article{schulman2017ppo,
  title   = {Proximal Policy Optimization Algorithms},
  author  = {Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and
             Klimov, Oleg},
  journal = {arXiv preprint arXiv:1707.06347},
  year    = {2017}
}

@article{ziegler2019preferences,
  title   = {Fine-Tuning Language Models from Human Preferences},
  author  = {Ziegler, Daniel M. and Stiennon, Nisan and Wu, Jeffrey and Brown, Tom B. and
             Radford, Alec and Amodei, Dario and Christiano, Paul and Irving, Geoffrey},
  journal = {arXiv preprint arXiv:1909.08593},
  year    = {2019}
}
```"""


def model_card(
    config: PPOConfig,
    *,
    model_name: str,
    base_model: str | None,
    is_adapter: bool,
    episodes: int,
    model_id: str | None = None,
    dataset_name: str | None = None,
    tags: Iterable[str] = (),
    run_url: str | None = None,
) -> ModelCard:
    """The card of a policy: what it is, how to load it, how it was trained.

    `base_model` is a name on the hub or a path; only a name becomes metadata. `model_id` is where
    the model will lie on the hub, if it will.
    """
    on_hub = _hub_name(base_model)
    data = ModelCardData(
        base_model=on_hub,
        base_model_relation=None if on_hub is None else "adapter" if is_adapter else "finetune",
        datasets=dataset_name,
        library_name="peft" if is_adapter else "transformers",
        model_name=model_name,
        pipeline_tag="text-generation",
        tags=[*TAGS, *(["lora"] if is_adapter else []), *(t for t in tags if t not in TAGS)],
    )
    kind = "LoRA adapter" if is_adapter else "language model"
    of_base = "" if not base_model else f" of `{on_hub or Path(base_model).name}`"
    data_used = "" if dataset_name is None else f" on prompts of `{dataset_name}`"
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"{_GENERATED}\n",
        f"# {model_name}\n",
        f"A {kind}{of_base}, trained with PPO{data_used}: {episodes} episodes of "
        "[trl_sync](https://pypi.org/project/trl-sync/) for "
        "[TRL](https://github.com/huggingface/trl).\n",
        *([] if run_url is None else [f"Its training run: <{run_url}>.\n"]),
        f"The value model lies in `{VALUE_FOLDER}/`; it is needed to train on, not to generate.\n",
        f"## Use\n\n{_usage(model_id or model_name, is_adapter)}\n",
        f"## Training\n\n{_settings(config)}\n",
        f"## Versions\n\n{_versions()}\n",
        f"## References\n\n{_REFERENCES}\n",
    ]
    return ModelCard("\n".join(parts))


def save_card(
    trainer: Any,
    folder: str | Path,
    *,
    replace: bool,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Iterable[str] | None = None,
) -> None:
    """Writes README.md about the trainer's policy into `folder`, on the main process alone.

    With `replace=False` not over a card that was written by hand.
    """
    folder = Path(folder)
    if not trainer.is_world_process_zero() or not (replace or _may_replace(folder / FILE)):
        return
    model_id = trainer.hub_model_id or trainer.args.hub_model_id
    card = model_card(
        trainer.args,
        model_name=model_name
        or (model_id or Path(trainer.args.output_dir).resolve().name).rpartition("/")[2],
        base_model=getattr(trainer.backbone.config, "_name_or_path", None),
        is_adapter=trainer.is_peft_model,
        episodes=trainer.episodes,
        model_id=model_id,
        dataset_name=dataset_name,
        tags=_tag_list(tags),
        run_url=_wandb_url(trainer.args.report_to),
    )
    folder.mkdir(parents=True, exist_ok=True)
    card.save(folder / FILE)


def _may_replace(file: Path) -> bool:
    return not file.is_file() or _GENERATED in file.read_text(encoding="utf-8")


def _hub_name(name_or_path: str | None) -> str | None:
    """The name of a model on the hub, or None for a local one."""
    if not name_or_path or Path(name_or_path).exists() or name_or_path.count("/") > 1:
        return None
    return None if name_or_path.startswith((".", "/", "~")) else name_or_path


def _wandb_url(report_to: Iterable[str]) -> str | None:
    """Where the run can be seen on wandb, if one is open and online."""
    if "wandb" not in report_to:
        return None
    import wandb

    return None if wandb.run is None else wandb.run.url


def _tag_list(tags: str | Iterable[str] | None) -> list[str]:
    """One tag or several as a list, with `hf_jobs` where Hugging Face runs the job."""
    given = [tags] if isinstance(tags, str) else list(tags or ())
    return [*dict.fromkeys(given), *(["hf_jobs"] if "JOB_ID" in os.environ else [])]


class PushValueModel(TrainerCallback):
    """Puts the value model of a checkpoint beside the policy that is uploaded from it.

    The stock Trainer copies the policy's files from the checkpoint into `output_dir` and uploads
    that; it knows nothing of `value/`, which would be missing or older than the policy.
    """

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copies `value/` from the checkpoint of this step, if there is one."""
        folder = Path(args.output_dir)
        value = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / VALUE_FOLDER
        if state.is_world_process_zero and value.is_dir():
            shutil.copytree(value, folder / VALUE_FOLDER, dirs_exist_ok=True)


def _usage(model: str, is_adapter: bool) -> str:
    loading = (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{model}")\n'
        if is_adapter
        else "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{model}")\n'
    )
    return f'```python\n{loading}tokenizer = AutoTokenizer.from_pretrained("{model}")\n```'


def _settings(config: PPOConfig) -> str:
    values: Mapping[str, Any] = config.to_dict()
    rows = [f"| {n} | {values[n]} |" for n in _SETTINGS if values.get(n) is not None]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _versions() -> str:
    versions = [f"- {name}: {importlib.metadata.version(name)}" for name in _PACKAGES]
    return "\n".join([f"- trl-sync: {__version__}", *versions])


class ModelCardMixin(Trainer):
    """Writes a model card with whatever is saved."""

    _card_arguments: Mapping[str, Any] = {}

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes README.md into `output_dir`: what the model is and how it was trained.

        Saving writes it anew with the same arguments, but not over one that was written by hand.
        `push_to_hub` takes the same arguments. The main process writes.
        """
        self._card_arguments = {
            "model_name": model_name,
            "dataset_name": dataset_name,
            "tags": tags,
        }
        save_card(self, self.args.output_dir, replace=True, **self._card_arguments)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves what trains, with a model card; that of a checkpoint lies in `args.output_dir`.

        The policy and the tokenizer into `output_dir` (default: that of `args`), the value model
        into `value` below it. Every process calls it.

        Raises:
            CheckpointError: under DeepSpeed and FSDP2, another process could not write.
        """
        folder = self.args.output_dir if _internal_call or output_dir is None else output_dir
        save_card(self, folder, replace=False, **self._card_arguments)
        super().save_model(output_dir, _internal_call)
