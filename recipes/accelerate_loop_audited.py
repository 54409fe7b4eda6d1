"""A training loop of your own on accelerate, audited around every optimizer step.

Without arguments it tunes the small model that the recipes build on the spot on reviews:

    accelerate launch recipes/accelerate_loop_audited.py

With your own causal model and a dataset with a `text` column:

    accelerate launch recipes/accelerate_loop_audited.py --model_name_or_path my/model \\
        --dataset_name my/texts --output_dir runs/mine

Two processes on one CPU:

    accelerate launch --config_file recipes/accelerate_configs/cpu_2.yaml \\
        recipes/accelerate_loop_audited.py

The audit is `SyncAuditor` and `with audit.attach()`; the rest is the loop.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from sft_audited import reviews
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
)

from embedded_default import embedded_default
from inputs import load_named_split
from trl_sync import ConfigError, DesyncError, SyncAuditor


@dataclass
class Arguments:
    """The loop's flags."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A causal model."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "On the hub or a local path, with a `text` column."}
    )
    output_dir: str = field(default="runs/loop-audited", metadata={"help": "Model and journal."})
    max_steps: int = field(default=20, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Texts a process."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a text; longer are cut."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of AdamW."})
    seed: int = field(default=42, metadata={"help": "Of the order of the texts."})


def main() -> None:
    parser = HfArgumentParser(Arguments, description=__doc__)
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        train(arguments)
    except (ConfigError, DesyncError) as error:
        sys.exit(f"error: {error}")


def train(arguments: Arguments) -> None:
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(arguments.seed)
    path = arguments.model_name_or_path or str(embedded_default().model_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    batches = DataLoader(
        tokenized(texts(arguments), tokenizer, arguments.max_length),
        batch_size=arguments.per_device_train_batch_size,
        shuffle=True,
        collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    endless = chain.from_iterable(repeat(batches))
    audit = SyncAuditor(accelerator, model, optimizer, output_dir=arguments.output_dir)
    with audit.attach():
        for step, batch in enumerate(islice(endless, arguments.max_steps)):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 5 == 0:
                accelerator.print(f"step {step + 1}: loss {loss.item():.3f}")
    accelerator.print(audit.summary().describe())
    accelerator.unwrap_model(model).save_pretrained(
        arguments.output_dir, is_main_process=accelerator.is_main_process
    )


def texts(arguments: Arguments) -> Dataset:
    """The texts to learn: a dataset's, or reviews of the embedded task."""
    if arguments.dataset_name is not None:
        return load_named_split(arguments.dataset_name, None, "train")
    drawn = reviews(arguments.seed)
    return Dataset.from_dict(
        {"text": [p + c for p, c in zip(drawn["prompt"], drawn["completion"], strict=True)]}
    )


def tokenized(data: Dataset, tokenizer: object, max_length: int) -> Dataset:
    return data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=max_length),
        batched=True,
        remove_columns=data.column_names,
    )


if __name__ == "__main__":
    main()
