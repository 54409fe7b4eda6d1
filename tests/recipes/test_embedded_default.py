"""The embedded default: its grammar and verdicts, its cache, and what its models can do."""

import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedded_default import REVIEWS, BuildError, EmbeddedDefault, count_reviews, judge
from embedded_default import build as build_module
from embedded_default.build import (
    child_environment,
    default_cache_dir,
    embedded_default,
    fingerprint,
    is_complete,
)
from embedded_default.corpus import draw_corpus
from embedded_default.grammar import (
    Grammar,
    Prompt,
    draw_completion,
    draw_stance,
    is_review,
    prompts,
)
from embedded_default.words import Domain, Grade

RECIPES = Path(build_module.__file__).resolve().parent.parent


@st.composite
def reviews(draw: st.DrawFn) -> str:
    random = Random(draw(st.integers(0, 2**32)))
    prompt = random.choice(list(prompts(REVIEWS)))
    return prompt.text + draw_completion(REVIEWS, prompt, draw_stance(random), random)


# ---------------------------------------------------------------- grammar

SMALL = Grammar(
    openers=("The", "To me the"),
    domains=(
        Domain(aspects=("soup", "bread"), relation="at the", qualifiers=("old",), things=("inn",)),
    ),
    verbs=("was",),
    times=("", " overall"),
    free_links=(". The",),
    agreeing_links=(", and the",),
    contrasting_links=(", but the",),
    subjects=("I", "We"),
    adjectives={Grade.PLEASED: ("nice",), Grade.APPALLED: ("awful", "dismal")},
    closers={Grade.PLEASED: ("liked it",), Grade.APPALLED: ("left furious",)},
)


def every_small_review() -> Iterator[str]:
    """Every review of SMALL, spelled out here from the rules in the grammar's docstring."""
    mild = ["", "very ", "really ", "rather ", "fairly ", "somewhat "]
    strong = ["", "absolutely ", "truly ", "utterly ", "simply ", "almost "]
    clauses = [
        (sign, f" was {adverb}{adjective}{time}")
        for sign, adverbs, adjectives in ((1, mild, ["nice"]), (-1, strong, ["awful", "dismal"]))
        for adverb, adjective, time in itertools.product(adverbs, adjectives, ["", " overall"])
    ]
    closers = [f". {s} {c}" for s in ("I", "We") for c in ("liked it", "left furious")]
    for opener, aspect in itertools.product(["The", "To me the"], ["soup", "bread"]):
        prompt = f"{opener} {aspect} at the old inn"
        for (sign, first), closer in itertools.product(clauses, ["", *closers]):
            if closer:
                yield f"{prompt}{first}{closer}."
            for (other_sign, second), other in itertools.product(clauses, ["soup", "bread"]):
                for link in (". The", ", and the" if sign == other_sign else ", but the"):
                    yield f"{prompt}{first}{link} {other}{second}{closer}."


def test_count_is_the_size_of_the_enumerated_set() -> None:
    spelled_out = set(every_small_review())
    assert count_reviews(SMALL) == len(spelled_out)
    assert all(is_review(text, SMALL) for text in spelled_out)


def test_reviews_are_many_and_prompts_distinct_and_neutral() -> None:
    assert count_reviews() > 10**15
    texts = [prompt.text for prompt in prompts(REVIEWS)]
    assert len(texts) == len(set(texts)) == 3 * 3 * 12 * 10 * 6
    assert {judge(text).label for text in texts} == {None}


@given(reviews())
def test_what_is_drawn_is_a_review_and_has_a_verdict(text: str) -> None:
    assert is_review(text)
    assert judge(text).label is not None
    assert len(judge(text).opinions) in (2, 3)


