"""Builds the embedded default into a folder: `python -m embedded_default --into FOLDER`.

`embedded_default.build` runs this as a process of its own; its memory ends with it.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .build import PROFILES, PROGRESS, Profile


def main() -> None:
    """Write tokenizer, models and prompts into the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--profile", choices=sorted(PROFILES), required=True)
    arguments = parser.parse_args()
    build_into(arguments.into, PROFILES[arguments.profile], arguments.seed)


def build_into(folder: Path, profile: Profile, seed: int) -> None:
    """Run the four phases, each announced with the seconds it took."""
    model_path, reward_model_path = folder / "model", folder / "reward_model"
    with _phase("1/4: corpus and tokenizer"):
        from .corpus import draw_corpus
        from .tokenizer import train_tokenizer

        corpus = draw_corpus(profile.num_reviews, profile.num_pairs, seed)
        tokenizer = train_tokenizer(row["prompt"] + row["completion"] for row in corpus.reviews)
        _write_rows(folder / "train_prompts.json", corpus.train_prompts)
        _write_rows(folder / "eval_prompts.json", corpus.eval_prompts)
    with _phase("2/4: importing TRL"):
        import torch

        # Both of a small machine's cores; a launcher's single thread would double the time.
        torch.set_num_threads(min(os.cpu_count() or 1, 8))
        from .training import train_language_model, train_reward_model
    with _phase(f"3/4: language model from {len(corpus.reviews)} reviews"):
        train_language_model(corpus.reviews, tokenizer, model_path, seed)
    with _phase(f"4/4: reward model from {len(corpus.pairs)} pairs"):
        train_reward_model(
            corpus.pairs, tokenizer, corpus.reviews[:1024], model_path, reward_model_path, seed
        )


@contextmanager
def _phase(name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{PROGRESS} {name}, {time.monotonic() - start:.1f} s", flush=True)


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows, indent=0), encoding="utf-8")


if __name__ == "__main__":
    main()
