"""Supervised fine-tuning with TRL's SFTTrainer, audited after every optimizer step.

Without arguments it tunes the small model that the recipes build on the spot for a few steps:

    accelerate launch recipes/sft_audited.py

With your own model and data; the other flags are those of SFTConfig and ModelConfig:

    accelerate launch recipes/sft_audited.py --model_name_or_path my/model \\
        --dataset_name my/dataset --use_peft --output_dir runs/mine

Two processes on one CPU:

    accelerate launch --config_file recipes/accelerate_configs/cpu_2.yaml recipes/sft_audited.py

The journal is sync_audit.jsonl in the output folder: `trl-sync report runs/sft-audited`.
"""

from __future__ import annotations

import sys

from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, get_peft_config

from embedded_default import embedded_default
from embedded_default.corpus import draw_corpus
from inputs import load_causal_model, load_train_split, trainer_parser
from trl_sync import ConfigError, DesyncError, SyncAuditCallback

NUM_REVIEWS = 1024
EMBEDDED_SETTINGS = {
    "output_dir": "runs/sft-audited",
    "max_steps": 20,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "max_length": 64,
    "logging_steps": 5,
    "report_to": "none",
}


def main() -> None:
    parser = trainer_parser((ScriptArguments, SFTConfig, ModelConfig), __doc__, EMBEDDED_SETTINGS)
    try:
        run(*parser.parse_args_and_config())
    except (ConfigError, DesyncError) as error:
        sys.exit(f"error: {error}")


def run(script: ScriptArguments, config: SFTConfig, model_args: ModelConfig) -> None:
    embedded = model_args.model_name_or_path is None
    path = str(embedded_default().model_path) if embedded else model_args.model_name_or_path
    trainer = SFTTrainer(
        load_causal_model(path, model_args),
        config,
        train_dataset=reviews(config.seed) if embedded else load_train_split(script),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=get_peft_config(model_args),
        callbacks=[SyncAuditCallback()],
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()


def reviews(seed: int) -> Dataset:
    """Reviews of the embedded task, others than its model has learned from."""
    return Dataset.from_list(draw_corpus(NUM_REVIEWS, 0, seed + 1).reviews)


if __name__ == "__main__":
    main()