@pytest.mark.parametrize(
    "text",
    [
        "The soup at the old inn was nice.",  # one clause and no closer
        "The soup at the old inn was nice, but the bread was good.",  # "but" between like opinions
        "The soup at the old inn was nice, and the plot was good.",  # a film's aspect
        "The soup at the old inn was nice. We left furious",  # truncated
        "The soup at the old inn was utterly nice. We liked it.",  # a strong adverb, a mild word
        "",
    ],
)
def test_what_breaks_a_rule_is_no_review(text: str) -> None:
    assert not is_review(text)


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "text, label, score",
    [
        ("The soup at the old inn was nice. We left content.", "positive", 0.4),
        ("The soup at the old inn was truly superb. I adored it.", "positive", (1.0 + 0.8) / 2),
        ("The lid was rather dull, but the strap was wonderful.", "positive", (-0.3 + 0.8) / 2),
        ("The lid was rather dull. I would not try it again.", "negative", (-0.3 - 0.4) / 2),
        ("It was utterly awful; the menu was awful. We left furious.", "negative", -2.6 / 3),
        ("The soup was good. The bread was weak.", "neutral", 0.0),
        ("The soup was not good", "negative", -0.2),
        ("It wasn't very bad.", "positive", 0.25),
        ("Not great. Good!", "neutral", 0.0),
        ("WONDERFUL wonderful wonderful", "positive", 0.8),
        ("The soup at the old inn", None, 0.0),
        ("would try it, would not", None, 0.0),
        ("", None, 0.0),
        ("\ufffd 17 %%", None, 0.0),
    ],
)
def test_verdicts_by_hand(text: str, label: str | None, score: float) -> None:
    verdict = judge(text)
    assert verdict.label == label
    assert verdict.score == pytest.approx(score, abs=1e-12)  # float64, three terms at most


def test_strength_and_share() -> None:
    assert judge("It was superb. I loved every minute.").is_strong
    assert not judge("It was superb and nice.").is_strong
    assert judge("It was superb, nice and poor, bland.").positive_share == 0.5
    assert judge("Nothing of note.").positive_share == 0.0


@given(reviews(), st.integers(0, 200))
def test_a_truncated_review_keeps_the_opinions_it_finished(text: str, length: int) -> None:
    whole, part = judge(text).opinions, judge(text[:length]).opinions
    assert part == whole[: len(part)]


@given(st.text())
def test_any_text_has_a_score_in_range(text: str) -> None:
    assert -1.0 <= judge(text).score <= 1.0


# ---------------------------------------------------------------- corpus


def test_corpus_starts_low_and_leaves_room_above() -> None:
    corpus = draw_corpus(num_reviews=4000, num_pairs=200, seed=1)
    verdicts = [judge(row["prompt"] + row["completion"]) for row in corpus.reviews]
    positive = sum(verdict.label == "positive" for verdict in verdicts) / len(verdicts)
    assert 0.26 < positive < 0.34  # 0.29 in the long run; five standard errors are 0.036
    assert corpus == draw_corpus(num_reviews=4000, num_pairs=200, seed=1)
    assert corpus.reviews != draw_corpus(num_reviews=4000, num_pairs=200, seed=2).reviews


def test_pairs_are_ordered_and_evaluation_prompts_held_out() -> None:
    corpus = draw_corpus(num_reviews=500, num_pairs=500, seed=3)
    for pair in corpus.pairs:
        chosen, rejected = (judge(f"{pair['prompt']}{pair[key]}") for key in ("chosen", "rejected"))
        assert chosen.score > rejected.score
    held_out = {row["prompt"] for row in corpus.eval_prompts}
    used = [*corpus.reviews, *corpus.pairs, *corpus.train_prompts]
    assert held_out.isdisjoint(row["prompt"] for row in used)


# ---------------------------------------------------------------- tokenizer


