"""What users of TRL's PPO reported, by the numbers of their issues.

docs/migration.md lists all of them; those that are not here have their tests where it says.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import runs
import tiny
from trl_sync import AutoModelForCausalLMWithValueHead, ConfigError, PPOTrainer, SharedBackbone
from trl_sync.backbone.export import load_models

KINDS = ("shared", "separate")


def make(kind: str, folder: Path, **options: Any) -> PPOTrainer:
    """A trainer on a shared base, or of four models, of one iteration unless told otherwise."""
    arguments: dict[str, Any] = {
        "model": tiny.llama(),
        "reward_model": runs.count_e,
        "train_dataset": tiny.prompts(),
        "processing_class": tiny.tokenizer(),
    }
    if kind == "separate":
        arguments["value_model"] = tiny.reward_llama(seed=3)
    known = (*arguments, "value_model", "peft_config", "data_collator", "reward_processing_classes")
    arguments |= {name: options.pop(name) for name in known if name in options}
    if kind == "shared" and not isinstance(arguments["model"], SharedBackbone):
        arguments.setdefault("peft_config", runs.lora())
    settings = {"total_episodes": 16} | options
    return PPOTrainer(args=tiny.config(folder / "out", **settings), **arguments)


def train(kind: str, folder: Path, **options: Any) -> PPOTrainer:
    trainer = make(kind, folder, **options)
    trainer.train()
    return trainer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.equal(before[name])}


# --- Constructor and data


@pytest.mark.parametrize("kind", KINDS)
def test_issue_2340_string_columns_never_reach_the_collator(tmp_path: Path, kind: str) -> None:
    tokenizer = tiny.tokenizer()
    rows = tiny.prompts().map(
        lambda row: {
            "input_ids": tokenizer(row["prompt"])["input_ids"],
            "query": row["prompt"],
            "tags": ["a", row["prompt"]],
        }
    )
    collated: list[set[str]] = []
    rewarded: list[Any] = []

    class Collator(DataCollatorWithPadding):
        def __call__(self, features: list[dict[str, Any]]) -> Any:
            collated.extend(set(feature) for feature in features)
            return super().__call__(features)

    def reward(completions: list[str], query: list[str], tags: list[Any]) -> list[float]:
        rewarded.extend(zip(query, tags, strict=True))
        return [0.0] * len(completions)

    trainer = make(
        kind,
        tmp_path,
        train_dataset=rows,
        data_collator=Collator(tokenizer),
        reward_model=reward,
    )
    batch = next(iter(trainer.dataloader))
    assert all(isinstance(column, torch.Tensor) for column in batch.values())
    assert len(collated) == 64
    assert all(names == {"input_ids", "attention_mask"} for names in collated)
    assert len(rewarded) == 16
    assert all(tags == ["a", query] for query, tags in rewarded)


@pytest.mark.parametrize("adapter", [False, True])
def test_issues_2353_4024_ref_model_may_be_left_out(tmp_path: Path, adapter: bool) -> None:
    """By default None: then the reference is the policy as it is at the beginning."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        initial = tiny.llama()(ids).logits
    options = {"peft_config": runs.lora()} if adapter else {}
    trainer = train("separate", tmp_path, total_episodes=32, **options)
    with torch.no_grad():
        policy = trainer.policy_model(ids).logits
        with trainer.null_ref_context():
            reference = (trainer.ref_model or trainer.policy_model)(ids).logits
    assert reference.equal(initial)
    assert not policy.equal(initial)
    first, second = runs.rows(trainer, "objective/kl")
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(second["objective/kl"]) > 1e-3


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes))


