from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig

import tiny
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.ppo.batch import PromptBatch
from trl_sync.ppo.rollout import (
    Sampling,
    mask_after_stop,
    pad_left,
    roll_out,
    seeded,
    stop_token_ids,
)

NO_DEADLINE = settings(deadline=None)  # the machine may be busy with other things
CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16], [17, 18, 19, 20], [21, 22]]


def prompt_batch(token_ids: list[list[int]]) -> PromptBatch:
    names = [f"prompt {number}" for number in range(len(token_ids))]
    return PromptBatch(prompts=names, token_ids=token_ids, columns={})


def sampling(length: int = 6, **changes: Any) -> Sampling:
    options = {"temperature": 1.0, "stop_token_ids": ()}
    return Sampling(response_length=length, **(options | changes))


@pytest.fixture(scope="module")
def backbone() -> SharedBackbone:
    model = tiny.llama()
    with torch.no_grad():
        # Random weights predict every token alike; this makes likely and unlikely ones.
        model.lm_head.weight *= 10
    return SharedBackbone(model)


# --- Masks


@pytest.mark.parametrize(
    ("ids", "length", "stop_ids", "mask", "stopped"),
    [
        ([7, 1, 5, 5], 4, (1,), [1, 1, 0, 0], True),  # the stop token counts
        ([1, 7, 5, 5], 4, (1,), [1, 0, 0, 0], True),  # at the first position
        ([7, 5, 5, 1], 4, (1,), [1, 1, 1, 1], True),  # at the last position
        ([7, 5, 5, 6], 4, (1,), [1, 1, 1, 1], False),  # nowhere
        ([7, 1, 5, 1], 4, (1,), [1, 1, 0, 0], True),  # and again after the end
        ([1, 1, 1, 1], 4, (1,), [1, 0, 0, 0], True),  # padding has the id of the stop token
        ([7, 5, 1, 1], 2, (1,), [1, 1, 0, 0], False),  # ... and is not generated text
        ([7, 2, 1, 5], 4, (1, 2), [1, 1, 0, 0], True),  # the first of several
        ([7, 1, 1, 1], 4, (), [1, 1, 1, 1], False),  # no stop token at all
        ([0, 0, 7, 0], 4, (1,), [1, 1, 1, 1], False),  # id 0 may be sampled like any other
        ([7, 5, 0, 0], 0, (1,), [0, 0, 0, 0], False),  # nothing generated
    ],
)
def test_mask_after_stop_by_hand(
    ids: list[int], length: int, stop_ids: tuple[int, ...], mask: list[int], stopped: bool
) -> None:
    found = mask_after_stop(torch.tensor([ids]), torch.tensor([length]), stop_ids)
    assert found[0].tolist() == [stopped]
    assert found[1].int().tolist() == [mask]


@NO_DEADLINE
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=5, max_size=5), st.integers(0, 5)),
        min_size=1,
        max_size=4,
    ),
    st.sets(st.integers(0, 3)),
)
def test_mask_after_stop_against_a_loop(
    rows: list[tuple[list[int], int]], stop_ids: set[int]
) -> None:
    ids = torch.tensor([tokens for tokens, _ in rows])
    lengths = torch.tensor([length for _, length in rows])
    stopped, mask = mask_after_stop(ids, lengths, tuple(stop_ids))
    for row, (tokens, length) in enumerate(rows):
        expected = []
        for token in tokens[:length]:
            expected.append(True)
            if token in stop_ids:
                break
        ended = bool(expected) and tokens[len(expected) - 1] in stop_ids
        assert stopped[row].item() == ended
        assert mask[row].tolist() == expected + [False] * (5 - len(expected))


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[5, 6], [7, 8, 9], [0]], CPU)
    assert ids.tolist() == [[0, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert mask.int().tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]


# --- Which tokens stop a response


@pytest.mark.parametrize(
    ("settings", "eos_of_model", "expected"),
    [
        ({"stop_token": None, "stop_token_id": None}, 1, ()),
        ({"stop_token": None, "stop_token_id": 9}, 1, (9,)),
        ({"stop_token": None, "stop_token_id": 0}, 1, (0,)),
        ({"stop_token": "eos", "stop_token_id": None}, 1, (1,)),
        ({"stop_token": "eos", "stop_token_id": None}, None, (1,)),
        ({"stop_token": "eos", "stop_token_id": None}, 7, (1, 7)),
        ({"stop_token": "eos", "stop_token_id": None}, [7, 1, 8], (1, 7, 8)),
    ],
)
def test_stop_token_ids(
    settings: dict[str, Any], eos_of_model: Any, expected: tuple[int, ...]
) -> None:
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=eos_of_model))
    found = stop_token_ids(SimpleNamespace(**settings), tiny.tokenizer(), model)
    assert found == expected  # the tokenizer's [EOS] is 1


