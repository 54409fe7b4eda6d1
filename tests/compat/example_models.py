"""What TRL's example scripts load, made on the spot: models, their tokenizer, and prompts."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

import tiny


def tokenizer_without_padding() -> PreTrainedTokenizerFast:
    """The tiny tokenizer as most base models have theirs: the scripts add `[PAD]` to it."""
    full = tiny.tokenizer()
    backend = json.loads(full.backend_tokenizer.to_str())
    vocabulary = {
        "[BOS]" if token == "[PAD]" else token: i for token, i in full.get_vocab().items()
    }
    backend["model"]["vocab"] = vocabulary
    backend["added_tokens"] = []
    rebuilt = type(full.backend_tokenizer).from_str(json.dumps(backend))
    return PreTrainedTokenizerFast(
        tokenizer_object=rebuilt, eos_token="[EOS]", unk_token="[UNK]", bos_token="[BOS]"
    )


def write(folder: Path, *, vocab_size: int = 64) -> list[str]:
    """The models and prompts under `folder`; the options of the scripts that point to them."""
    tokenizer = tokenizer_without_padding()
    for name, model in (
        ("sft", tiny.llama(vocab_size=vocab_size, pad_token_id=None, bos_token_id=0)),
        ("reward", tiny.reward_llama(vocab_size=vocab_size, bos_token_id=0)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": text, "summary": "ab"} for text in tiny.prompts(32)["prompt"]]
    (folder / "prompts").mkdir()
    for split, part in (("train", rows), ("test", rows[:6])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / "prompts" / f"{split}.jsonl").write_text(lines)
    options = {
        "dataset_name": folder / "prompts",
        "model_name_or_path": folder / "sft",
        "sft_model_path": folder / "sft",
        "reward_model_path": folder / "reward",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
