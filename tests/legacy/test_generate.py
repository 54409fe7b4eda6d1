"""`generate` of the step API, and the whole loop: query, generate, score, step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import step_loops
import tiny
from trl_sync.errors import ConfigError
from trl_sync.legacy import LengthSampler, PPOTrainer, respond_to_batch

GREEDY = {"do_sample": False, "max_new_tokens": 6}
# As the scripts of that time have it.
OLD_OPTIONS = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True}
QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 4]), torch.tensor([4] * 5)]


def alone(trainer: PPOTrainer, query: Tensor, **options: Any) -> Tensor:
    model = trainer.model.pretrained_model
    return model.generate(query[None], attention_mask=torch.ones_like(query)[None], **options)[0]


def test_a_list_gets_what_each_query_gets_alone() -> None:
    trainer = step_loops.trainer()
    expected = [alone(trainer, query, **GREEDY) for query in QUERIES]
    for batch_size in (1, 3, 16):
        responses = trainer.generate(QUERIES, batch_size=batch_size, **GREEDY)
        assert [r.tolist() for r in responses] == [r.tolist() for r in expected]
        responses = trainer.generate(QUERIES, return_prompt=False, batch_size=batch_size, **GREEDY)
        for query, response, whole in zip(QUERIES, responses, expected, strict=True):
            assert response.tolist() == whole[len(query) :].tolist()


def test_one_query_gets_one_row() -> None:
    trainer = step_loops.trainer()
    response = trainer.generate(QUERIES[0], **GREEDY)
    assert response.shape == (1, 9)
    assert torch.equal(response[0], alone(trainer, QUERIES[0], **GREEDY))
    assert trainer.generate(QUERIES[0], return_prompt=False, **GREEDY).shape == (1, 6)
    with pytest.raises(ConfigError, match="one dimension"):
        trainer.generate(QUERIES[0][None], **GREEDY)


def test_a_response_ends_with_its_first_stop_token() -> None:
    """Also where that token is the padding token, and where the query has one."""
    trainer = step_loops.trainer()
    free = [alone(trainer, query, **GREEDY)[len(query) :] for query in QUERIES]
    stop = int(free[0][2])
    queries = [torch.cat([torch.tensor([stop]), query]) for query in QUERIES]
    free = [alone(trainer, query, **GREEDY)[len(query) :].tolist() for query in queries]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len({len(row) for row in expected}) > 1
    for stops in (stop, [stop, 63]):
        for pad in (stop, 0):
            options = GREEDY | {"eos_token_id": stops, "pad_token_id": pad}
            responses = trainer.generate(queries, return_prompt=False, **options)
            assert [row.tolist() for row in responses] == expected
            whole = trainer.generate(queries, **options)
            assert [row.tolist() for row in whole] == [
                [*query.tolist(), *row] for query, row in zip(queries, expected, strict=True)
            ]


def test_the_options_of_old_scripts_work() -> None:
    trainer = step_loops.trainer()
    lengths = LengthSampler(2, 5)
    assert {lengths() for _ in range(50)} == {2, 3, 4}
    responses = trainer.generate(
        QUERIES, length_sampler=lengths, return_prompt=False, eos_token_id=-1, **OLD_OPTIONS
    )
    assert all(2 <= len(response) <= 4 for response in responses)


def test_responses_of_the_reference() -> None:
    for peft in (False, True):
        trainer = step_loops.trainer(policy=step_loops.model(peft))
        if not peft:
            with torch.no_grad():
                trainer.model.pretrained_model.lm_head.weight.neg_()
        responses, references = trainer.generate(
            QUERIES, return_prompt=False, generate_ref_response=True, **GREEDY
        )
        base = step_loops.trainer().generate(QUERIES, return_prompt=False, **GREEDY)
        assert [r.tolist() for r in references] == [r.tolist() for r in base]
        assert [r.tolist() for r in responses] != [r.tolist() for r in base]


def test_generation_runs_without_dropout_and_keeps_the_mode() -> None:
    trainer = step_loops.trainer(policy=step_loops.model(peft=True, lora_dropout=0.9))
    trainer.model.train()
    first = trainer.generate(QUERIES, **GREEDY)
    second = trainer.generate(QUERIES, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert trainer.model.training


def test_respond_to_batch_samples_from_the_model() -> None:
    model = step_loops.model().eval()
    queries = torch.tensor([[5, 6], [7, 8]])
    assert respond_to_batch(model, queries, txt_len=3).shape == (2, 3)
    likeliest = respond_to_batch(model, queries, txt_len=3, top_k=1)
    greedy = model.generate(queries, do_sample=False, max_new_tokens=3)
    assert torch.equal(likeliest, greedy[:, 2:])


def queries_with_text() -> Dataset:
    tokenizer = tiny.tokenizer()
    texts = tiny.prompts(64)["prompt"]
    rows = {"query": texts, "input_ids": [tokenizer(text)["input_ids"] for text in texts]}
    dataset = Dataset.from_dict(rows | {"unused": ["x"] * 64})
    dataset.set_format("torch")
    return dataset


def collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("peft", [False, True])
def test_a_loop_of_the_old_kind_raises_the_reward(peft: bool) -> None:
    """The reward is the number of e's in 8 letters: about 0.2 untrained."""
    settings = step_loops.config(
        batch_size=32,
        mini_batch_size=16,
        ppo_epochs=2,
        seed=1,
        learning_rate=1e-2 if peft else 3e-3,
        init_kl_coef=0.02,
    )
    # The LM head too: no hidden state makes its small random logits differ much.
    layers = ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"]
    policy = step_loops.model(peft, target_modules=layers, init_lora_weights=True)
    trainer = PPOTrainer(
        settings, policy, None, tiny.tokenizer(), queries_with_text(), data_collator=collate
    )
    rewards = []
    for _ in range(8):
        for batch in trainer.dataloader:
            assert set(batch) == {"query", "input_ids"}
            queries = batch["input_ids"]
            responses = trainer.generate(
                queries, return_prompt=False, batch_size=32, max_new_tokens=8, **OLD_OPTIONS
            )
            batch["response"] = trainer.tokenizer.batch_decode(responses)
            scores = [torch.tensor(float(text.count("e"))) for text in batch["response"]]
            stats = trainer.step(queries, responses, scores)
            trainer.log_stats(stats, batch, scores)
            rewards.append(stats["ppo/mean_scores"])
    assert len(rewards) == 16
    assert rewards[0] < 0.6
    assert sum(rewards[-3:]) / 3 > 3.0
