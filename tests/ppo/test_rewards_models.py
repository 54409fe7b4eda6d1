"""Reward models of every kind, and those with a tokenizer of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import tiny
from rollouts import CPU, PROMPTS, RESPONSES, classifier, one_by_one, rollout
from trl_sync import AutoModelForCausalLMWithValueHead
from trl_sync.errors import ConfigError
from trl_sync.ppo.batch import PromptBatch, Rollout
from trl_sync.ppo.rewards import ModelReward, reward_source
from trl_sync.ppo.rewards import tokens as tokens_module

# fp32, two layers over sums of 64 terms, scores up to 10, other padding.
CLOSE = {"rtol": 0.0, "atol": 2e-5}


def scored(model: nn.Module, batch: Rollout | None = None, **options: Any) -> Tensor:
    source = ModelReward(
        model, tiny.tokenizer(), **({"batch_size": 3, "device": CPU, "path": None} | options)
    )
    return source(batch or rollout())


def other_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """The characters of the tiny tokenizer in another order, so every id means another one."""
    inner = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    ids = inner["model"]["vocab"]
    names = sorted(ids, key=lambda name: ids[name])
    special, characters = names[:3], names[3:]
    inner["model"]["vocab"] = {n: i for i, n in enumerate([*special, *reversed(characters)])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)),
        **({"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"} | options),
    )


# --- Kinds of models


class ValueHead(nn.Module):
    """As TRL's value heads are laid out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(size, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, states: Tensor) -> Tensor:
        return self.summary(self.dropout(states))


class ModelWithValueHead(nn.Module):
    def __init__(self, pretrained_model: Any) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.v_head = ValueHead(64)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_with_a_value_head_is_scored_at_its_last_token(adapter: bool) -> None:
    language_model: Any = tiny.llama(seed=5)
    if adapter:
        options = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
        language_model = get_peft_model(
            language_model, LoraConfig(r=4, target_modules=["q_proj"], **options)
        )
    model = ModelWithValueHead(language_model)
    found = scored(model.train())
    expected = []
    with torch.no_grad():
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            ids = torch.tensor([prompt + response])
            hidden = model.pretrained_model(ids, output_hidden_states=True).hidden_states[-1]
            expected.append(model.v_head.summary(hidden[0, -1])[0])
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)


def test_trl_syncs_own_value_head_models_will_do() -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny.llama(seed=5)).eval()
    with torch.no_grad():
        model.v_head.summary.weight *= 10
        expected = [
            model(input_ids=torch.tensor([prompt + response]))[2][0, -1]
            for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
        ]
    torch.testing.assert_close(scored(model), torch.stack(expected), **CLOSE)


def bert(**changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"vocab_size": 64, "intermediate_size": 64, "max_position_embeddings": 32}
    model = BertForSequenceClassification(
        BertConfig(**(sizes | options | {"num_labels": 1, "pad_token_id": 0} | changes))
    )
    with torch.no_grad():
        model.classifier.weight *= 200
    return model.eval()


def test_an_encoder_classifier_is_scored_by_its_logits() -> None:
    # Its positions are absolute, so padding on the left would change its answers.
    model = bert()
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([prompt + response])).logits[0, 0]
            for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
        ]
    found = scored(model, rollout(padding=33))
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)
    assert float(found.std()) > 1.0


class MeanId(nn.Module):
    """A module of no known kind; `score` is a method of its own."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        total = (input_ids * attention_mask).sum(1, keepdim=True)
        return SimpleNamespace(logits=total / attention_mask.sum(1, keepdim=True))

    def score(self) -> None:
        raise AssertionError("not for rewards")


def test_any_module_with_one_logit_will_do() -> None:
    means = [
        sum(prompt + response) / len(prompt + response)
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    torch.testing.assert_close(scored(MeanId()), torch.tensor(means))


class Masks(nn.Module):
    """Gives the first token's id, and keeps the masks it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.seen.append(attention_mask)
        return SimpleNamespace(logits=input_ids[:, :1].float())


