from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import runs
import tiny
from trl_sync.errors import ConfigError
from trl_sync.ppo import generation_options
from trl_sync.ppo.config import PPOConfig
from trl_sync.ppo.generation_options import GenerationOptions
from trl_sync.ppo.rollout import Sampling, roll_out, seeded

CPU = torch.device("cpu")


def config(**changes: Any) -> PPOConfig:
    return tiny.config("unused", **({"response_length": 8, "temperature": 0.7} | changes))


def sampling(model: Any = None, **changes: Any) -> Sampling:
    model = model if model is not None else tiny.llama()
    return Sampling.of(config(**changes), tiny.tokenizer(), model)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said once."""
    said: list[str] = []
    monkeypatch.setattr(generation_options.logger, "warning_once", said.append)
    return said


def plain(config: GenerationConfig) -> dict[str, Any]:
    """What is set; transformers' version is always."""
    fields = config.to_dict().items()
    return {n: v for n, v in fields if v is not None and n != "transformers_version"}


DEFAULT = {
    "max_new_tokens": 8,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "use_cache": True,
    "eos_token_id": [1],
    "pad_token_id": 0,
}


def test_without_options_nothing_is_added(warnings: list[str]) -> None:
    assert plain(sampling().generation_config()) == DEFAULT
    assert warnings == []


# --- What is taken over


def test_kwargs_come_before_the_config_and_bending_is_said(warnings: list[str]) -> None:
    found = sampling(
        generation_config=GenerationConfig(top_k=20, top_p=0.9, bos_token_id=3),
        generation_kwargs={"top_p": 0.8, "use_cache": False},
    )
    expected = DEFAULT | {"top_k": 20, "top_p": 0.8, "use_cache": False, "bos_token_id": 3}
    assert plain(found.generation_config()) == expected
    (said,) = warnings
    assert "top_k=20, top_p=0.8" in said
    assert "softmax(logits / temperature)" in said


def test_values_that_bend_nothing_are_no_news(warnings: list[str]) -> None:
    # As many scripts for the older trainer have it; its length would contradict, so it is left out.
    kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 1}
    kwargs |= {"max_new_tokens": 8, "temperature": 0.7, "num_beams": 1, "num_return_sequences": 1}
    assert plain(sampling(generation_kwargs=kwargs).generation_config()) == DEFAULT
    assert warnings == []


def test_kwargs_may_switch_off_what_the_config_bends(warnings: list[str]) -> None:
    base = GenerationConfig(top_k=20, repetition_penalty=1.2)
    kwargs = {"top_k": 0, "repetition_penalty": 1.0}
    found = sampling(generation_config=base, generation_kwargs=kwargs)
    assert plain(found.generation_config()) == DEFAULT
    assert warnings == []


def test_greedy_answers_drop_what_only_drawing_knows(warnings: list[str]) -> None:
    found = sampling(generation_kwargs={"top_p": 0.8, "repetition_penalty": 1.3})
    greedy = dataclasses.replace(found, greedy=True).generation_config()
    assert (greedy.do_sample, greedy.top_p, greedy.repetition_penalty) == (False, None, 1.3)


def test_a_generation_config_comes_from_a_folder_a_file_or_a_copied_configuration(
    tmp_path: Path,
) -> None:
    original = GenerationConfig(do_sample=True, top_k=7, eos_token_id=[1, 9], pad_token_id=99)
    original.save_pretrained(tmp_path)
    original.save_pretrained(tmp_path, config_file_name="sampling.json")
    copied = PPOConfig(**config(generation_config=original).to_dict()).generation_config
    for given in (original, str(tmp_path), str(tmp_path / "sampling.json"), copied):
        found = sampling(generation_config=given).generation_config()
        assert plain(found) == DEFAULT | {"top_k": 7, "eos_token_id": [1, 9]}


def test_kwargs_may_be_json() -> None:
    assert sampling(generation_kwargs='{"min_p": 0.1}').options == {"min_p": 0.1}


