"""The jobs that benchmarks run: models with random weights, written once, and prompts for them.

The policies of random weights end their responses at random: at every token the probability of the
end is about the same, so lengths are long-tailed and the limit cuts the longest.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

PAD, END = 0, 1
# Every hidden state has a share in this direction, by which the LM head finds the end's logit.
CONSTANT_DIMENSION = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama, and the job it is measured at."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    prompt_tokens: int
    response_tokens: int
    micro_batch: int
    micro_batches: int
    iterations: int
    dtype: torch.dtype = torch.float32

    @property
    def batch(self) -> int:
        return self.micro_batch * self.micro_batches


SHAPES = {
    # To try the scripts with: it measures nothing.
    "try": Shape(
        hidden=64,
        layers=2,
        heads=2,
        intermediate=128,
        vocabulary=512,
        prompt_tokens=8,
        response_tokens=8,
        micro_batch=2,
        micro_batches=2,
        iterations=1,
    ),
    "15m": Shape(
        hidden=384,
        layers=6,
        heads=6,
        intermediate=1152,
        vocabulary=4096,
        prompt_tokens=48,
        response_tokens=64,
        micro_batch=8,
        micro_batches=4,
        iterations=2,
    ),
    "110m": Shape(
        hidden=768,
        layers=12,
        heads=12,
        intermediate=2048,
        vocabulary=16384,
        prompt_tokens=48,
        response_tokens=64,
        micro_batch=8,
        micro_batches=2,
        iterations=1,
    ),
    # For a GPU: the shapes of Llama 3.2 1B (its head untied) and of Llama 3.1 8B.
    "1b": Shape(
        hidden=2048,
        layers=16,
        heads=32,
        intermediate=8192,
        vocabulary=128256,
        prompt_tokens=256,
        response_tokens=256,
        micro_batch=8,
        micro_batches=4,
        iterations=2,
        dtype=torch.bfloat16,
    ),
    "8b": Shape(
        hidden=4096,
        layers=32,
        heads=32,
        intermediate=14336,
        vocabulary=128256,
        prompt_tokens=256,
        response_tokens=256,
        micro_batch=4,
        micro_batches=8,
        iterations=1,
        dtype=torch.bfloat16,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a run starts from: folders of models, and the prompts' token ids."""

    model: str
    reward_model: str
    prompts: list[list[int]]
    settings: dict[str, Any]
    learning_rates: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def random_job(
    name: str, folder: Path, *, lengths: str, seed: int = 0, shape: Shape | None = None
) -> Job:
    """A job of that size. With `lengths` "natural" responses end and prompts differ in length; with
    "limit" no response ends before the limit and all prompts are equally long.
    """
    shape = SHAPES[name] if shape is None else shape
    torch.manual_seed(seed)
    tokenizer = numbered_tokenizer(shape.vocabulary)
    paths = {"model": folder / "model", "reward_model": folder / "reward_model"}
    with torch.device("cpu"):
        policy = LlamaForCausalLM(llama_config(shape)).to(shape.dtype)
        end_at_random(policy, mean_tokens=shape.response_tokens)
        _save(policy, tokenizer, paths["model"])
        del policy
        reward = LlamaForSequenceClassification(llama_config(shape)).to(shape.dtype)
        _save(reward, tokenizer, paths["reward_model"])
    generator = np.random.default_rng(seed)
    shortest = shape.prompt_tokens // 4 if lengths == "natural" else shape.prompt_tokens
    sizes = generator.integers(shortest, shape.prompt_tokens + 1, 4 * shape.batch)
    prompts = [generator.integers(2, shape.vocabulary, size).tolist() for size in sizes]
    return Job(
        model=str(paths["model"]),
        reward_model=str(paths["reward_model"]),
        prompts=prompts,
        settings={
            "per_device_train_batch_size": shape.micro_batch,
            "gradient_accumulation_steps": shape.micro_batches,
            "total_episodes": shape.iterations * shape.batch,
            "response_length": shape.response_tokens,
            "stop_token": "eos" if lengths == "natural" else None,
            "local_rollout_forward_batch_size": shape.batch,
            "bf16": shape.dtype == torch.bfloat16,
        },
        # So low that the lengths stay as they are: every side does the same work.
        learning_rates={"full": 1e-6, "lora": 1e-6},
    )


def llama_config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(2048, shape.prompt_tokens + shape.response_tokens),
        tie_word_embeddings=False,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )


@torch.no_grad()
def end_at_random(model: Any, mean_tokens: float) -> None:
    """Sets the end's logit so that a response without a limit has that many tokens on average."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    # As large as what the layers add to all other dimensions together: normalisation keeps it.
    embeddings[:, CONSTANT_DIMENSION] = 0.02 * embeddings.shape[1]
    head[:, CONSTANT_DIMENSION] = 0.0
    head[END] = 0.0
    ids = torch.randint(2, model.config.vocab_size, (8, 32))
    states = model.base_model(ids).last_hidden_state
    others = torch.logsumexp(model.lm_head(states).float(), -1)
    wanted = others - math.log(mean_tokens - 1)
    share = states[..., CONSTANT_DIMENSION].float()
    head[END, CONSTANT_DIMENSION] = float(wanted.mean() / share.mean())


def numbered_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Every token is a word of its own: its number."""
    words = {"<pad>": PAD, "<end>": END} | {str(token): token for token in range(2, vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def embedded_job(lengths: str) -> Job:
    """The task that recipes/ppo.py solves, with responses as long as its model makes them."""
    from transformers import AutoTokenizer

    from embedded_default import embedded_default

    task = embedded_default()
    tokenizer = AutoTokenizer.from_pretrained(task.model_path)
    return Job(
        model=str(task.model_path),
        reward_model=str(task.reward_model_path),
        prompts=[tokenizer(prompt)["input_ids"] for prompt in task.train_prompts["prompt"]],
        settings={
            "per_device_train_batch_size": 32,
            "gradient_accumulation_steps": 4,
            "total_episodes": 2560,
            "response_length": 32,
            "stop_token": "eos" if lengths == "natural" else None,
            "missing_eos_penalty": 1.0 if lengths == "natural" else None,
            "local_rollout_forward_batch_size": 128,
            "bf16": False,
        },
        learning_rates={"full": 3e-4, "lora": 1e-3},
    )


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
