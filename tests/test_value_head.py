"""Models with a value head: TRL's test cases for them, on tiny models made on the spot."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import oracle
import tiny
from trl_sync import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    CheckpointError,
    ConfigError,
)
from trl_sync.backbone.checkpointing import is_checkpointing
from trl_sync.value_head import ValueHead

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
LLAMA_LIKE = {**COMMON, **TOKENS, "intermediate_size": 64, "max_position_embeddings": 64}
GROUPED = {**LLAMA_LIKE, "num_key_value_heads": 2}

CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny.llama(hidden_size=32),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GROUPED, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**GROUPED)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GROUPED)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**LLAMA_LIKE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **TOKENS)
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    ),
    # Its last hidden state is narrower than the others.
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**COMMON, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=16)
    ),
}
SEQ2SEQ: dict[str, Callable[[], Any]] = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
        )
    ),
}
EVERY = [*CAUSAL, *SEQ2SEQ]
INPUT_IDS = torch.arange(3, 13).reshape(2, 5)


def plain(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return (CAUSAL | SEQ2SEQ)[name]()


def kind(name: str) -> Any:
    return (
        AutoModelForSeq2SeqLMWithValueHead if name in SEQ2SEQ else AutoModelForCausalLMWithValueHead
    )


def with_head(name: str = "llama", **options: Any) -> Any:
    return kind(name).from_pretrained(plain(name), **options).eval()


@torch.no_grad()
def run(model: Any, **options: Any) -> tuple[Any, ...]:
    if getattr(model, "is_encoder_decoder", False):
        options["decoder_input_ids"] = INPUT_IDS
    return model.eval()(INPUT_IDS, **options)


def lora(**changes: Any) -> LoraConfig:
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(
        **(options | {"task_type": "CAUSAL_LM", "init_lora_weights": False} | changes)
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved llama without a value head."""
    folder = str(tmp_path_factory.mktemp("base"))
    plain("llama").save_pretrained(folder)
    return folder


# --- the head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_the_value_is_the_head_on_the_last_hidden_state(name: str) -> None:
    model = with_head(name)
    logits, loss, value = run(model)
    assert logits.shape == (2, 5, 64)
    assert loss is None
    options = {"decoder_input_ids": INPUT_IDS} if name in SEQ2SEQ else {}
    with torch.no_grad():
        output = model.pretrained_model(INPUT_IDS, output_hidden_states=True, **options)
    hidden = (output.decoder_hidden_states if name in SEQ2SEQ else output.hidden_states)[-1]
    weight, bias = model.v_head.summary.weight, model.v_head.summary.bias
    assert weight.shape == (1, 16 if name == "opt" else 32)
    # fp32: a sum of 32 products in another order
    torch.testing.assert_close(value, (hidden * weight).sum(-1) + bias, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits, output.logits, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_labels_give_a_loss_and_the_cache_is_returned_on_request(name: str) -> None:
    model = with_head(name)
    logits, loss, _, cache = run(model, labels=INPUT_IDS, return_past_key_values=True)
    shift = 0 if name == "t5" else 1
    targets = INPUT_IDS[:, shift:].flatten()
    expected = nn.functional.cross_entropy(logits[:, : 5 - shift].flatten(0, 1), targets)
    # fp32, a mean of 10 terms
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    assert cache is not None


def test_the_cache_of_an_earlier_call_is_used() -> None:
    model = with_head()
    whole = run(model)
    with torch.no_grad():
        first = model(INPUT_IDS[:, :3], return_past_key_values=True)
        second = model(INPUT_IDS[:, 3:], past_key_values=first[3])
    # fp32, attention over the same five keys
    torch.testing.assert_close(second[2], whole[2][:, 3:], atol=1e-5, rtol=1e-5)


def test_the_head_is_drawn_at_random() -> None:
    first, second = with_head("llama"), with_head("gpt2")
    assert first.v_head.summary.bias.abs().item() > 0
    assert not torch.equal(first.v_head.summary.weight, second.v_head.summary.weight)


def test_the_normal_strategy_draws_with_that_deviation_and_bias_zero() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(hidden_size=32)
    model = with_head(v_head_init_strategy="normal", v_head_initializer_range=50.0)
    assert model.v_head.summary.bias.item() == 0
    # 32 draws: the deviation of their deviation is about 1 / 8
    assert 25 < model.v_head.summary.weight.std().item() < 75
    assert ValueHead(config).summary.weight.abs().max() < 1


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match="v_head_init_strategy must be 'normal'"):
        with_head(v_head_init_strategy="uniform")