def test_tokenizer_keeps_every_text_and_survives_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from embedded_default.tokenizer import VOCABULARY_SIZE, train_tokenizer

    rows = draw_corpus(num_reviews=16384, num_pairs=0, seed=0).reviews
    tokenizer = train_tokenizer(row["prompt"] + row["completion"] for row in rows)
    assert len(tokenizer) == VOCABULARY_SIZE
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.padding_side == "left"
    assert loaded.bos_token is None
    texts = [row["prompt"] + row["completion"] for row in rows[:200]]
    for text in [*texts, " two  spaces , and a tab\t", "Größe 寿司\n", "it 's not ."]:
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    lengths = [len(loaded(text)["input_ids"]) for text in texts]
    assert min(lengths) >= 12
    assert max(lengths) <= 48


# ---------------------------------------------------------------- cache


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that two processes, started together, have filled with one tiny build."""
    cache = tmp_path_factory.mktemp("cache")
    program = "from embedded_default import embedded_default; embedded_default(profile='tiny')"
    # As two ranks of a launcher: were the build to join them, it would wait for a rendezvous.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONPATH": str(RECIPES),
                "TRL_SYNC_CACHE": str(cache),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
                "ACCELERATE_USE_CPU": "true",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        messages = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(messages)
    # Four phases and the line that announces them, from one of the two.
    assert sum(text.count("embedded default ") for text in messages) == 5, "\n".join(messages)
    return cache


def test_two_processes_build_once_and_leave_nothing_else(tiny_cache: Path) -> None:
    folder = tiny_cache / f"embedded_default-tiny-{fingerprint(0)}"
    assert {path.name for path in tiny_cache.iterdir()} - {f"{folder.name}.lock"} == {folder.name}
    assert is_complete(folder)


def test_a_complete_folder_is_taken_without_a_build(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "_build", None)
    result = embedded_default(tiny_cache, profile="tiny")
    assert result.train_prompts.column_names == result.eval_prompts.column_names == ["prompt"]
    assert set(result.train_prompts["prompt"]).isdisjoint(result.eval_prompts["prompt"])
    assert (result.model_path / "model.safetensors").is_file()
    assert (result.reward_model_path / "model.safetensors").is_file()


@pytest.mark.parametrize("fault", ["no manifest", "file missing", "file cut short", "bad manifest"])
def test_a_half_done_folder_is_not_taken(tmp_path: Path, fault: str) -> None:
    (tmp_path / "weights").write_bytes(b"1234")
    (tmp_path / "complete.json").write_text(json.dumps({"weights": 4}))
    assert is_complete(tmp_path)
    if fault == "no manifest":
        (tmp_path / "complete.json").unlink()
    elif fault == "file missing":
        (tmp_path / "weights").unlink()
    elif fault == "file cut short":
        (tmp_path / "weights").write_bytes(b"12")
    else:
        (tmp_path / "complete.json").write_text('{"weights"')
    assert not is_complete(tmp_path)


def test_a_half_done_folder_is_replaced_and_leftovers_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"embedded_default-tiny-{fingerprint(0)}"
    (folder / "model").mkdir(parents=True)
    (tmp_path / f"{folder.name}.building-killed").mkdir()

    def write_prompts(into: Path, seed: int, profile: str) -> None:
        for name in ("train_prompts.json", "eval_prompts.json"):
            (into / name).write_text('[{"prompt": "The soup"}]')

    monkeypatch.setattr(build_module, "_run_build", write_prompts)
    assert embedded_default(tmp_path, profile="tiny").eval_prompts["prompt"][:] == ["The soup"]
    assert not (folder / "model").exists()
    assert not list(tmp_path.glob("*.building-*"))


def test_a_failed_build_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The child finds this module before the real one and fails on importing it.
    (tmp_path / "tokenizers.py").write_text("raise ValueError('planted fault')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cache = tmp_path / "cache"
    with pytest.raises(BuildError, match=r"(?s)exit code 1 .*planted fault"):
        embedded_default(cache, profile="tiny")
    assert [path.suffix for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="TRL_SYNC_CACHE"):
        embedded_default(tmp_path / "file" / "cache", profile="tiny")


def test_fingerprint_changes_with_seed_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(0)
    assert before == fingerprint(0)
    assert before != fingerprint(1)
    monkeypatch.setattr(build_module, "version", lambda package: "0")
    assert before != fingerprint(0)


def test_default_cache_dir_prefers_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("TRL_SYNC_CACHE", raising=False)
    assert default_cache_dir() == Path("/somewhere/trl_sync")
    monkeypatch.setenv("TRL_SYNC_CACHE", "/elsewhere")
    assert default_cache_dir() == Path("/elsewhere")


def test_build_environment_is_that_of_one_process_on_one_device() -> None:
    given_environment = {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1",
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_DEEPSPEED": "true", "TORCHELASTIC_RUN_ID": "x",
        "FSDP_VERSION": "2", "CUDA_VISIBLE_DEVICES": "3,4", "HOME": "/home/user",
        "PYTHONPATH": "/mine",
    }  # fmt: skip
    assert child_environment(given_environment) == {
        "CUDA_VISIBLE_DEVICES": "3",
        "HOME": "/home/user",
        "PYTHONPATH": f"{RECIPES}{os.pathsep}/mine",
        "HF_HUB_OFFLINE": "1",
        "GOMP_SPINCOUNT": "2000",
        "PYTHONUNBUFFERED": "1",
    }


def test_importing_the_package_is_cheap() -> None:
    program = (
        "import sys, embedded_default; "
        "print(sorted({'torch', 'transformers', 'datasets', 'trl'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(RECIPES)}
    printed = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert printed.strip() == "[]"


# ---------------------------------------------------------------- the models


@pytest.fixture(scope="session")
def embedded() -> EmbeddedDefault:
    """The normal build, from the normal cache."""
    return embedded_default()


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Texts sampled from a language model, each with its reward."""

    texts: list[str]
    ended: list[bool]
    rewards: Any

    def share(self, name: str) -> float:
        return sum(judge(text).label == name for text in self.texts) / len(self.texts)


