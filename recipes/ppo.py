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

from typing import Any

import ppo_run
from trl import ModelConfig

from embedded_default import embedded_default, judge
from inputs import ScriptArguments, load_prompts, load_reward
from trl_sync import PPOConfig, PPOTrainer, SyncAuditCallback
from trl_sync.ppo.progress import print_completions


def main() -> None:
    ppo_run.main(run, __doc__)


def parse_arguments() -> ppo_run.Arguments:
    return ppo_run.parse_arguments(__doc__)


def run(script: ScriptArguments, config: PPOConfig, model_args: ModelConfig) -> None:
    embedded = model_args.model_name_or_path is None
    trainer, audit = make_trainer(script, config, model_args)
    summary, before, after = ppo_run.train(trainer, audit)
    if trainer.is_world_process_zero():
        show(before, after)
        ppo_run.write_outcome(trainer, summary | compare(before, after, judged=embedded))


def make_trainer(
    script: ScriptArguments, config: PPOConfig, model_args: ModelConfig
) -> tuple[PPOTrainer, SyncAuditCallback | None]:
    """The trainer, and the audit of its four models after every optimizer step."""
    embedded = embedded_default() if model_args.model_name_or_path is None else None
    model_path = model_args.model_name_or_path or str(embedded.model_path)
    train, test = load_prompts(script, config, embedded)
    reward = load_reward(script, config, embedded)
    return ppo_run.make_trainer((script, config, model_args), model_path, reward, train, test)


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


def show(before: dict[str, Any], after: dict[str, Any]) -> None:
    """The first prompts with both answers."""
    table = {
        "prompt": before["query"],
        "before": before["model response"],
        "score before": before["score"],
        "after": after["model response"],
        "score after": after["score"],
    }
    print_completions({name: rows[:8] for name, rows in table.items()}, "Before and after")


if __name__ == "__main__":
    main()