def test_dropout_comes_from_the_arguments_or_the_config() -> None:
    assert with_head().v_head.dropout.p == 0.1
    assert with_head(summary_dropout_prob=0.5).v_head.dropout.p == 0.5
    assert isinstance(with_head(summary_dropout_prob=0.0).v_head.dropout, nn.Identity)
    model = plain("llama")
    model.config.summary_dropout_prob = 0.25
    assert kind("llama").from_pretrained(model).v_head.dropout.p == 0.25


@pytest.mark.oracle
def test_the_head_draws_what_trl_draws() -> None:
    (trl_head,) = oracle.functions("experimental/ppo/modeling_value_head.py", "ValueHead", nn=nn)
    for name in EVERY:
        config = plain(name).config
        torch.manual_seed(5)
        theirs = trl_head(config)
        torch.manual_seed(5)
        ours = ValueHead(config)
        assert torch.equal(ours.summary.weight, theirs.summary.weight), name
        assert torch.equal(ours.summary.bias, theirs.summary.bias), name
        assert ours.dropout.p == theirs.dropout.p


def test_a_config_without_a_size_is_refused() -> None:
    nested = SimpleNamespace(text_config=SimpleNamespace(hidden_size=8))
    assert ValueHead(nested).summary.in_features == 8
    composed = SimpleNamespace(decoder=SimpleNamespace(hidden_size=6))
    assert ValueHead(composed).summary.in_features == 6
    with pytest.raises(ConfigError, match="does not tell the size of the hidden states"):
        ValueHead(SimpleNamespace())


# --- saving and loading -------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("name", EVERY)
def test_round_trip(name: str, shard_size: str, tmp_path: Path) -> None:
    model = with_head(name)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert sharded == (shard_size == "20KB")
    again = kind(name).from_pretrained(str(tmp_path))
    for before, after in zip(run(model)[::2], run(again)[::2], strict=True):
        assert torch.equal(before, after)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


@pytest.mark.parametrize("name", EVERY)
def test_plain_transformers_loads_the_same_weights(name: str, tmp_path: Path) -> None:
    """TRL issue 3071: names must have no prefix."""
    model = with_head(name)
    model.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if name in SEQ2SEQ else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == {"v_head.summary.weight", "v_head.summary.bias"}
    for key, tensor in model.pretrained_model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key


def test_a_state_with_wrapper_names_is_saved_without_them(tmp_path: Path) -> None:
    """What `accelerator.get_state_dict` returns has them."""
    model = with_head()
    nested = dict(nn.Module.state_dict(model))  # what no override has changed
    nested = {key: tensor for key, tensor in nested.items() if "lm_head" not in key}
    nested |= {f"pretrained_model.{k}": t for k, t in model.pretrained_model.state_dict().items()}
    nested |= {f"v_head.{k}": t for k, t in model.v_head.state_dict().items()}
    nested = {k: t for k, t in nested.items() if k.startswith(("pretrained_model.", "v_head."))}
    model.save_pretrained(tmp_path, state_dict=nested)
    again = kind("llama").from_pretrained(str(tmp_path))
    assert torch.equal(run(again)[0], run(model)[0])
    assert torch.equal(run(again)[2], run(model)[2])