# --- Random numbers


def test_seeded_blocks_depend_on_their_entropy_alone() -> None:
    torch.manual_seed(1)
    with seeded(CPU, 42, 1, 0):
        first = torch.randn(4)
    torch.manual_seed(2)
    torch.randn(7)
    with seeded(CPU, 42, 1, 0):
        again = torch.randn(4)
    with seeded(CPU, 42, 1, 1):
        other = torch.randn(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_seeded_block_leaves_every_generator_as_it_was() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with contextlib.suppress(KeyError), seeded(CPU, 3):
        torch.randn(5)
        raise KeyError  # also when the block fails
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_rollouts_in_seeded_blocks_repeat(backbone: SharedBackbone) -> None:
    def responses(*entropy: int) -> Tensor:
        with seeded(CPU, *entropy):
            batch = prompt_batch(PROMPTS)
            return roll_out(backbone, batch, sampling(), batch_size=3, device=CPU).response_ids

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = responses(1, 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(first, responses(1, 2))
    assert not torch.equal(first, responses(1, 3))


# --- Rolling out


def continuations(backbone: SharedBackbone, prompts: list[list[int]], length: int) -> list[Any]:
    """The likeliest continuations, one whole pass a token, without batching, cache or generate."""
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(length):
            with torch.no_grad(), backbone.router.routes("policy"):
                logits = backbone.causal_model(torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
        found.append(tokens[len(prompt) :])
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_greedy_rollouts_keep_the_order_of_the_prompts(
    backbone: SharedBackbone, batch_size: int
) -> None:
    batch = prompt_batch(PROMPTS)
    rollout = roll_out(backbone, batch, sampling(greedy=True), batch_size=batch_size, device=CPU)
    assert rollout.response_ids.tolist() == continuations(backbone, PROMPTS, 6)
    assert rollout.prompts is batch
    assert [
        ids[mask].tolist()
        for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    ] == PROMPTS
    assert rollout.response_mask.all()
    assert not rollout.stopped.any()


def test_generation_ends_when_every_row_has_ended(backbone: SharedBackbone) -> None:
    (expected,) = continuations(backbone, PROMPTS[:1], 12)
    stop = expected[2]
    length = expected.index(stop) + 1
    calls = []
    handle = backbone.causal_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        rollout = roll_out(
            backbone,
            prompt_batch(PROMPTS[:1] * 2),
            sampling(12, greedy=True, stop_token_ids=(stop,)),
            batch_size=2,
            device=CPU,
        )
    finally:
        handle.remove()
    assert rollout.response_ids.tolist() == [expected[:length]] * 2
    assert rollout.stopped.tolist() == [True, True]
    assert len(calls) == length < 12


def test_responses_of_different_lengths_are_padded_on_the_right(backbone: SharedBackbone) -> None:
    expected = continuations(backbone, PROMPTS, 6)
    # A token that ends some responses and not others.
    stop = next(
        token
        for tokens in expected
        for token in tokens[1:3]
        if any(token not in other for other in expected)
    )
    rollout = roll_out(
        backbone,
        prompt_batch(PROMPTS),
        sampling(greedy=True, stop_token_ids=(stop,)),
        batch_size=1,
        device=CPU,
    )
    ended = [stop in tokens for tokens in expected]
    assert set(ended) == {True, False}  # both kinds of response are there
    assert rollout.stopped.tolist() == ended
    for row, tokens in enumerate(expected):
        length = tokens.index(stop) + 1 if ended[row] else 6
        assert rollout.response_mask[row].tolist() == [c < length for c in range(6)]
        assert rollout.response_ids[row].tolist() == tokens[:length] + [0] * (6 - length)


def test_ids_beyond_the_embeddings_never_reach_the_model(backbone: SharedBackbone) -> None:
    # A padding token that was added without resizing the embeddings has id 64 of 64.
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(64 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    rows = backbone.causal_model.get_input_embeddings().weight.shape[0]
    assert tokenizer.pad_token_id == rows == 64
    backbone.causal_model.generation_config.pad_token_id = tokenizer.pad_token_id
    seen = []
    embeddings = backbone.causal_model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, ids: seen.append(int(ids[0].max())))
    try:
        everything = tuple(range(0, 64, 3))  # rows end at different times
        rollout = roll_out(
            backbone,
            prompt_batch(PROMPTS),
            sampling(stop_token_ids=everything),
            batch_size=4,
            device=CPU,
        )
    finally:
        handle.remove()
        backbone.causal_model.generation_config.pad_token_id = 0
    assert rollout.stopped.any()
    assert max(seen) < 64
    assert int(rollout.input_ids.max()) < 64


# --- The sampling distribution

NUM_DRAWS = 4000
# It contains every second token, so a repetition penalty would change half the probabilities.
LONG_PROMPT = list(range(3, 64, 2))
CHI_SQUARE_15 = 37.70  # 99.9% quantile of chi-square with 15 degrees of freedom, from tables


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic over 16 groups: the 14 likeliest tokens, the next 26, the last 24."""
    ranked = probabilities.argsort(descending=True)
    groups = [*ranked[:14].split(1), ranked[14:40], ranked[40:]]
    shares = [float(probabilities[group].sum()) for group in groups]
    counts = [int(torch.isin(tokens, group).sum()) for group in groups]
    assert min(shares) * len(tokens) > 5  # or the statistic has another distribution
    return sum(
        (count - share * len(tokens)) ** 2 / (share * len(tokens))
        for count, share in zip(counts, shares, strict=True)
    )


def first_token_probabilities(backbone: SharedBackbone, prompt: list[int], t: float) -> Tensor:
    with torch.no_grad(), backbone.router.routes("policy"):
        logits = backbone.causal_model(torch.tensor([prompt])).logits[0, -1]
    return torch.softmax(logits.double() / t, dim=-1)


BENT = GenerationConfig(
    repetition_penalty=5.0,
    top_k=3,
    top_p=0.5,
    temperature=3.0,
    do_sample=False,
    no_repeat_ngram_size=1,
    min_new_tokens=4,
    suppress_tokens=[5, 6, 7, 8, 9],
    eos_token_id=1,
)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_first_tokens_follow_the_softmax_of_the_policy(
    backbone: SharedBackbone, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever the model's own generation config says.
    monkeypatch.setattr(backbone.causal_model, "generation_config", BENT)
    prompt = LONG_PROMPT
    with seeded(CPU, 2026):
        rollout = roll_out(
            backbone,
            prompt_batch([prompt] * NUM_DRAWS),
            sampling(1, temperature=temperature),
            batch_size=2000,
            device=CPU,
        )
    probabilities = first_token_probabilities(backbone, prompt, temperature)
    assert chi_square(rollout.response_ids[:, 0], probabilities) < CHI_SQUARE_15


BEND: list[Callable[[GenerationConfig], None]] = [
    lambda config: setattr(config, "repetition_penalty", 1.3),
    lambda config: setattr(config, "top_k", 20),
    lambda config: setattr(config, "top_p", 0.8),
    lambda config: setattr(config, "temperature", 1.2),
]


@pytest.mark.parametrize("bend", BEND, ids=["repetition_penalty", "top_k", "top_p", "temperature"])
def test_the_statistic_notices_a_bent_distribution(
    backbone: SharedBackbone, bend: Callable[[GenerationConfig], None]
) -> None:
    # The twin of the test above: the same draw with one setting that leaks.
    config = sampling(1).generation_config()
    bend(config)
    prompt = torch.tensor([LONG_PROMPT]).repeat(2000, 1)
    with seeded(CPU, 2026):
        drawn = backbone.generate(prompt, torch.ones_like(prompt).bool(), config)
    probabilities = first_token_probabilities(backbone, prompt[0].tolist(), 1.0)
    assert chi_square(drawn[:, -1], probabilities) > CHI_SQUARE_15


def test_later_tokens_follow_the_policy_too(
    backbone: SharedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Probability of a two-token response: the product. Its mean log-probability over many draws is
    # minus the entropy of the joint distribution, summed here over all 64 x 64 responses.
    monkeypatch.setattr(backbone.causal_model, "generation_config", BENT)
    prompt = [9, 10, 9, 11]
    first = first_token_probabilities(backbone, prompt, 1.0)
    with torch.no_grad(), backbone.router.routes("policy"):
        continued = torch.tensor([[*prompt, token] for token in range(64)])
        second = backbone.causal_model(continued).logits[:, -1].double().log_softmax(-1)
    joint = first.log().unsqueeze(1) + second
    expected = float((joint.exp() * joint).sum())
    spread = float((joint.exp() * (joint - expected).pow(2)).sum()) ** 0.5
    with seeded(CPU, 7):
        rollout = roll_out(
            backbone,
            prompt_batch([prompt] * NUM_DRAWS),
            sampling(2),
            batch_size=2000,
            device=CPU,
        )
    drawn = joint[rollout.response_ids[:, 0], rollout.response_ids[:, 1]]
    # 3.3 standard errors of a mean: one seed in a thousand would miss it.
    assert float(drawn.mean()) == pytest.approx(expected, abs=3.3 * spread / NUM_DRAWS**0.5)


def test_the_models_own_generation_config_survives(backbone: SharedBackbone) -> None:
    before = backbone.causal_model.generation_config
    roll_out(backbone, prompt_batch(PROMPTS[:1]), sampling(1), batch_size=1, device=CPU)
    assert backbone.causal_model.generation_config is before