# --- End tokens


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stop_token": "eos"}, (1, 7, 8)),  # the tokenizer's and the model's
        ({"stop_token": "eos", "generation_kwargs": {"eos_token_id": [9, 1]}}, (1, 7, 8, 9)),
        (
            {"stop_token": "eos", "generation_config": GenerationConfig(eos_token_id=9)},
            (1, 7, 8, 9),
        ),
        ({"stop_token": None, "generation_kwargs": {"eos_token_id": [9, 1]}}, (9, 1)),
        ({"stop_token": None, "generation_kwargs": {"eos_token_id": 9}}, (9,)),
        ({"stop_token": None}, ()),
        ({"stop_token": None, "stop_token_id": 5}, (5,)),
        (
            {
                "stop_token": None,
                "stop_token_id": 5,
                "generation_config": GenerationConfig(eos_token_id=[5, 9]),
            },
            (5,),
        ),
        (
            {"stop_token": None, "stop_token_id": 5, "generation_kwargs": {"eos_token_id": [5]}},
            (5,),
        ),
    ],
)
def test_which_tokens_end_a_response(changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    model = tiny.llama()
    model.generation_config.eos_token_id = [7, 8]
    found = sampling(model, **changes)
    assert found.stop_token_ids == expected
    assert found.generation_config().eos_token_id == (list(expected) or None)


def test_any_of_several_end_tokens_ends_a_response(tmp_path: Path) -> None:
    ends = list(range(3, 33))  # about half of all tokens, so that most responses end early
    trainer = runs.make(
        tmp_path, stop_token=None, generation_kwargs={"eos_token_id": ends}, missing_eos_penalty=1.0
    )
    with seeded(CPU, 1):
        rollout = roll_out(
            trainer.backbone,
            trainer.train_dataset.batch(range(32)),
            trainer.sampling,
            batch_size=32,
            device=CPU,
        )
    last = []
    for ids, mask, stopped in zip(
        rollout.response_ids, rollout.response_mask, rollout.stopped, strict=True
    ):
        tokens = ids[mask].tolist()
        assert not set(tokens[:-1]) & set(ends)
        assert (tokens[-1] in ends) == bool(stopped)
        last.append(tokens[-1])
    assert len(set(last) & set(ends)) > 3


# --- What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_new_tokens": 9}, "max_new_tokens=9 .* contradicts response_length=8"),
        ({"temperature": 1.0}, "temperature=1.0 .* contradicts temperature=0.7"),
        ({"max_length": 8}, "max_length=8 .* counts the prompt too. Set response_length"),
        ({"num_return_sequences": 4}, "num_return_sequences=4 .* set num_generations"),
        ({"do_sample": False}, "do_sample=False .* PPO learns from what the policy samples"),
        ({"num_beams": 2}, "num_beams=2 .* not from a search"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 .* not from a search"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 .* policy alone"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True .* tokens alone"),
        ({"output_scores": True}, "output_scores=True .* tokens alone"),
        ({"stop_strings": ["."]}, "stop_strings=.* ends at a token"),
        ({"max_time": 1.0}, "max_time=1.0 .* depend on the clock"),
        ({"token_healing": True}, "token_healing=True .* rewrites the prompt"),
        ({"cache_implementation": "paged"}, "'paged' .* batch continuously"),
        ({"eos_token_id": -1}, "eos_token_id=-1 .* is no token"),
    ],
)
@pytest.mark.parametrize("source", ["generation_config", "generation_kwargs"])
def test_what_contradicts_ppo_is_refused_by_name(
    source: str, changes: dict[str, Any], said: str
) -> None:
    given: Any = changes
    if source == "generation_config":
        given = GenerationConfig()
        for name, value in changes.items():
            setattr(given, name, value)
    with pytest.raises(ConfigError, match=said) as raised:
        GenerationOptions.of(config(stop_token="eos", **{source: given}))
    assert source in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"generation_kwargs": {"top_q": 1, "logits_processor": []}},
            "has logits_processor, top_q",
        ),
        ({"generation_kwargs": [1]}, "must be a dictionary"),
        ({"generation_config": "no/such/folder"}, "'no/such/folder' is neither a folder or file"),
        ({"generation_config": 5}, "must be a transformers GenerationConfig, .* got int"),
        (
            {"stop_token": None, "generation_config": GenerationConfig(eos_token_id=9)},
            r"eos_token_id=\[9\], but without a stop token",
        ),
        (
            {
                "stop_token": None,
                "stop_token_id": 5,
                "generation_kwargs": {"eos_token_id": [5, 9]},
            },
            r"eos_token_id=\[5, 9\] in generation_kwargs contradicts stop_token_id=5",
        ),
    ],
)
def test_what_cannot_be_read_or_decided_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GenerationOptions.of(config(**changes))