def test_save_directory_is_a_keyword_too(tmp_path: Path) -> None:
    """TRL raised IndexError for PEFT models."""
    with_head(peft_config=lora()).save_pretrained(save_directory=tmp_path / "adapter")
    with_head().save_pretrained(save_directory=str(tmp_path / "full"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "full" / "model.safetensors").exists()


def test_a_model_without_a_saved_head_gets_a_new_one(
    base: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    first = kind("llama").from_pretrained(base)
    assert "No value head was saved" in caplog.text
    assert first.v_head.summary.bias.abs().item() > 0


def test_a_head_that_could_not_be_looked_up_is_told(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter in the hub's cache, and no hub to ask for its value head."""
    commit = "0123456789" * 4
    repository = tmp_path / "models--me--ppo"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    kind("llama").from_pretrained(base, peft_config=lora()).save_pretrained(snapshot)
    (snapshot / "v_head.safetensors").unlink()
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    caplog.clear()
    kind("llama").from_pretrained("me/ppo", **options)
    assert "A value head of me/ppo could not be looked up" in caplog.text
    # The cache knows of a file that the hub has not.
    (repository / ".no_exist" / commit).mkdir(parents=True)
    (repository / ".no_exist" / commit / "v_head.safetensors").touch()
    caplog.clear()
    kind("llama").from_pretrained("me/ppo", **options)
    assert "No value head was saved with me/ppo" in caplog.text


def test_an_older_pytorch_model_bin_is_read(tmp_path: Path) -> None:
    model = with_head()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    again = kind("llama").from_pretrained(str(tmp_path))
    assert torch.equal(run(again)[2], run(model)[2])


def test_a_sharded_pytorch_model_bin_is_read(tmp_path: Path) -> None:
    model = with_head()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = model.state_dict()
    files = {key: f"part-{int(key.startswith('v_head'))}.bin" for key in state}
    for file in set(files.values()):
        torch.save({k: t for k, t in state.items() if files[k] == file}, tmp_path / file)
    index = {"metadata": {}, "weight_map": files}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    again = kind("llama").from_pretrained(str(tmp_path))
    assert torch.equal(run(again)[2], run(model)[2])


def test_a_pickle_that_is_no_tensors_is_not_executed(base: str, tmp_path: Path) -> None:
    model = with_head(peft_config=lora())
    model.pretrained_model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path)
    (tmp_path / "v_head.safetensors").unlink()
    torch.save({"v_head.summary.weight": Path("object")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        kind("llama").from_pretrained(str(tmp_path))


def test_half_precision_keeps_the_head_in_fp32_and_exact(tmp_path: Path) -> None:
    with_head().save_pretrained(tmp_path)
    model = kind("llama").from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert model.pretrained_model.lm_head.weight.dtype == torch.bfloat16
    assert model.v_head.summary.weight.dtype == torch.float32
    logits, _, value = run(model)
    assert logits.dtype == value.dtype == torch.float32
    model.save_pretrained(tmp_path / "half")
    again = kind("llama").from_pretrained(str(tmp_path / "half"))
    assert again.pretrained_model.dtype == torch.bfloat16
    assert torch.equal(again.v_head.summary.weight, model.v_head.summary.weight)


@pytest.mark.newest
@pytest.mark.parametrize("peft", [False, True])
def test_push_to_hub_uploads_the_head(peft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL issues 1650, 2095 and 1379."""
    uploaded: dict[str, bytes] = {}

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id: str, operations: Any, **_: Any) -> str:
            for operation in operations:
                source = operation.path_or_fileobj
                uploaded[operation.path_in_repo] = Path(source).read_bytes()
            return "commit"

    hub = Hub()
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card",
        lambda *_, **__: SimpleNamespace(save=lambda path: Path(path).write_text("card")),
    )
    model = with_head(peft_config=lora()) if peft else with_head()
    model.push_to_hub("someone/something")
    holder = "v_head.safetensors" if peft else "model.safetensors"
    assert b"v_head.summary.weight" in uploaded[holder]
    assert ("adapter_model.safetensors" in uploaded) == peft
    assert "v_head" not in dict(model.pretrained_model.named_modules())


def test_the_state_dict_has_the_layout_that_is_saved_and_loads() -> None:
    model, other = with_head(), kind("llama").from_pretrained(plain("llama", seed=1))
    state = model.state_dict()
    expected = {
        *model.pretrained_model.state_dict(),
        "v_head.summary.weight",
        "v_head.summary.bias",
    }
    assert set(state) == expected
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(run(other)[2], run(model)[2])
    # inside another module, as under DDP
    outer = nn.ModuleDict({"module": model})
    assert set(outer.state_dict()) == {f"module.{key}" for key in expected}
    nn.ModuleDict({"module": other}).load_state_dict(outer.state_dict())
    result = model.load_state_dict({"nonsense": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["pretrained_model.nonsense"]
    assert "v_head.summary.bias" in result.missing_keys


# --- PEFT ---------------------------------------------------------------------------------------


def trained_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("from_config", [False, True])
def test_of_a_peft_model_the_adapter_and_the_head_are_trained(from_config: bool) -> None:
    inner = plain("llama")
    if from_config:
        model = kind("llama").from_pretrained(inner, peft_config=lora())
    else:
        model = kind("llama").from_pretrained(get_peft_model(inner, lora()))
    assert model.is_peft_model
    names = trained_names(model)
    # 2 layers x 2 projections x 2 matrices, and weight and bias of the head
    assert len(names) == 8 + 2
    assert all("lora_" in name or name.startswith("v_head.") for name in names)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_quantized_base(bits: int, base: str, tmp_path: Path) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )
    model = kind("llama").from_pretrained(
        base, peft_config=lora(), quantization_config=quantization, use_gradient_checkpointing=False
    )
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (bits == 4, bits == 8)
    assert len(trained_names(model)) == 10
    run(model)  # bitsandbytes may repack 4-bit weights in a pass without gradients
    model.train()
    logits, _, value = model(INPUT_IDS)
    (logits.square().mean() + value.square().mean()).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad
    )
    model.save_pretrained(tmp_path)
    again = kind("llama").from_pretrained(str(tmp_path), quantization_config=quantization)
    for before, after in zip(run(model)[::2], run(again)[::2], strict=True):
        assert torch.equal(before, after)


def test_the_older_names_of_quantization_are_taken(base: str) -> None:
    model = kind("llama").from_pretrained(base, load_in_8bit=True, peft_config=lora())
    assert model.is_loaded_in_8bit
    # as PEFT prepares a quantized model
    assert is_checkpointing(model.pretrained_model.base_model.model)
    assert not kind("llama").from_pretrained(base, load_in_8bit=False).is_loaded_in_8bit


def test_a_quantized_model_without_an_adapter_keeps_its_head(base: str, tmp_path: Path) -> None:
    model = kind("llama").from_pretrained(base, load_in_8bit=True)
    model.save_pretrained(tmp_path)
    again = kind("llama").from_pretrained(str(tmp_path))
    assert torch.equal(again.v_head.summary.weight, model.v_head.summary.weight)


def test_an_adapter_is_saved_and_trained_further(base: str, tmp_path: Path) -> None:
    model = kind("llama").from_pretrained(base, peft_config=lora())
    model.save_pretrained(tmp_path)
    head = head_of(model)
    assert not list(tmp_path.glob("*.bin"))
    state = load_file(tmp_path / "v_head.safetensors")
    assert state.keys() == head.keys()
    assert all(torch.equal(state[key], head[key]) for key in head)
    assert not any("v_head" in k for k in load_file(tmp_path / "adapter_model.safetensors"))

    frozen = kind("llama").from_pretrained(str(tmp_path))
    assert trained_names(frozen) == ["v_head.summary.weight", "v_head.summary.bias"]
    further = kind("llama").from_pretrained(str(tmp_path), is_trainable=True)
    assert len(trained_names(further)) == 10
    for before, after in zip(run(model)[::2], run(further)[::2], strict=True):
        assert torch.equal(before, after)
    # plain PEFT loads the same folder
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(INPUT_IDS).logits, run(model)[0])


def head_of(model: Any) -> dict[str, torch.Tensor]:
    return {f"v_head.{key}": tensor for key, tensor in model.v_head.state_dict().items()}


def test_trls_file_is_written_when_asked_for_and_does_not_outlive_the_next_save(
    base: str, tmp_path: Path
) -> None:
    model = kind("llama").from_pretrained(base, peft_config=lora())
    model.save_pretrained(tmp_path, safe_serialization=False)
    state, head = torch.load(tmp_path / "pytorch_model.bin", weights_only=True), head_of(model)
    assert state.keys() == head.keys()
    assert all(torch.equal(state[key], head[key]) for key in head)
    with torch.no_grad():
        model.v_head.summary.weight += 1
    model.save_pretrained(tmp_path)
    again = kind("llama").from_pretrained(str(tmp_path))
    assert torch.equal(again.v_head.summary.weight, model.v_head.summary.weight)
    assert not (tmp_path / "pytorch_model.bin").exists()


def test_a_folder_that_trl_saved_is_read(base: str, tmp_path: Path) -> None:
    model = kind("llama").from_pretrained(base, peft_config=lora())
    model.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "v_head.safetensors").unlink()
    again = kind("llama").from_pretrained(str(tmp_path))
    assert torch.equal(run(again)[2], run(model)[2])


def test_two_heads_that_differ_are_refused(base: str, tmp_path: Path) -> None:
    model = kind("llama").from_pretrained(base, peft_config=lora())
    model.save_pretrained(tmp_path)
    stale = {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)}
    torch.save(stale, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="two value heads that differ"):
        kind("llama").from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "head, found",
    [
        (
            {"v_head.summary.weight": torch.zeros(1, 48), "v_head.summary.bias": torch.zeros(1)},
            r"it has summary.bias \(1,\), summary.weight \(1, 48\), and the model needs",
        ),
        ({"v_head.summary.weight": torch.zeros(1, 32)}, r"it has summary.weight \(1, 32\), and"),
        ({"v_head.other": torch.zeros(2)}, r"it has other \(2,\), and the model needs"),
    ],
)
def test_a_head_of_another_model_is_refused(
    base: str, tmp_path: Path, head: dict[str, torch.Tensor], found: str
) -> None:
    kind("llama").from_pretrained(base, peft_config=lora()).save_pretrained(tmp_path)
    (tmp_path / "v_head.safetensors").unlink()
    torch.save(head, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"does not fit this model: {found}"):
        kind("llama").from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "holds no options of an adapter"),
        ('{"peft_type": "LORA", "r": "many"}', "has r=many, expected a whole number of at least 1"),
        (None, "cannot be put on this base|holds no options"),
    ],
)
def test_a_broken_adapter_is_refused(
    base: str, tmp_path: Path, content: str | None, message: str
) -> None:
    kind("llama").from_pretrained(base, peft_config=lora()).save_pretrained(tmp_path)
    options = tmp_path / "adapter_config.json"
    if content is None:  # the adapter of a model with other layers
        content = options.read_text().replace("q_proj", "no_such_layer")
        content = content.replace("v_proj", "nor_this")
    options.write_text(content)
    with pytest.raises(ConfigError, match=message):
        kind("llama").from_pretrained(str(tmp_path))


def test_the_state_of_a_peft_model_is_its_head() -> None:
    model = with_head(peft_config=lora())
    state = model.state_dict()
    assert set(state) == {"v_head.summary.weight", "v_head.summary.bias"}
    result = with_head(peft_config=lora()).load_state_dict(state)
    assert not result.missing_keys


# --- generation, checkpointing, copies ----------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_generate_is_that_of_the_model(name: str) -> None:
    model = with_head(name)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.pretrained_model.generate(INPUT_IDS, **options)
    assert torch.equal(model.generate(INPUT_IDS, **options), expected)


def test_gradient_checkpointing_is_switched() -> None:
    model = with_head()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert is_checkpointing(model.pretrained_model)
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not is_checkpointing(model.pretrained_model)
    assert not model.is_gradient_checkpointing
    model.enable_input_require_grads()
    assert model.pretrained_model.get_input_embeddings()(INPUT_IDS).requires_grad


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bart"])
def test_the_reference_model_of_trl_is_independent_or_shares_layers(name: str) -> None:
    patterns = [
        node.value
        for node in oracle.source("experimental/utils.py").body
        if getattr(getattr(node, "targets", [None])[0], "id", None) == "LAYER_PATTERNS"
    ]
    (create,) = oracle.functions(
        "experimental/utils.py",
        "create_reference_model",
        nn=nn,
        deepcopy=copy.deepcopy,
        is_deepspeed_zero3_enabled=lambda: False,
        LAYER_PATTERNS=[constant.value for constant in patterns[0].elts],
    )
    model = with_head(name)
    before = run(model)[0]
    reference = create(model)
    assert torch.equal(run(reference)[0], before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(run(reference)[0], before)

    shared = create(model, num_shared_layers=1)
    mine, theirs = dict(model.named_parameters()), dict(shared.named_parameters())
    pairs = [(key, mine[key].data_ptr() == theirs[key].data_ptr()) for key in mine]
    assert any(same for _, same in pairs)
    assert not dict(pairs)["v_head.summary.weight"]
    assert all(not mine[key].requires_grad for key, same in pairs if same)


# --- the reward adapter -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tensor]:
    """A LoRA reward model on the same base, and its scores of INPUT_IDS."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(classifier, lora(task_type="SEQ_CLS")).eval()
    folder = str(tmp_path_factory.mktemp("reward"))
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(INPUT_IDS).logits


def test_reward_scores_are_those_of_the_reward_model(
    base: str, reward_adapter: tuple[str, Tensor]
) -> None:
    folder, expected = reward_adapter
    model = kind("llama").from_pretrained(base, peft_config=lora(), reward_adapter=folder)
    trained = trained_names(model)
    assert len(trained) == 10
    model.train()
    model.v_head.eval()
    inner = model.pretrained_model
    scores = model.compute_reward_score(INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS))
    # fp32: the same adapter on the same base, in another model class
    torch.testing.assert_close(scores[:, -1], expected, atol=1e-6, rtol=1e-5)
    assert trained_names(model) == trained
    model.requires_grad_(False)
    model.compute_reward_score(INPUT_IDS)
    assert not trained_names(model)
    assert inner.active_adapter == "default"
    assert inner.training
    assert not model.v_head.training


def test_without_a_reward_adapter_there_is_no_score() -> None:
    with pytest.raises(ConfigError, match="no reward adapter"):
        with_head().compute_reward_score(INPUT_IDS)


# --- wrong arguments ----------------------------------------------------------------------------


def test_arguments_that_cannot_work_are_refused(base: str, tmp_path: Path) -> None:
    load = kind("llama").from_pretrained
    model = plain("llama")
    peft_model = get_peft_model(plain("llama"), lora())
    adapter = tmp_path / "adapter"
    kind("llama").from_pretrained(base, peft_config=lora()).save_pretrained(adapter)
    nameless = tmp_path / "nameless"
    with_head(peft_config=lora()).save_pretrained(nameless)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("must be a path", lambda: load(42)),
        ("peft_config must be a peft.PeftConfig", lambda: load(base, peft_config={"r": 4})),
        ("Prompt learning is not supported", lambda: load(model, peft_config=prompt)),
        ("reward_adapter must be the path", lambda: load(base, reward_adapter=model)),
        ("reward_adapter needs a PEFT model", lambda: load(base, reward_adapter="somewhere")),
        ("holds none of", lambda: load(base, peft_config=lora(), reward_adapter=str(tmp_path))),
        ("has no score head", lambda: load(base, peft_config=lora(), reward_adapter=str(adapter))),
        ("is a PEFT model already", lambda: load(peft_model, peft_config=lora())),
        ("dtype has no effect", lambda: load(model, dtype=torch.bfloat16)),
        ("holds a trained adapter", lambda: load(str(adapter), peft_config=lora())),
        ("does not say which model", lambda: load(str(nameless))),
        ("has no effect without peft_config", lambda: load(base, use_gradient_checkpointing=True)),
        (
            "on quantized models only",
            lambda: load(base, peft_config=lora(), use_gradient_checkpointing=True),
        ),
        ("is no argument of a value head", lambda: kind("llama")(model, dropout=0.1)),
    ]
    for message, make in cases:
        with pytest.raises(ConfigError, match=message):
            make()


def test_a_sequence_to_sequence_model_needs_an_lm_head() -> None:
    config = plain("bart").config
    with pytest.raises(ConfigError, match="has no LM head"):
        AutoModelForSeq2SeqLMWithValueHead.from_pretrained(BartModel(config))


def test_a_model_of_the_other_kind_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="LlamaForCausalLM has no encoder: use AutoModelForCausal"
    ):
        AutoModelForSeq2SeqLMWithValueHead.from_pretrained(plain("llama"))
    with pytest.raises(ConfigError, match="encoder-decoder model: use AutoModelForSeq2Seq"):
        AutoModelForCausalLMWithValueHead.from_pretrained(plain("bart"))


def test_a_model_that_is_offloaded_is_refused() -> None:
    model = plain("llama")
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ConfigError, match="offloaded"):
        kind("llama").from_pretrained(model)
