"""A frozen reference that moves: adapters are merged into an NF4 base, and unmerged again.

That is what a trainer does to hand its weights to an inference engine. Merging dequantizes each
weight, adds the adapter's update and rounds to four bits anew; unmerging subtracts it and rounds
again. What comes out is another base, on every rank alike, so ranks that compare with one another
see nothing. The audit compares each frozen byte with what it was at first:

    accelerate launch recipes/frozen_drift.py
    accelerate launch --config_file recipes/accelerate_configs/cpu_2.yaml recipes/frozen_drift.py

It prints how far the reference's log-probabilities have moved, and what the audit says. Ends with 0
if the audit named it, else with 1. With --declared the merge is declared, as a trainer does that
merges by intent: then the audit warns once and training goes on.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from sft_audited import reviews
from transformers import AutoModelForCausalLM, AutoTokenizer

from embedded_default import embedded_default
from trl_sync import DesyncError, SyncAuditor
from trl_sync.audit.findings import Cause
from trl_sync.backbone.quantization import nf4_config

STEPS = 6
MERGED_AFTER = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--declared", action="store_true", help="declare the merge beforehand")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/frozen-drift"))
    options = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(0)
    path = str(embedded_default().model_path)
    texts = [row["prompt"] + row["completion"] for row in reviews(seed=0).select(range(32))]
    batch = AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    batch = batch.to(accelerator.device)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model = quantized_with_adapter(path)
    before = reference_logprobs(model, batch)
    named = False
    try:
        train(accelerator, model, batch, options)
    except DesyncError as error:
        causes = {finding.cause for finding in error.findings}
        named = bool(causes & {Cause.FROZEN_CHANGED, Cause.QUANTIZATION_CHANGED})
        accelerator.print(error)
    moved = (reference_logprobs(model, batch) - before).abs()
    accelerator.print(
        f"reference: log-probabilities moved by {moved.mean():.4f} nats on average, "
        f"{moved.max():.4f} at most"
    )
    sys.exit(0 if named != options.declared else 1)


def quantized_with_adapter(path: str) -> PeftModel:
    """The model at `path` in NF4 with a LoRA adapter; the base alone is the reference."""
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=nf4_config())
    # In training mode: bitsandbytes' kernels for inference have no backward pass.
    return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear")).train()


def train(
    accelerator: Accelerator, model: PeftModel, batch: dict, options: argparse.Namespace
) -> None:
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(adapter, lr=1e-2))
    auditor = SyncAuditor(
        accelerator,
        wrapped,
        optimizer,
        output_dir=options.output_dir,
        frozen_cover_steps=1,  # every frozen byte at every step
    )
    with auditor.attach():
        if options.declared:
            auditor.declare_sync("adapters are merged for an inference engine")
        for step in range(1, STEPS + 1):
            loss = wrapped(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
            if step == MERGED_AFTER:
                merge_and_unmerge(model)
    accelerator.print(auditor.summary().describe())


def merge_and_unmerge(model: PeftModel) -> None:
    with warnings.catch_warnings():
        # PEFT warns that merging rounds. Here it is the point; in a log it is easily overlooked.
        warnings.filterwarnings("ignore", message="Merge lora module to 4-bit")
        warnings.filterwarnings("ignore", message="Unmerge lora module to 4-bit")
        model.merge_adapter()
        model.unmerge_adapter()


@torch.no_grad()
def reference_logprobs(model: PeftModel, batch: dict) -> torch.Tensor:
    """Log-probability [N] of each token under the base alone, in nats."""
    with model.disable_adapter():
        logits = model(**batch).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    logprobs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logprobs[labels != -100]


if __name__ == "__main__":
    main()
