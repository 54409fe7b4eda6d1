"""The scripts of docs/errors.md, one by one on the ranks of a launch.

`python tests/docs/error_scripts.py` writes the messages into the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
SECTION = re.compile(r"^## (\S+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MESSAGE = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# These end their processes, or need an environment of their own.
ALONE = ("rank_missing", "not_distributed")
WATCH_EXIT_CODE = 75


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one script did on one rank: the causes it ended with, and the message."""

    causes: tuple[str, ...]
    message: str


def preamble() -> str:
    """What every script of the page begins with."""
    found = SCRIPT.search(PAGE.read_text().partition("\n## ")[0])
    assert found is not None
    return found[1]


def sections() -> list[tuple[str, str]]:
    """Each section's cause and text, in the order of the page."""
    return SECTION.findall(PAGE.read_text())


def scripts() -> dict[str, str]:
    """The whole script of each section, by cause."""
    return {cause: preamble() + only(SCRIPT, text, cause) for cause, text in sections()}


def messages() -> dict[str, str]:
    """The message printed in each section, by cause."""
    return {cause: only(MESSAGE, text, cause).rstrip("\n") for cause, text in sections()}


def only(pattern: re.Pattern[str], text: str, cause: str) -> str:
    found = pattern.findall(text)
    assert len(found) == 1, f"{cause}: {len(found)} blocks of {pattern.pattern!r}, expected one"
    return str(found[0])


def run_scripts(causes: Sequence[str]) -> dict[str, Outcome]:
    """Runs on a rank: the outcome of each of `causes`' scripts, one after another."""
    whole = scripts()
    return {cause: run_script(cause, whole[cause]) for cause in causes}


def run_script(cause: str, script: str) -> Outcome:
    from audit_log import logged
    from trl_sync.errors import DesyncError

    with logged() as warnings:
        try:
            exec(compile(script, f"errors.md#{cause}", "exec"), {"__name__": "__main__"})
        except DesyncError as error:
            return Outcome(causes=tuple(f.cause for f in error.findings), message=str(error))
    causes = [str(cause) for text in warnings for cause in re.findall(r"Cause: (\w+)", text)]
    return Outcome(causes=tuple(causes), message="\n".join(warnings))


def launch(cause: str, port: int, deadline_s: float = 60.0) -> list[tuple[int, str]]:
    """Exit code and stderr of both ranks of a launch of `cause`'s script, without accelerate's
    own variables, as torchrun starts it on a machine without GPUs.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", scripts()[cause]],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=deadline_s)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(p.returncode, text) for p, text in zip(processes, outputs, strict=True)]


def message_in(stderr: str) -> str:
    """The audit's message in what a process wrote, from its step to the link."""
    # torch puts the rank before each line of a traceback.
    text = re.sub(r"^\[rank\d\]: ", "", stderr, flags=re.MULTILINE)
    found = re.search(r"step \d+, .*?See docs/errors\.md#\w+", text, re.DOTALL)
    return found[0] if found else text


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from ranks import free_port, run_on_ranks

    together = [cause for cause in scripts() if cause not in ALONE]
    found = {c: o.message for c, o in run_on_ranks(run_scripts, together)[0].items()}
    found |= {cause: message_in(launch(cause, free_port())[0][1]) for cause in ALONE}
    # Where this run kept its checkpoints is nobody's business.
    found = {cause: re.sub(r"/\S*/(?=checkpoint-)", "runs/", m) for cause, m in found.items()}
    text = PAGE.read_text()
    for cause, section in sections():
        filled = MESSAGE.sub(lambda _, c=cause: f"```text\n{found[c]}\n```", section)
        text = text.replace(section, filled)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