def sample(model: Any, embedded: EmbeddedDefault, num_samples: int) -> tuple[list[str], list[bool]]:
    """Texts at temperature 1 from the evaluation prompts, and whether each ended by itself."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.model_path)
    openings = list(itertools.islice(itertools.cycle(embedded.eval_prompts["prompt"]), num_samples))
    torch.manual_seed(1)
    texts, ended = [], []
    for start in range(0, num_samples, 256):
        some = openings[start : start + 256]
        batch = tokenizer(some, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            tokens = model.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=32
            )[:, batch["input_ids"].shape[1] :]
        ended += (tokens == tokenizer.eos_token_id).any(dim=1).tolist()
        completions = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        texts += [prompt + completion for prompt, completion in zip(some, completions, strict=True)]
    return texts, ended


def rewards_of(texts: list[str], embedded: EmbeddedDefault) -> Any:
    """The reward of each text with its end, float64."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.reward_model_path)
    model = AutoModelForSequenceClassification.from_pretrained(embedded.reward_model_path).eval()
    ended = [text + tokenizer.eos_token for text in texts]
    batch = tokenizer(ended, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return model(**batch).logits[:, 0].double()


@pytest.fixture(scope="module")
def samples(embedded: EmbeddedDefault) -> Samples:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded.model_path).eval()
    texts, ended = sample(model, embedded, 2000)
    return Samples(texts=texts, ended=ended, rewards=rewards_of(texts, embedded))


def test_samples_are_reviews_diverse_and_end(samples: Samples, embedded: EmbeddedDefault) -> None:
    assert sum(map(is_review, samples.texts)) / 2000 > 0.9  # letter for letter, at temperature 1
    assert sum(judge(text).label is not None for text in samples.texts) / 2000 > 0.95
    assert sum(samples.ended) / 2000 > 0.95
    # The first 256 have 256 different prompts: the completions alone have to differ.
    opened = zip(samples.texts, embedded.eval_prompts["prompt"], strict=False)
    assert len({text.removeprefix(prompt) for text, prompt in opened}) > 0.9 * 256
    assert 0.22 < samples.share("positive") < 0.4


