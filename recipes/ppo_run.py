"""What every PPO recipe does around its trainer: flags, audit, training, saving, outcome."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from torch.nn import Module
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, TrlParser

from inputs import ScriptArguments, load_policy, make_parser, resume_choice
from trl_sync import ConfigError, DesyncError, PPOConfig, PPOTrainer, SyncAuditCallback
from trl_sync.ppo.summary import summarize
from trl_sync.report import plot_learning_curve, write_completions

# Of recipes/ppo.py for the task that it builds itself; other recipes change some.
EMBEDDED_SETTINGS = yaml.safe_load((Path(__file__).parent / "ppo_embedded.yaml").read_text())

Columns = dict[str, list[Any]]
Arguments = tuple[ScriptArguments, PPOConfig, ModelConfig]


def main(
    run: Callable[..., None], description: str, settings: dict[str, Any] = EMBEDDED_SETTINGS
) -> None:
    """Calls `run` with the flags; a user's mistake ends in one line."""
    try:
        run(*parse_arguments(description, settings))
    except (ConfigError, DesyncError) as error:
        sys.exit(f"error: {error}")


def parse_arguments(description: str, settings: dict[str, Any] = EMBEDDED_SETTINGS) -> Arguments:
    """Flags over --config file over, without a model, the `settings` of the embedded task."""
    parser = make_parser(description)
    # The model alone first: PPOConfig checks its sizes, which the embedded settings decide.
    model_args, *_ = TrlParser(ModelConfig, add_help=False).parse_args_and_config(
        return_remaining_strings=True
    )
    if model_args.model_name_or_path is None:
        parser.set_defaults_with_config(**settings)
    return parser.parse_args_and_config()


def make_trainer(
    arguments: Arguments, path: str, reward: Any, train: Dataset, test: Dataset
) -> tuple[PPOTrainer, SyncAuditCallback | None]:
    """PPO from the model at `path`, and its audit unless --no_audit."""
    script, config, model_args = arguments
    set_seed(config.seed)  # the adapters are drawn before the trainer is made
    trainer = PPOTrainer(
        config,
        AutoTokenizer.from_pretrained(
            path, revision=model_args.model_revision, padding_side="left"
        ),
        load_policy(path, script, model_args),
        reward_model=reward,
        train_dataset=train,
        eval_dataset=test,
    )
    return trainer, add_audit(trainer, script)


def add_audit(trainer: PPOTrainer, script: ScriptArguments) -> SyncAuditCallback | None:
    """The audit of all models after every optimizer step, unless --no_audit."""
    if not script.audit:
        return None
    reward = trainer.reward_model  # the other three are in the trainer's model
    audit = SyncAuditCallback(modules={"reward": reward} if isinstance(reward, Module) else {})
    trainer.add_callback(audit)
    return audit


def train(
    trainer: PPOTrainer, audit: SyncAuditCallback | None
) -> tuple[dict[str, Any], Columns, Columns]:
    """Trains and saves; what is to be said of the run, and the sampled answers to the evaluation
    prompts before and after it. Every rank calls it.
    """
    before = trainer.completions()
    started_s = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume_choice(trainer.args))
    wall_s = time.perf_counter() - started_s
    trainer.save_model()
    trainer.save_state()
    summary = summarize(trainer, wall_s)
    if audit is not None:
        done = audit.summary()
        summary |= {"audits": done.audits, "desyncs": done.desyncs}
        summary |= {"audit_share_of_step": done.share_of_step}
    after = trainer.completions()
    if trainer.is_world_process_zero():
        write_completions(Path(trainer.args.output_dir), before, after)
    return summary, before, after


def write_outcome(trainer: PPOTrainer, summary: dict[str, Any], reward: str = "reward") -> None:
    """Writes summary.json and learning_curve.png, and prints the summary. `reward`: its title."""
    folder = Path(trainer.args.output_dir)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    try:
        plot_learning_curve(trainer.state.log_history, folder / "learning_curve.png", reward)
    except ImportError:
        print("learning_curve.png needs matplotlib: pip install 'trl-sync[report]'")
    except ValueError as error:
        print(f"no learning_curve.png: {error}")
    print(json.dumps(summary, indent=2))
