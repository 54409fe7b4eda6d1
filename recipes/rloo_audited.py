"""Reinforcement learning with TRL's RLOOTrainer, policy and reference audited after every step.

Without arguments it tunes LoRA adapters on the small model that the recipes build on the spot; the
reward is how favourable a review is, by its words alone:

    accelerate launch recipes/rloo_audited.py

With your own model and prompts, and a reward from a Python file; the other flags are those of
RLOOConfig and ModelConfig:

    accelerate launch recipes/rloo_audited.py --model_name_or_path my/sft-model \\
        --dataset_name my/prompts --reward_function rewards.py:my_reward --use_peft \\
        --output_dir runs/mine

Two processes on one CPU:

    accelerate launch --config_file recipes/accelerate_configs/cpu_2.yaml recipes/rloo_audited.py
"""

from __future__ import annotations

import sys

import grpo_audited
from grpo_audited import Arguments, favour
from transformers import AutoTokenizer
from trl import ModelConfig, RLOOConfig, RLOOTrainer, get_peft_config

from embedded_default import embedded_default
from inputs import load_causal_model, load_function, load_train_split, trainer_parser
from trl_sync import ConfigError, DesyncError, SyncAuditCallback

EMBEDDED_SETTINGS = grpo_audited.EMBEDDED_SETTINGS | {"output_dir": "runs/rloo-audited"}


def main() -> None:
    parser = trainer_parser((Arguments, RLOOConfig, ModelConfig), __doc__, EMBEDDED_SETTINGS)
    try:
        run(*parser.parse_args_and_config())
    except (ConfigError, DesyncError) as error:
        sys.exit(f"error: {error}")


def run(script: Arguments, config: RLOOConfig, model_args: ModelConfig) -> None:
    task = embedded_default() if model_args.model_name_or_path is None else None
    if script.reward_function is None and task is None:
        raise ConfigError("No reward: give --reward_function, as rewards.py:my_reward.")
    path = model_args.model_name_or_path or str(task.model_path)
    trainer = RLOOTrainer(
        load_causal_model(path, model_args),
        reward_funcs=load_function(script.reward_function) if script.reward_function else favour,
        args=config,
        train_dataset=load_train_split(script) if task is None else task.train_prompts,
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
        peft_config=get_peft_config(model_args),
        callbacks=[SyncAuditCallback()],
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