def test_issue_3332_encoder_decoder_models_are_sent_to_the_step_api(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder-decoder .* trl_sync\.legacy with AutoModelFor"):
        make("separate", tmp_path, model=t5())
    with pytest.raises(ConfigError, match=r"'t5'|encoder-decoder"):
        make("shared", tmp_path, model=t5())
    assert not (tmp_path / "out").exists()


def test_issue_1784_a_processor_for_images_is_refused(tmp_path: Path) -> None:
    processor = SimpleNamespace(tokenizer=tiny.tokenizer(), image_processor=object())
    with pytest.raises(ConfigError, match=r"must be a tokenizer, .* PPO trains text models"):
        make("shared", tmp_path, processing_class=processor)


def test_issue_2025_the_stock_trainer_is_initialised(tmp_path: Path) -> None:
    """TRL left that out, and callers found neither `deepspeed` nor `_memory_tracker`."""
    args = TrainingArguments(output_dir=str(tmp_path / "stock"), use_cpu=True, report_to="none")
    stock = Trainer(tiny.llama(), args, train_dataset=tiny.prompts())
    trainer = make("separate", tmp_path)
    assert {"deepspeed", "_memory_tracker"} <= vars(stock).keys()
    assert not vars(stock).keys() - vars(trainer).keys()


# --- Rewards


def test_issue_2718_value_head_models_are_reward_and_value_models(tmp_path: Path) -> None:
    """They have no `base_model_prefix`, which TRL looked up."""

    def with_value_head(seed: int) -> AutoModelForCausalLMWithValueHead:
        return AutoModelForCausalLMWithValueHead.from_pretrained(tiny.llama(seed=seed))

    reward_model, value_model = with_value_head(5), with_value_head(6)
    before = weights(reward_model), weights(value_model)
    trainer = train("separate", tmp_path, reward_model=reward_model, value_model=value_model)
    assert not moved(reward_model, before[0])
    assert "v_head.summary.weight" in moved(value_model, before[1])
    assert runs.rows(trainer, "objective/scores")[0]["objective/scores"] != 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_issues_2518_2363_2451_3093_rules_are_rewards(tmp_path: Path, kind: str) -> None:
    """A function, an object, and a function that waits for a service; weighted and added."""
    said: dict[str, list[float]] = {"letters": [], "Rule": [], "judge": []}

    def letters(completions: list[str], **columns: Any) -> list[float]:
        said["letters"] += [float(len(text)) for text in completions]
        return said["letters"][-len(completions) :]

    class Rule:
        def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
            said["Rule"] += [
                float(text[:1] in prompt) for text, prompt in zip(completions, prompts, strict=True)
            ]
            return said["Rule"][-len(completions) :]

    async def judge(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        said["judge"] += [float(text.count("a")) for text in completions]
        return said["judge"][-len(completions) :]

    given = [0.5, 2.0, -1.0]
    trainer = train(
        kind, tmp_path, reward_model=[letters, Rule(), judge], reward_weights=given, stop_token=None
    )
    means = {name: sum(values) / len(values) for name, values in said.items()}
    assert all(len(values) == 16 for values in said.values())
    row = runs.rows(trainer, "objective/scores")[0]
    by_hand = sum(w * mean for w, mean in zip(given, means.values(), strict=True))
    assert row["objective/scores"] == pytest.approx(by_hand, rel=1e-5)
    assert {name: row[f"rewards/{name}/mean"] for name in means} == pytest.approx(means, rel=1e-5)


def test_issue_3528_peft_models_are_reward_and_value_models(tmp_path: Path) -> None:
    def adapted(seed: int) -> Any:
        config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
        return get_peft_model(tiny.reward_llama(seed=seed), config)

    reward_model, value_model = adapted(5), adapted(6)
    before = weights(reward_model), weights(value_model)
    train("separate", tmp_path, reward_model=reward_model, value_model=value_model)
    assert not moved(reward_model, before[0])
    changed = moved(value_model, before[1])
    assert any("lora_B" in name for name in changed)
    assert any("score.modules_to_save" in name for name in changed)
    assert all("lora_" in name or "score.modules_to_save" in name for name in changed)


def reversed_tokenizer() -> PreTrainedTokenizerFast:
    """The characters of the tiny tokenizer in another order, so every id means another one."""
    inner = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    ids = inner["model"]["vocab"]
    names = sorted(ids, key=lambda name: ids[name])
    inner["model"]["vocab"] = {n: i for i, n in enumerate([*names[:3], *reversed(names[3:])])}
    inner["added_tokens"] = []
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)),
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
    )


class CountsToken(nn.Module):
    """A reward model whose score is how often one of its own tokens is there."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        found = (input_ids == self.token) & attention_mask.bool()
        return SimpleNamespace(logits=found.sum(1, keepdim=True).float())


@pytest.mark.parametrize("kind", KINDS)
def test_issues_3595_1979_1674_a_reward_model_reads_with_its_own_tokenizer(
    tmp_path: Path, kind: str
) -> None:
    """TRL gave it the policy's token ids: an index error, or scores of another text."""
    own = reversed_tokenizer()
    letter, same_id = own.convert_tokens_to_ids("e"), tiny.tokenizer().convert_tokens_to_ids("e")
    assert letter != same_id

    def count(prompts: list[str], completions: list[str]) -> list[float]:
        return [float((p + c).count("e")) for p, c in zip(prompts, completions, strict=True)]

    trainer = train(
        kind,
        tmp_path,
        reward_model=[CountsToken(letter), count],
        reward_processing_classes=[own, None],
        stop_token=None,
    )
    row = runs.rows(trainer, "objective/scores")[0]
    of_model = next(v for n, v in row.items() if n.startswith("rewards/") and "mean" in n)
    assert row["rewards/count/mean"] > 0.0
    assert of_model == row["rewards/count/mean"]


