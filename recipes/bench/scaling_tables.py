"""The figures of scaling.py as ratios and exponents, and as tables in Markdown."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from measure import fitted_exponent


def summarize_vocabulary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios to the smallest vocabulary, and exponents, of each size of chunks."""
    by_chunk: dict[int, Any] = {}
    for row in rows:
        row["bytes"] = row["update_bytes"] + row["other_weights_bytes"]
        by_chunk.setdefault(row["chunk_bytes"], []).append(row)
    for own in by_chunk.values():
        least = min(own, key=lambda row: row["size"])
        for row in own:
            for name in ("update_bytes", "bytes", "process_bytes"):
                known = row[name] is not None
                row[f"{name}_ratio"] = row[name] / least[name] if known else None
    names = ("update_s", "update_bytes", "bytes", "process_bytes")
    return {
        "points": rows,
        "exponents": {chunk: exponents(own, names) for chunk, own in by_chunk.items()},
    }


def summarize_sequence(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Microseconds per token: in all, of attention, and without it."""
    for row in rows:
        row["us_per_token"] = 1e6 * row["update_s"] / row["tokens"]
        row["attention_us_per_token"] = 1e6 * row["attention_s"] / row["tokens"]
        # Of the same turn, so that a slow moment hits both.
        others = [turn["update_s"] - turn["attention_s"] for turn in row["turns"]]
        row["other_us_per_token"] = 1e6 * statistics.median(others) / row["tokens"]
    names = ("us_per_token", "attention_us_per_token", "other_us_per_token")
    return {
        "points": rows,
        "exponents": exponents(rows, names),
        "max_over_min": {name: max_over_min(rows, name) for name in names},
    }


def summarize_batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    for row in rows:
        row["us_per_token"] = 1e6 * row["update_s"] / row["tokens"]
    names = ("update_s", "iteration_s", "us_per_token", "peak_bytes")
    return {
        "points": rows,
        "exponents": exponents(rows, names),
        "max_over_min": {name: max_over_min(rows, name) for name in names[2:]},
    }


def exponents(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    if len({row["size"] for row in rows}) < 2:
        return {}
    sizes = [row["size"] for row in rows]
    return {
        name: fitted_exponent(sizes, [row[name] for row in rows])
        for name in names
        if all(row.get(name) is not None for row in rows)
    }


def max_over_min(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows]
    return None if None in values else max(values) / min(values)


def show_vocabulary(result: dict[str, Any]) -> None:
    first = result["points"][0]
    print(f"\n### Vocabulary: {first['rows']} rows, {first['tokens']} tokens\n")
    titles = ["vocabulary", "chunk MiB", "update s", "update MB", "x smallest"]
    titles += ["in all MB", "x smallest", "process MB", "x smallest", "not counted MB"]
    table(
        titles,
        [
            [
                f"{row['size']}",
                f"{row['chunk_bytes'] / 2**20:g}",
                f"{row['update_s']:.3f}",
                megabytes(row["update_bytes"]),
                number(row["update_bytes_ratio"]),
                megabytes(row["bytes"]),
                number(row["bytes_ratio"]),
                megabytes(row["process_bytes"]),
                number(row["process_bytes_ratio"]),
                megabytes(row["embedding_and_head_bytes"]),
            ]
            for row in result["points"]
        ],
    )
    for chunk, fitted in result["exponents"].items():
        print(f"\nExponents with chunks of {chunk / 2**20:g} MiB: {listed(fitted)}")
    sys.stdout.flush()


def show_sequence(result: dict[str, Any]) -> None:
    print("\n### Sequence: equal response tokens in every micro-batch\n")
    titles = ("response tokens", "rows", "tokens", "us/token", "attention us/token")
    names = ("us_per_token", "attention_us_per_token", "other_us_per_token")
    table(
        (*titles, "without attention us/token"),
        [
            [f"{row[name]}" for name in ("size", "rows", "tokens")]
            + [f"{row[name]:.1f}" for name in names]
            for row in result["points"]
        ],
    )
    print(f"\nLargest / smallest: {listed(result['max_over_min'])}")
    print(f"Exponents: {listed(result['exponents'])}", flush=True)


def show_batch(result: dict[str, Any]) -> None:
    print("\n### Batch: episodes in a rollout batch\n")
    table(
        ("episodes", "tokens", "update s", "update us/token", "iteration s", "peak MB"),
        [
            [
                f"{row['size']}",
                f"{row['tokens']}",
                f"{row['update_s']:.2f}",
                f"{row['us_per_token']:.1f}",
                f"{row['iteration_s']:.2f}",
                megabytes(row["peak_bytes"]),
            ]
            for row in result["points"]
        ],
    )
    print(f"\nLargest / smallest: {listed(result['max_over_min'])}")
    print(f"Exponents: {listed(result['exponents'])}", flush=True)


def table(titles: Sequence[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def listed(values: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items() if value is not None)


SUMMARIES = {
    "vocabulary": summarize_vocabulary,
    "sequence": summarize_sequence,
    "batch": summarize_batch,
}
SHOW = {"vocabulary": show_vocabulary, "sequence": show_sequence, "batch": show_batch}
