"""The step API of TRL 0.11 (query, generate, score, step) on the embedded task.

    accelerate launch recipes/ppo_legacy_step.py
    accelerate launch recipes/ppo_legacy_step.py --steps 2560 --learning_rate 5e-5
    accelerate launch recipes/ppo_legacy_step.py --model_name my/sft-model \\
        --reward_model my/reward-model --query_dataset my/prompts

The reward model has the vocabulary of the policy; the prompts are in the column `prompt`.

For loops that exist. A new script uses `trl_sync.PPOTrainer`, which runs the loop: recipes/ppo.py.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from embedded_default import embedded_default
from inputs import load_named_split
from trl_sync import ConfigError
from trl_sync.legacy import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

GENERATION = {"max_new_tokens": 40, "do_sample": True, "top_k": 0, "top_p": 1.0}
OUTPUT = Path("runs/ppo-legacy-step")


def main() -> None:
    parser = HfArgumentParser(PPOConfig, description=__doc__)
    parser.set_defaults(steps=2560, batch_size=128, mini_batch_size=64, learning_rate=1e-4)
    # Its own defaults are names on the hub.
    parser.set_defaults(model_name="", reward_model="", query_dataset="")
    (config,) = parser.parse_args_into_dataclasses()
    try:
        run(config)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def run(config: PPOConfig) -> None:
    model_path, reward_path, prompts = models_and_prompts(config)
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    reward_model = AutoModelForSequenceClassification.from_pretrained(
        reward_path, num_labels=1
    ).eval()

    def tokenize(row: dict[str, str]) -> dict[str, Any]:
        return {"input_ids": tokenizer(row["prompt"])["input_ids"], "query": row["prompt"]}

    dataset = prompts.map(tokenize, remove_columns=prompts.column_names)
    dataset.set_format("torch")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(model_path)
    trainer = PPOTrainer(config, model, None, tokenizer, dataset, data_collator=columns)
    reward_model.to(trainer.accelerator.device)

    means = []
    batches = itertools.chain.from_iterable(itertools.repeat(trainer.dataloader))
    for batch in itertools.islice(batches, config.steps // config.batch_size):
        queries = batch["input_ids"]
        responses = trainer.generate(
            queries, return_prompt=False, batch_size=config.batch_size, **GENERATION
        )
        batch["response"] = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = rate(reward_model, tokenizer, queries, responses)
        stats = trainer.step(queries, responses, scores)
        trainer.log_stats(stats, batch, scores)
        means.append(float(stats["ppo/mean_scores"]))
        if trainer.accelerator.is_main_process:
            kl = float(stats["objective/kl"])
            print(f"step {len(means)}: score {means[-1]:.2f}, KL {kl:.2f}")
    trainer.save_pretrained(str(OUTPUT))
    if trainer.accelerator.is_main_process:
        tenth = max(1, len(means) // 10)
        first, last = sum(means[:tenth]) / tenth, sum(means[-tenth:]) / tenth
        print(f"mean score {first:.2f} -> {last:.2f}; model and value head in {OUTPUT}")


def models_and_prompts(config: PPOConfig) -> tuple[str, str, Dataset]:
    """Paths of policy and reward model, and prompts: the user's own, or those of the small task."""
    own = (config.model_name, config.reward_model, config.query_dataset)
    if not any(own):
        task = embedded_default()
        return str(task.model_path), str(task.reward_model_path), task.train_prompts
    if not all(own):
        raise ConfigError("Give --model_name, --reward_model and --query_dataset, or none of them.")
    return config.model_name, config.reward_model, load_named_split(own[2], None, "train")


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The collator of such scripts: lists of tensors of different lengths."""
    return {name: [row[name] for row in rows] for name in rows[0]}


@torch.no_grad()
def rate(
    reward_model: Any, tokenizer: Any, queries: list[Tensor], responses: list[Tensor]
) -> list[Tensor]:
    """One score for each query with its response."""
    texts = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
    inputs = tokenizer.pad({"input_ids": texts}, padding_side="right", return_tensors="pt")
    inputs = inputs.to(reward_model.device)
    lengths = inputs["attention_mask"].sum(1)
    hidden = reward_model.base_model(**inputs).last_hidden_state
    last = hidden[torch.arange(len(texts), device=hidden.device), lengths - 1]
    return list(reward_model.score(last).squeeze(-1).cpu())


if __name__ == "__main__":
    main()
