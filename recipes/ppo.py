"""PPO on one shared 4-bit base.

Without arguments it builds a small task on the spot and solves it; the second run finds it cached:

    accelerate launch recipes/ppo.py

With your own model, reward and prompts:

    accelerate launch recipes/ppo.py --model_name_or_path my/sft-model \\
        --reward_model_path my/reward-model --dataset_name my/prompts --output_dir runs/mine

Settings may also come from a YAML file (--config FILE; flags win). Two processes on one CPU:

    accelerate launch --config_file recipes/accelerate_configs/cpu_2.yaml recipes/ppo.py
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from torch.nn import Module
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, TrlParser

from embedded_default import embedded_default, judge
from inputs import (
    ScriptArguments,
    load_policy,
    load_prompts,
    load_reward,
    make_parser,
    resume_choice,
)
from trl_sync import ConfigError, DesyncError, PPOConfig, PPOTrainer, SyncAuditCallback
from trl_sync.ppo.progress import print_completions
from trl_sync.ppo.summary import summarize
from trl_sync.report import plot_learning_curve

EMBEDDED_SETTINGS = Path(__file__).parent / "ppo_embedded.yaml"


def main() -> None:
    try:
        run(*parse_arguments())
    except (ConfigError, DesyncError) as error:
        sys.exit(f"error: {error}")


def parse_arguments() -> tuple[ScriptArguments, PPOConfig, ModelConfig]:
    """Flags over --config file over, for the embedded default, its own settings."""
    parser = make_parser(__doc__)
    # The model alone first: PPOConfig checks its sizes, which the embedded settings decide.
    model_args, *_ = TrlParser(ModelConfig, add_help=False).parse_args_and_config(
        return_remaining_strings=True
    )
    if model_args.model_name_or_path is None:
        parser.set_defaults_with_config(**yaml.safe_load(EMBEDDED_SETTINGS.read_text()))
    return parser.parse_args_and_config()


def run(script: ScriptArguments, config: PPOConfig, model_args: ModelConfig) -> None:
    embedded = model_args.model_name_or_path is None
    trainer, audit = make_trainer(script, config, model_args)
    before = trainer.completions()
    started_s = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume_choice(config))
    wall_s = time.perf_counter() - started_s
    after = trainer.completions()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        summary = summarize(trainer, wall_s) | compare(before, after, judged=embedded)
        if audit is not None:
            done = audit.summary()
            summary |= {"audits": done.audits, "desyncs": done.desyncs}
            summary |= {"audit_share_of_step": done.share_of_step}
        write_outcome(trainer, summary, Path(config.output_dir))
        show(before, after, summary)


def make_trainer(
    script: ScriptArguments, config: PPOConfig, model_args: ModelConfig
) -> tuple[PPOTrainer, SyncAuditCallback | None]:
    """The trainer, and the audit of its four models after every optimizer step."""
    embedded = embedded_default() if model_args.model_name_or_path is None else None
    model_path = model_args.model_name_or_path or str(embedded.model_path)
    train, test = load_prompts(script, config, embedded)
    set_seed(config.seed)  # the adapters are drawn before the trainer is made
    trainer = PPOTrainer(
        config,
        AutoTokenizer.from_pretrained(
            model_path, revision=model_args.model_revision, padding_side="left"
        ),
        load_policy(model_path, script, model_args),
        reward_model=load_reward(script, config, embedded),
        train_dataset=train,
        eval_dataset=test,
    )
    if not script.audit:
        return trainer, None
    reward = trainer.reward_model  # the other three are in the trainer's model
    audit = SyncAuditCallback(modules={"reward": reward} if isinstance(reward, Module) else {})
    trainer.add_callback(audit)
    return trainer, audit


def compare(before: dict[str, Any], after: dict[str, Any], *, judged: bool) -> dict[str, float]:
    """How the answers to the evaluation prompts changed; the grammar judges its own corpus only."""
    answers = after["model response"]
    outcome = {"distinct_completions": len(set(answers)) / len(answers)}
    if judged:
        for name, columns in (("before", before), ("after", after)):
            outcome[f"positive_share_{name}"] = positive_share(columns)
    return outcome


def positive_share(columns: dict[str, Any]) -> float:
    pairs = zip(columns["query"], columns["model response"], strict=True)
    labels = [judge(f"{query}{response}").label for query, response in pairs]
    return labels.count("positive") / len(labels)


def write_outcome(trainer: PPOTrainer, summary: dict[str, Any], folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    try:
        plot_learning_curve(trainer.state.log_history, folder / "learning_curve.png")
    except ImportError:
        print("learning_curve.png needs matplotlib: pip install 'trl-sync[report]'")
    except ValueError as error:
        print(f"no learning_curve.png: {error}")


def show(before: dict[str, Any], after: dict[str, Any], summary: dict[str, Any]) -> None:
    """The first prompts with both answers, and the figures."""
    table = {
        "prompt": before["query"],
        "before": before["model response"],
        "score before": before["score"],
        "after": after["model response"],
        "score after": after["score"],
    }
    print_completions({name: rows[:8] for name, rows in table.items()}, "Before and after")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
