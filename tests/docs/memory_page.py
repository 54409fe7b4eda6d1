"""The tables of docs/memory.md, computed: `python tests/docs/memory_page.py` writes them."""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planned_models import CONFIGS, write_config
from trl_sync.planning.architecture import Architecture, read_architecture
from trl_sync.planning.options import PlanOptions
from trl_sync.planning.plan import make_plan

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
GPUS_GB = (16, 24, 48, 80)
LONGEST, STEP = 16384, 128
TABLE = re.compile(r"(<!-- (\w+): computed -->\n\n).*?(\n\n)", re.DOTALL)


def options(model: Architecture) -> PlanOptions:
    """The run that the page speaks of, on one GPU."""
    return PlanOptions(
        model=model, batch=4, rollout_batch=16, prompt_tokens=512, response_tokens=512
    )


def architectures() -> dict[str, Architecture]:
    with tempfile.TemporaryDirectory() as folder:
        return {name: read_architecture(str(write_config(name, Path(folder)))) for name in CONFIGS}


def peaks() -> str:
    """The peak of each way to hold the models, and the smallest GPU that it fits on."""
    models = architectures()
    lines = [header("GB at the peak, smallest GPU", models)]
    ways = {
        "shared base in NF4 (default)": {},
        "the same without gradient checkpointing": {"gradient_checkpointing": False},
        "shared base in bf16": {"quantization": "none"},
        "policy, value model, reference whole, in bf16": {"separate": True},
    }
    for way, settings in ways.items():
        cells = []
        for model in models.values():
            plan = make_plan(replace(options(model), **settings))
            fitting = [gpu for gpu in GPUS_GB if plan.fits(gpu * 1e9)]
            size = f"{fitting[0]} GB" if fitting else "none of them"
            cells.append(f"{plan.peak_bytes / 1e9:.1f}, {size}")
        lines.append(row(way, cells))
    return "\n".join(lines)


def lengths() -> str:
    """The longest responses that fit, with a micro-batch of one and eight rows in a rollout."""
    models = architectures()
    lines = [header("GPU", models)]
    for gpu in GPUS_GB:
        cells = [longest(model, gpu) for model in models.values()]
        lines.append(row(f"{gpu} GB", cells))
    return "\n".join(lines)


def longest(model: Architecture, gpu_gb: int) -> str:
    small = replace(options(model), batch=1, rollout_batch=8)
    fitting = [
        tokens
        for tokens in range(STEP, LONGEST + 1, STEP)
        if make_plan(replace(small, response_tokens=tokens)).fits(gpu_gb * 1e9)
    ]
    if not fitting:
        return "does not fit"
    return f"{fitting[-1]:,}" + (" or more" if fitting[-1] == LONGEST else "")


def header(first: str, models: dict[str, Architecture]) -> str:
    return row(first, list(models)) + "\n|" + "---|" * (len(models) + 1)


def row(first: str, cells: list[str]) -> str:
    return "| " + " | ".join([first, *cells]) + " |"


TABLES = {"peaks": peaks, "lengths": lengths}


def filled(text: str) -> str:
    """The page with its tables computed anew."""
    return TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
