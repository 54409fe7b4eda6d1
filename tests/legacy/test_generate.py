"""`generate` of the step API, and the whole loop: query, generate, score, step."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import logger

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


def test_queries_are_sequences_of_tokens() -> None:
    trainer = step_loops.trainer()
    expected = [row.tolist() for row in trainer.generate(QUERIES, **GREEDY)]
    arrays = [query.numpy() for query in QUERIES]
    for queries in (tuple(QUERIES), arrays, [query.tolist() for query in QUERIES]):
        assert [row.tolist() for row in trainer.generate(queries, **GREEDY)] == expected
    assert torch.equal(trainer.generate(arrays[0], **GREEDY)[0], torch.tensor(expected[0]))
    for wrong in (
        QUERIES[0][None],
        [5, 6],
        [QUERIES[0].float()],
        "text",
        [torch.stack(QUERIES[:1])],
    ):
        with pytest.raises(ConfigError, match="must be a tensor of tokens, of one dimension"):
            trainer.generate(wrong, **GREEDY)
    with pytest.raises(ConfigError, match="A query is empty"):
        trainer.generate([QUERIES[0], QUERIES[0][:0]], **GREEDY)


def test_one_query_takes_every_argument_of_the_model() -> None:
    trainer = step_loops.trainer()
    query, sampled = QUERIES[0], {"do_sample": True, "max_new_tokens": 4}
    mask = torch.tensor([[0, 1, 1]])
    for options in ({"num_return_sequences": 3}, {"attention_mask": mask}):
        given = {"attention_mask": torch.ones(1, 3, dtype=torch.long)} | options
        torch.manual_seed(1)
        expected = trainer.model.generate(input_ids=query[None], **given, **sampled)
        torch.manual_seed(1)
        assert torch.equal(trainer.generate(query, **options, **sampled), expected)
    assert trainer.generate(query, return_prompt=False, num_beams=2, **sampled).shape == (1, 4)
    structured = {"return_dict_in_generate": True, "output_scores": True}
    output = trainer.generate(query, **structured, **GREEDY)
    assert output.sequences.shape == (1, 9)
    assert len(output.scores) == 6
    with pytest.raises(ConfigError, match="return_prompt=False has no effect"):
        trainer.generate(query, return_prompt=False, **structured, **GREEDY)


def test_a_list_refuses_what_it_cannot_honour() -> None:
    trainer = step_loops.trainer()
    wrong: tuple[tuple[str, Any], ...] = (
        ("num_return_sequences", 2),
        ("return_dict_in_generate", True),
        ("attention_mask", torch.ones(1, 3)),
        ("inputs_embeds", torch.ones(1, 3, 64)),
    )
    for name, value in wrong:
        with pytest.raises(ConfigError, match=f"cannot take {name}: "):
            trainer.generate(QUERIES, **{name: value}, **GREEDY)
    several = GenerationConfig(do_sample=True, num_return_sequences=2)
    with pytest.raises(ConfigError, match="cannot take num_return_sequences: repeat each query"):
        trainer.generate(QUERIES, generation_config=several)
    harmless = {"num_return_sequences": 1, "return_dict_in_generate": False}
    assert len(trainer.generate(QUERIES, **harmless, **GREEDY)) == 4


def test_a_generation_config_is_all_that_transformers_gets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    logger.warning_once.cache_clear()
    trainer = step_loops.trainer()
    config = GenerationConfig(do_sample=False, max_new_tokens=6)
    expected = trainer.generate(QUERIES, **GREEDY)
    for shorter in (6, 3):
        options = {"generation_config": config, "length_sampler": lambda n=shorter: n}
        responses = trainer.generate(QUERIES, return_prompt=False, **options)
        for query, response, whole in zip(QUERIES, responses, expected, strict=True):
            assert response.tolist() == whole[len(query) : len(query) + shorter].tolist()
        assert torch.equal(trainer.generate(QUERIES[0], **options)[0], expected[0][: 3 + shorter])
    assert (config.max_new_tokens, config.pad_token_id) == (6, None)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "deprecated" not in caplog.text


def test_without_a_stop_token_a_response_still_ends_at_eos() -> None:
    """As in TRL: scripts pass an id that no token has, and expect it."""
    trainer = step_loops.trainer()
    with torch.no_grad():
        # Every token is as likely as any other, so eos, which is 1, comes up in 100 of them.
        trainer.model.pretrained_model.lm_head.weight.zero_()
    sampled = {"do_sample": True, "top_k": 0, "max_new_tokens": 100, "return_prompt": False}
    eos = trainer.tokenizer.eos_token_id
    for other in (100_000, -1, 9):
        torch.manual_seed(2)
        whole = trainer.generate(QUERIES, eos_token_id=other, remove_padding=False, **sampled)
        torch.manual_seed(2)
        responses = trainer.generate(QUERIES, eos_token_id=other, **sampled)
        for response, row in zip(responses, (row.tolist() for row in whole), strict=True):
            ends = [row.index(stop) for stop in (eos, other) if stop in row]
            assert response.tolist() == row[: min(ends, default=len(row)) + 1]
        assert any(int(response[-1]) == eos for response in responses)


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