def test_policy_has_more_than_a_standard_deviation_to_climb(samples: Samples) -> None:
    import torch

    above = (samples.rewards - samples.rewards.mean()) / samples.rewards.std()
    verdicts = [judge(text) for text in samples.texts]
    positive = torch.tensor([verdict.label == "positive" for verdict in verdicts])
    strong = positive & torch.tensor([verdict.is_strong for verdict in verdicts])
    assert above[positive].mean() > 1.3
    assert above[strong].mean() > 1.7


def test_reward_follows_the_verdict(samples: Samples, embedded: EmbeddedDefault) -> None:
    import torch

    def ranks(values: Any) -> Any:
        """Ranks, with the mean rank for what is equal."""
        _, group, sizes = values.unique(return_inverse=True, return_counts=True)
        return (sizes.cumsum(0) - (sizes - 1) / 2)[group]

    scores = torch.tensor([judge(text).score for text in samples.texts], dtype=torch.float64)
    both = torch.stack([ranks(samples.rewards).double(), ranks(scores).double()])
    assert torch.corrcoef(both)[0, 1] > 0.9
    assert 0.5 < samples.rewards.std() < 2.0
    better, worse = held_out_pairs(1000, embedded)
    ordered = rewards_of(better, embedded) > rewards_of(worse, embedded)
    assert ordered.double().mean() > 0.95


def held_out_pairs(num_pairs: int, embedded: EmbeddedDefault) -> tuple[list[str], list[str]]:
    """Reviews of evaluation prompts by reviewers of independent stances, the better ones first."""
    random = Random(99)
    held_out = set(embedded.eval_prompts["prompt"])
    choices = [prompt for prompt in prompts(REVIEWS) if prompt.text in held_out]

    def review(prompt: Prompt) -> str:
        return prompt.text + draw_completion(REVIEWS, prompt, draw_stance(random), random)

    better, worse = [], []
    while len(better) < num_pairs:
        prompt = random.choice(choices)
        low, high = sorted((review(prompt), review(prompt)), key=lambda text: judge(text).score)
        if judge(high).score - judge(low).score > 0.05:
            better.append(high)
            worse.append(low)
    return better, worse


def test_four_bit_model_still_writes_reviews(embedded: EmbeddedDefault) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with warnings.catch_warnings():
        # bitsandbytes says on every CPU that an optional kernel is not installed.
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            embedded.model_path, quantization_config=quantization
        ).eval()
        texts, ended = sample(model, embedded, 512)
    linear = model.model.layers[0].mlp.up_proj
    assert linear.weight.dtype is torch.uint8
    assert sum(map(is_review, texts)) / 512 > 0.88  # two standard errors below the fp32 share
    assert sum(ended) / 512 > 0.95


def test_models_agree_with_the_tokenizer_and_with_nf4_blocks(tiny_cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    paths = embedded_default(tiny_cache, profile="tiny")
    tokenizer = AutoTokenizer.from_pretrained(paths.model_path)
    language_model = AutoModelForCausalLM.from_pretrained(paths.model_path)
    reward_model = AutoModelForSequenceClassification.from_pretrained(paths.reward_model_path)
    assert reward_model.config.num_labels == 1
    for model in (language_model, reward_model):
        assert model.config.pad_token_id == tokenizer.pad_token_id
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert model.config.max_position_embeddings == 256
        assert model.config.use_cache is True
        sizes = [size for weight in model.model.layers.parameters() for size in weight.shape]
        assert {size % 64 for size in sizes} == {0}
    assert language_model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert language_model.generation_config.pad_token_id == tokenizer.pad_token_id
