"""A reward model with TRL's RewardTrainer, audited after every optimizer step.

Without arguments it trains LoRA adapters and a score head on the small model that the recipes build
on the spot, with pairs of reviews of which the more favourable one is chosen:

    accelerate launch recipes/reward_audited.py

With your own model and pairs; the other flags are those of RewardConfig and ModelConfig:

    accelerate launch recipes/reward_audited.py --model_name_or_path my/sft-model \\
        --dataset_name my/pairs --use_peft --output_dir runs/my-reward

Two processes on one CPU:

    accelerate launch --config_file recipes/accelerate_configs/cpu_2.yaml recipes/reward_audited.py

What it saves is a reward for recipes/ppo.py: --reward_model_path runs/reward-audited. On the same
base it becomes a third adapter there, see recipes/ppo_multi_reward.py.
"""

from __future__ import annotations

import sys

from dpo_audited import pairs
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    ScriptArguments,
    get_peft_config,
    get_quantization_config,
)

from embedded_default import embedded_default
from inputs import load_train_split, trainer_parser
from trl_sync import ConfigError, DesyncError, SyncAuditCallback

EMBEDDED_SETTINGS = {
    "output_dir": "runs/reward-audited",
    "max_steps": 20,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "use_peft": True,
    "lora_r": 16,
    "lora_target_modules": ["all-linear"],
    "max_length": 64,
    "logging_steps": 5,
    "report_to": "none",
}


def main() -> None:
    classes = (ScriptArguments, RewardConfig, ModelConfig)
    parser = trainer_parser(classes, __doc__, EMBEDDED_SETTINGS)
    try:
        run(*parser.parse_args_and_config())
    except (ConfigError, DesyncError) as error:
        sys.exit(f"error: {error}")


def run(script: ScriptArguments, config: RewardConfig, model_args: ModelConfig) -> None:
    model_args.lora_task_type = "SEQ_CLS"  # PEFT then trains and saves the score head too
    embedded = model_args.model_name_or_path is None
    path = str(embedded_default().model_path) if embedded else model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=1,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(model_args),
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = RewardTrainer(
        model,
        config,
        train_dataset=pairs(config.seed) if embedded else load_train_split(script),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[SyncAuditCallback()],
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