def test_rows_of_similar_length_are_scored_together_without_needless_padding() -> None:
    model = Masks()
    found = scored(model, batch_size=2)
    assert found.tolist() == [prompt[0] for prompt in PROMPTS]
    masks = model.seen[-((len(PROMPTS) + 1) // 2) :]
    assert all(int(mask.sum(1).max()) == mask.shape[1] for mask in masks)
    assert all(bool(mask[:, 0].all()) for mask in masks)
    lengths = [length for mask in masks for length in mask.sum(1).tolist()]
    assert lengths == sorted(len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True))


class Labels(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(len(input_ids), self._number))


class Wrapper(nn.Module):
    """Has no `base_model_prefix`, as engines that wrap models have none."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 1)


def prompt_tuned() -> nn.Module:
    config = PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=2, num_layers=2, token_dim=64
    )
    return get_peft_model(classifier(), config)


def seq2seq() -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16}
    config = T5Config(num_layers=1, num_heads=2, **sizes)
    return ModelWithValueHead(T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Labels(3), ["Labels", r"shape (2, 3), not (2, 1)"]),
        (Wrapper, ["Wrapper", "no base_model_prefix that names its trunk", "forward fails"]),
        (lambda: nn.Identity(), ["Identity", "fails with TypeError"]),
        (tiny.llama, ["LlamaForCausalLM", "logits of two sequences have shape (2, 3, 64)"]),
        (lambda: bert(num_labels=2), ["BertForSequenceClassification", "shape (2, 2)"]),
        (lambda: bert(vocab_size=20), ["reward model has only 20 embeddings"]),
        (prompt_tuned, ["PROMPT_TUNING adapter", "LoRA"]),
        (seq2seq, ["encoder-decoder"]),
    ],
)
def test_models_that_cannot_score_are_refused_up_front(
    build: Callable[[], nn.Module], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        ModelReward(build(), tiny.tokenizer(), batch_size=4, device=CPU)
    for words in said:
        assert words in str(raised.value)


def test_compiled_models_are_unwrapped() -> None:
    model = classifier()
    source = ModelReward(torch.compile(model), tiny.tokenizer(), batch_size=4, device=CPU)
    assert source.model is model


# --- Tokenizers of their own


def text_rollout() -> Rollout:
    """ "ab" -> "c[EOS]", "b" -> "a a", "c" -> "": tokens are the characters, 3 is "a"."""
    batch = rollout([[3, 4], [4], [5]], [[5, 1], [3, 3], []], texts=["ab", "b", "c"], padding=9)
    prompts = batch.prompts
    return Rollout(
        prompts=PromptBatch(prompts=prompts.prompts, token_ids=prompts.token_ids, columns={}),
        prompt_ids=batch.prompt_ids,
        prompt_mask=batch.prompt_mask,
        response_ids=batch.response_ids,
        response_mask=batch.response_mask,
        stopped=torch.tensor([True, False, False]),
    )


def alone(model: nn.Module, sequences: list[list[int]]) -> Tensor:
    return one_by_one(model.eval(), [[] for _ in sequences], sequences)


def test_a_model_of_another_vocabulary_reads_the_text(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    own = other_tokenizer()
    own.save_pretrained(tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path)
    # The decoded response separates its tokens by spaces: tiny.tokenizer() has no decoder.
    texts = ["abc", "ba a", "c"]
    sequences = [[own.convert_tokens_to_ids(character) for character in text] for text in texts]
    sequences[0].append(1)  # the response ended there, with the policy's end token
    found = scored(model, text_rollout())
    torch.testing.assert_close(found, alone(model, sequences), **CLOSE)
    # The policy's ids would have said something else.
    ids = [[3, 4, 5, 1], [4, 3, 3], [5]]
    assert float((found - alone(model, ids)).abs().min()) > 0.1


def test_the_tokenizer_beside_a_path_counts(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    other_tokenizer().save_pretrained(tmp_path)
    source = reward_source(
        str(tmp_path), tiny.tokenizer(), conversational=False, batch_size=4, device=CPU
    )
    own = other_tokenizer()
    expected = alone(model, [own("abc")["input_ids"] + [1], own("ba a")["input_ids"]])
    torch.testing.assert_close(source(text_rollout())[:2], expected, **CLOSE)


def test_a_model_of_the_same_vocabulary_reads_the_tokens(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path)
    expected = alone(model, [[3, 4, 5, 1], [4, 3, 3], [5]])
    torch.testing.assert_close(scored(loaded, text_rollout()), expected, **CLOSE)


def test_reward_processing_classes_tokenize_anew_even_if_the_vocabularies_agree() -> None:
    model = classifier()
    source = reward_source(
        [model, lambda **_: [0.0] * 3],
        tiny.tokenizer(),
        conversational=False,
        batch_size=4,
        device=CPU,
        processing_classes=[tiny.tokenizer(), None],
    )
    space = tiny.tokenizer().convert_tokens_to_ids(" ")
    expected = alone(model, [[3, 4, 5, 1], [4, 3, space, 3], [5]])
    torch.testing.assert_close(source(text_rollout()), expected, **CLOSE)


def test_messages_pass_the_chat_template_of_the_reward_model() -> None:
    template = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
    own = other_tokenizer(chat_template=template + "{{ mark }}")
    model = classifier()
    batch = text_rollout()
    said = [[{"role": "user", "content": text}] for text in ("ab", "b", "c")]
    said[1].append({"role": "assistant", "content": "x"})  # continued by the response
    prompts = PromptBatch(prompts=said, token_ids=batch.prompts.token_ids, columns={})
    found = scored(
        model,
        Rollout(**{f: getattr(batch, f) for f in Rollout.__slots__} | {"prompts": prompts}),
        own_tokenizer=own,
        conversational=True,
        chat_template_kwargs={"mark": "z"},
    )
    texts = ["uabacz", "ubaxa az", "ucaz"]
    expected = alone(model, [own(text)["input_ids"] for text in texts])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_messages_without_a_chat_template_are_refused() -> None:
    own = other_tokenizer(chat_template=None)
    with pytest.raises(ConfigError, match="that has no chat template"):
        scored(classifier(), own_tokenizer=own, conversational=True)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abc "]
    inner = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def test_an_encoder_gets_its_special_tokens(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    source = reward_source(
        str(tmp_path), tiny.tokenizer(), conversational=False, batch_size=2, device=CPU
    )
    # a = 4, b = 5, c = 6, space = 7, between [CLS] = 1 and [SEP] = 2
    sequences = [[1, 4, 5, 6, 2], [1, 5, 4, 7, 4, 2], [1, 6, 2]]
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences]
    torch.testing.assert_close(source(text_rollout()), torch.stack(expected), **CLOSE)


# --- Longer than the model's context


def short_gpt2() -> nn.Module:
    torch.manual_seed(4)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 4, "vocab_size": 64}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=1)).eval()
    with torch.no_grad():
        model.score.weight *= 50
    return model


@pytest.fixture
def warnings_said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(tokens_module.logger, "warning", said.append)
    return said


def test_tokens_beyond_the_context_lose_their_front_and_this_is_said_once(
    warnings_said: list[str],
) -> None:
    model = short_gpt2()
    source = ModelReward(model, tiny.tokenizer(), batch_size=3, device=CPU)
    found = source(rollout(padding=40))
    assert torch.equal(source(rollout(padding=40)), found)
    whole = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    torch.testing.assert_close(found, alone(model, [ids[-4:] for ids in whole]), **CLOSE)
    assert max(map(len, whole)) > 4
    assert len(warnings_said) == 1
    assert "context of 4 tokens: it reads their last 4 tokens" in warnings_said[0]


def test_text_beyond_the_context_loses_its_front(warnings_said: list[str]) -> None:
    model = bert(max_position_embeddings=5)
    source = ModelReward(
        model, tiny.tokenizer(), batch_size=3, device=CPU, own_tokenizer=bert_tokenizer()
    )
    found = source(text_rollout())
    # Of [CLS] b a _ a [SEP] five tokens remain, the special ones among them.
    sequences = [[1, 4, 5, 6, 2], [1, 4, 7, 4, 2], [1, 6, 2]]
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences]
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)
    assert len(warnings_said) == 1


def test_positions_that_begin_behind_the_padding_token_are_fewer(warnings_said: list[str]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(
        **sizes, vocab_size=64, max_position_embeddings=5, pad_token_id=0, num_labels=1
    )
    source = ModelReward(
        RobertaForSequenceClassification(config).eval(),
        tiny.tokenizer(),
        batch_size=3,
        device=CPU,
        own_tokenizer=bert_tokenizer(),
    )
    source(text_rollout())
    assert "context of 4 tokens" in warnings_said[0]


# --- Lists


def built(reward: Any, **options: Any) -> Any:
    return reward_source(
        reward, tiny.tokenizer(), conversational=False, batch_size=4, device=CPU, **options
    )


def test_models_paths_and_functions_are_added_up(tmp_path: Path) -> None:
    saved, given = classifier(seed=7), classifier(seed=8)
    saved.save_pretrained(tmp_path / "judge")
    source = built(
        [str(tmp_path / "judge"), given, lambda **_: [1.0, 2.0, 3.0, 4.0]], weights=[0.5, 2, 10]
    )
    expected = 0.5 * one_by_one(saved.eval(), PROMPTS, RESPONSES)
    expected += 2 * one_by_one(given.eval(), PROMPTS, RESPONSES)
    expected += torch.tensor([10.0, 20.0, 30.0, 40.0])
    # Three times the tolerance of one model.
    torch.testing.assert_close(source(rollout()), expected, rtol=0.0, atol=6e-5)
    assert list(source.names) == ["judge", "reward_model", "<lambda>"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, "reward_weights has 1 entries, but there are 2 reward sources"),
        ({"processing_classes": tiny.tokenizer()}, "has 1 entries, but there are 2 reward"),
        ({"processing_classes": [None, tiny.tokenizer()]}, "functions are given text"),
        ({"processing_classes": ["gpt2", None]}, "must hold tokenizers, got str"),
    ],
)
def test_lists_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        built([classifier(), lambda **_: []], **options)
