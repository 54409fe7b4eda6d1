"""Datasets of every kind on their way through the trainer to the reward function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import runs
import tiny

TEXTS = tiny.prompts(64)["prompt"][:]


def test_other_columns_reach_the_reward_function_in_the_right_rows(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def reward(
        prompts: list[str], completions: list[str], answer: list[str], number: list[int]
    ) -> list[float]:
        assert answer == [f"to {prompt}" for prompt in prompts]
        assert [TEXTS[n] for n in number] == prompts
        calls.append(prompts)
        return runs.count_e(prompts, completions)

    prompts = Dataset.from_dict(
        {
            "prompt": TEXTS,
            "answer": [f"to {prompt}" for prompt in TEXTS],
            "number": list(range(64)),
            "unused": [None] * 64,
        }
    )
    runs.train(tmp_path, reward=reward, prompts=prompts, total_episodes=64)
    assert len(calls) == 4
    assert sorted(prompt for call in calls for prompt in call) == sorted(TEXTS)
    assert calls[0] != TEXTS[:16]  # shuffled


def test_messages_go_through_the_chat_template_and_back(tmp_path: Path) -> None:
    def reward(prompts: list[Any], completions: list[Any]) -> list[float]:
        assert all(message["role"] == "user" for (message,) in prompts)
        assert all(message["role"] == "assistant" for (message,) in completions)
        seen.extend(message["content"] for (message,) in prompts)
        return runs.count_e([], [message["content"] for (message,) in completions])

    seen: list[str] = []
    messages = [[{"role": "user", "content": text}] for text in TEXTS[:32]]
    trainer = runs.train(
        tmp_path,
        reward=reward,
        prompts=Dataset.from_dict({"prompt": messages}),
        kind=runs.WatchedTrainer,
        total_episodes=32,
    )
    assert sorted(seen) == sorted(TEXTS[:32])
    batch = trainer.micro_batches[0]
    row = batch["input_ids"][0][batch["attention_mask"][0]]
    text = tiny.tokenizer().decode(row).replace(" ", "")
    assert text.startswith("<user:")
    assert "><assistant:" in text


@pytest.mark.parametrize("reward", [runs.count_e, "model"])
def test_tokens_train_like_the_text_they_come_from(tmp_path: Path, reward: Any) -> None:
    tokenizer = tiny.tokenizer()
    tokens = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in TEXTS]})

    def run(name: str, prompts: Dataset) -> Any:
        source = tiny.reward_llama() if reward == "model" else reward
        return runs.train(tmp_path / name, reward=source, prompts=prompts)

    text, tokenized = run("text", tiny.prompts()), run("tokens", tokens)
    assert runs.same(runs.trained(text), runs.trained(tokenized))


def test_prompts_may_fill_the_whole_context(tmp_path: Path) -> None:
    # 128 positions: 120 tokens of prompt and 8 of response.
    prompts = Dataset.from_dict({"prompt": ["ab" * 60] * 16})
    trainer = runs.train(
        tmp_path, prompts=prompts, kind=runs.WatchedTrainer, total_episodes=16, stop_token=None
    )
    assert trainer.micro_batches[0]["input_ids"].shape == (4, 128)
    assert trainer.state.global_step == 4


def test_a_padding_token_beyond_the_embeddings_is_never_fed(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    assert tokenizer.pad_token_id == size
    trainer = runs.train(tmp_path, tokenizer=tokenizer, model=tiny.llama(vocab_size=size))
    assert trainer.state.global_step == 12
    assert all(p.isfinite().all() for p in runs.trained(trainer).values())


def test_a_reward_model_scores_prompt_and_response(tmp_path: Path) -> None:
    reward = tiny.reward_llama()
    trainer = runs.train(tmp_path, reward=reward, kind=runs.WatchedTrainer)
    assert trainer.reward_model is reward
    # The first iteration's responses, each scored alone and without padding.
    scores = {}
    for batch in trainer.micro_batches[:8]:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[mask]
            with torch.no_grad():
                hidden = reward.model(row.unsqueeze(0)).last_hidden_state
                scores[tuple(row.tolist())] = reward.score(hidden[0, -1]).item()
    assert len(scores) == 16
    logged = runs.rows(trainer, "objective/scores")[0]
    # fp32, padded in the batch.
    assert logged["objective/scores"] == pytest.approx(sum(scores.values()) / 16, abs=1e-5)