@pytest.mark.newest
def test_every_refused_name_is_one_of_transformers() -> None:
    # A name that moved would be refused for another reason, or not at all.
    known = set(GenerationConfig().to_dict())
    assert set(generation_options.BENDING) <= known
    assert set(generation_options._REFUSED_NAMES) <= known


def test_a_trainer_refuses_before_it_writes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_beams=4"):
        runs.make(tmp_path, generation_kwargs={"num_beams": 4})
    assert not (tmp_path / "out").exists()


# --- In a run


def test_top_k_reaches_the_rollouts(tmp_path: Path) -> None:
    # With one token to choose from, every response repeats what the policy finds likeliest.
    found: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        found.append(completions)
        return [0.0] * len(prompts)

    options = {"reward": reward, "total_episodes": 16, "num_generations": 4}
    runs.train(tmp_path / "one", generation_kwargs={"top_k": 1}, **options)
    runs.train(tmp_path / "all", **options)
    one, every = found
    assert [len(set(one[i : i + 4])) for i in range(0, 16, 4)] == [1, 1, 1, 1]
    assert [len(set(every[i : i + 4])) for i in range(0, 16, 4)] == [4, 4, 4, 4]


def test_defect_8_a_repetition_penalty_stored_in_the_model_does_not_bend_the_ratio(
    tmp_path: Path,
) -> None:
    model = tiny.llama()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 3
    trainer = runs.train(tmp_path, model=model, total_episodes=16)
    assert runs.rows(trainer)[0]["val/ratio"] == pytest.approx(1, abs=1e-6)  # fp32
    # And the responses are those of a model without it.
    other = runs.train(tmp_path / "other", total_episodes=16)
    assert runs.same(runs.trained(trainer), runs.trained(other))


def test_defect_7_the_models_own_generation_config_still_stops_at_eos(tmp_path: Path) -> None:
    model = tiny.llama()
    model.generation_config.do_sample, model.generation_config.top_k = True, 11
    before = model.generation_config.to_dict()
    # TRL took the end token away here, because the default has no stop token.
    kwargs = {"top_p": 0.9}
    trainer = runs.train(tmp_path, model=model, stop_token=None, generation_kwargs=kwargs)
    causal = trainer.backbone.causal_model
    assert causal.generation_config.to_dict() == before
    assert causal.generation_config.eos_token_id == 1
    causal.generation_config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 1


def test_defect_6_the_penalty_looks_at_the_configured_stop_token(tmp_path: Path) -> None:
    # Every token but [EOS] ends a response here: by [EOS] (as in TRL) all of them would be fined.
    trainer = runs.train(
        tmp_path,
        reward=lambda prompts, completions: [0.0] * len(prompts),
        stop_token=None,
        generation_kwargs={"eos_token_id": [i for i in range(64) if i != 1]},
        missing_eos_penalty=3.0,
        response_length=4,
        total_episodes=16,
    )
    (row,) = runs.rows(trainer, "objective/scores")
    assert row["objective/stopped"] == 1.0
    assert row["objective/scores"] == 0.0
    fined = runs.train(
        tmp_path / "fined",
        reward=lambda prompts, completions: [0.0] * len(prompts),
        stop_token=None,
        stop_token_id=63,
        missing_eos_penalty=3.0,
        response_length=4,
        total_episodes=16,
    )
    (row,) = runs.rows(fined, "objective/scores")
    assert row["objective/scores"] == pytest.approx(-3.0 * (1 - row["objective/stopped"]))
    assert row["objective/scores"] < 0