# --- Adapters, quantization, memory


@pytest.mark.parametrize("kind", KINDS)
def test_issues_1916_2344_adapters_train_on_a_4_bit_base_under_checkpointing(
    tmp_path: Path, kind: str
) -> None:
    base = runs.base(tmp_path, "nf4")
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    trainer = make(kind, tmp_path, model=base, peft_config=runs.lora(), gradient_checkpointing=True)
    drawn = runs.trained(trainer)
    trainer.train()
    adapters = {name for name in drawn if "lora_B" in name}
    after = runs.trained(trainer)
    assert adapters
    assert not [name for name in adapters if after[name].equal(drawn[name])]
    found = dict(trainer.backbone.causal_model.named_parameters())
    for name, parameter in found.items():
        plain = name.replace(".base_layer", "")
        assert "lora_" in name or parameter.equal(before[plain]), f"{name} moved"


@pytest.mark.parametrize("kind", ["shared", "separate", "adapted"])
def test_issue_1423_a_quantized_base_is_never_copied(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = runs.base(tmp_path, "nf4")
    options: dict[str, Any] = {"model": base, "peft_config": runs.lora()}
    if kind == "adapted":
        options = {"model": get_peft_model(base, runs.lora())}

    def refuse(*_: Any) -> None:
        raise AssertionError("a quantized weight was copied")

    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "__deepcopy__", refuse)
    trainer = train("shared" if kind == "shared" else "separate", tmp_path, **options)
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("kind", KINDS)
def test_defect_09_no_more_logits_than_asked_for_are_alive(tmp_path: Path, kind: str) -> None:
    """Issues 1833, 1444, 402: TRL kept fp32 logits of all responses, stacked, twice.

    The responses of a rollout have 128 tokens; the LM head never sees more than 16 at once.
    """
    model = tiny.llama()
    trainer = make(kind, tmp_path, model=model, stop_token=None)
    trainer.backbone.logprob_chunk_bytes = 16 * 64 * 4  # 16 tokens, 64 logits, fp32
    sizes: list[int] = []
    kept: list[Any] = []
    model.lm_head.register_forward_hook(
        lambda module, args, output: sizes.append(output.shape[:-1].numel())
    )
    generate = model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        kept.append(generate(*args, **kwargs))
        return kept[-1]

    model.generate = watched
    trainer.train()
    assert sizes
    assert max(sizes) <= 16
    assert kept
    assert all(isinstance(tokens, torch.Tensor) for tokens in kept), "scores came with the tokens"


# --- Numbers


@pytest.mark.parametrize("kind", KINDS)
def test_issues_2023_5289_2022_2496_2281_the_two_entropies_by_hand(
    tmp_path: Path, kind: str
) -> None:
    """With equal logits a token has ln 64 nats: `policy/` is a token's, `objective/` an episode's.

    Responses end early, so padding that counted would show; in TRL it once made them negative.
    """
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokenizer = tiny.tokenizer()
    trainer = train(
        kind,
        tmp_path,
        model=model,
        learning_rate=0.0,
        stop_token=None,
        stop_token_id=tokenizer.convert_tokens_to_ids("e"),
        response_length=30,
    )
    row = runs.rows(trainer, "objective/entropy")[0]
    length = row["objective/response_length"]
    assert 0.1 < row["objective/stopped"] < 0.9, "all or none stopped: nothing to tell apart"
    assert row["objective/entropy"] == pytest.approx(length * math.log(64), rel=1e-5)
    assert row["policy/entropy_avg"] == pytest.approx(math.log(64), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_issues_1063_3293_the_value_model_trains_and_is_kept(tmp_path: Path, kind: str) -> None:
    """Beside the policy, in `value/`; a fresh trainer of other models reads both back."""
    trainer = train(kind, tmp_path, save_strategy="steps", save_steps=4)
    other = {} if kind == "shared" else {"value_model": tiny.reward_llama(seed=7)}
    again = make(kind, tmp_path / "again", **other, total_episodes=16, seed=5)
    trained = runs.trained(trainer)
    assert not runs.same(trained, runs.trained(again))
    assert list((tmp_path / "out/checkpoint-4/value").iterdir())
    load_models(again.backbone, tmp_path / "out/checkpoint-4")
    assert runs.same(trained, runs.trained(again))
