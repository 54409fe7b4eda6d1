"""Reinforcement learning with TRL's GRPOTrainer, policy and reference audited after every step.

Without arguments it tunes LoRA adapters on the small model that the recipes build on the spot; the
reward is how favourable a review is, by its words alone:

    accelerate launch recipes/grpo_audited.py

With your own model and prompts, and a reward from a Python file; the other flags are those of
GRPOConfig and ModelConfig:

    accelerate launch recipes/grpo_audited.py --model_name_or_path my/sft-model \\
        --dataset_name my/prompts --reward_function rewards.py:my_reward --use_peft \\
        --output_dir runs/mine

Two processes on one CPU:

    accelerate launch --config_file recipes/accelerate_configs/cpu_2.yaml recipes/grpo_audited.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, get_peft_config

from embedded_default import embedded_default, judge
from inputs import load_causal_model, load_function, load_train_split, trainer_parser
from trl_sync import ConfigError, DesyncError, SyncAuditCallback

EMBEDDED_SETTINGS = {
    "output_dir": "runs/grpo-audited",
    "max_steps": 10,
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 40,
    "learning_rate": 1e-3,
    "beta": 0.05,
    "use_peft": True,
    "lora_r": 16,
    "lora_target_modules": ["all-linear"],
    "logging_steps": 5,
    "report_to": "none",
}


@dataclass
class Arguments(ScriptArguments):
    """The data, and the reward."""

    reward_function: str | None = field(
        default=None, metadata={"help": "Reward from Python, as file.py:name."}
    )


def main() -> None:
    parser = trainer_parser((Arguments, GRPOConfig, ModelConfig), __doc__, EMBEDDED_SETTINGS)
    try:
        run(*parser.parse_args_and_config())
    except (ConfigError, DesyncError) as error:
        sys.exit(f"error: {error}")


def run(script: Arguments, config: GRPOConfig, model_args: ModelConfig) -> None:
    task = embedded_default() if model_args.model_name_or_path is None else None
    if script.reward_function is None and task is None:
        raise ConfigError("No reward: give --reward_function, as rewards.py:my_reward.")
    path = model_args.model_name_or_path or str(task.model_path)
    trainer = GRPOTrainer(
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


def favour(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """How favourable each review is, from -1 to 1."""
    pairs = zip(prompts, completions, strict=True)
    return [judge(f"{prompt}{completion}").score for prompt, completion in pairs]


if __name__ == "__main__":
    main()
