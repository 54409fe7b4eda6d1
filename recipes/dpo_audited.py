"""Preference tuning with TRL's DPOTrainer, policy and reference audited after every step.

Without arguments it tunes LoRA adapters on the small model that the recipes build on the spot,
with pairs of reviews of which the more favourable one is chosen:

    accelerate launch recipes/dpo_audited.py

All weights in place of adapters, which makes DPOTrainer keep a reference model:

    accelerate launch recipes/dpo_audited.py --use_peft false

With your own model and pairs; the other flags are those of DPOConfig and ModelConfig:

    accelerate launch recipes/dpo_audited.py --model_name_or_path my/sft-model \\
        --dataset_name my/pairs --use_peft --output_dir runs/mine

Two processes on one CPU:

    accelerate launch --config_file recipes/accelerate_configs/cpu_2.yaml recipes/dpo_audited.py

The journal is sync_audit.jsonl in the output folder: `trl-sync report runs/dpo-audited`.
"""

from __future__ import annotations

import sys

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, get_peft_config

from embedded_default import embedded_default
from embedded_default.corpus import draw_corpus
from inputs import load_causal_model, load_train_split, trainer_parser
from trl_sync import ConfigError, DesyncError, SyncAuditCallback

NUM_PAIRS = 512
EMBEDDED_SETTINGS = {
    "output_dir": "runs/dpo-audited",
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
    parser = trainer_parser((ScriptArguments, DPOConfig, ModelConfig), __doc__, EMBEDDED_SETTINGS)
    try:
        run(*parser.parse_args_and_config())
    except (ConfigError, DesyncError) as error:
        sys.exit(f"error: {error}")


def run(script: ScriptArguments, config: DPOConfig, model_args: ModelConfig) -> None:
    embedded = model_args.model_name_or_path is None
    path = str(embedded_default().model_path) if embedded else model_args.model_name_or_path
    trainer = DPOTrainer(
        load_causal_model(path, model_args),
        args=config,
        train_dataset=pairs(config.seed) if embedded else load_train_split(script),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=get_peft_config(model_args),
    )
    modules = {}
    # With adapters there is none: the policy's frozen base is the reference, and audited as such.
    if trainer.ref_model is not None:
        # DPOTrainer only ever runs it without gradients; the audit wants that to be certain.
        modules["reference"] = trainer.ref_model.requires_grad_(False)
    trainer.add_callback(SyncAuditCallback(modules=modules))
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()


def pairs(seed: int) -> Dataset:
    """Two reviews of one thing each, the one that the judge finds more favourable as chosen."""
    drawn = draw_corpus(0, NUM_PAIRS, seed + 1).pairs
    return Dataset.from_list(drawn).remove_columns("margin")


if __name__ == "__main__":
    main()
