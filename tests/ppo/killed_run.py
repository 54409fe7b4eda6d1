"""One rank of an audited run under an engine, for tests/ppo/test_engines_killed.py.

    python killed_run.py ENGINE FOLDER kill|resume

`kill`: rank 1 ends itself by SIGKILL in the middle of its sixth update; a checkpoint was saved
after the fourth. `resume`: a run from the last checkpoint to the end, then an uninterrupted one;
each rank writes whether both ended with the same parameters.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch import nn

import engine_runs
import engines
import runs
import tiny
from trl_sync import SyncAuditCallback

TIMEOUT_S = 20
DEADLY_FORWARD = 12  # of 2 micro-batches an update: the second one of the sixth


def trainer_for(engine: str, folder: Path, output: str) -> Any:
    engines.start_anew(engine)
    tiny.config(folder / "unused", **engines.settings(engine))
    engines.start_anew(engine)
    return runs.make(
        folder / output,
        model=engine_runs.base(folder, "nf4"),
        peft_config=runs.lora(lora_dropout=0.1),
        callbacks=[SyncAuditCallback(timeout_s=TIMEOUT_S)],
        save_strategy="steps",
        save_steps=4,
        total_episodes=32 * int(os.environ["WORLD_SIZE"]),
        **engines.settings(engine),
    )


def die_in_forward(trainer: Any) -> None:
    forwards = []

    def count(module: nn.Module, *args: Any) -> None:
        if module.training:
            forwards.append(None)
        if len(forwards) == DEADLY_FORWARD:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.backbone.register_forward_pre_hook(count)


def main(engine: str, folder: Path, mode: str) -> None:
    engines.bring_up(engine)
    rank = int(os.environ["RANK"])
    trainer = trainer_for(engine, folder, "killed")
    if mode == "kill":
        if rank == 1:
            die_in_forward(trainer)
        trainer.train()
        return
    trainer.train(resume_from_checkpoint=True)
    resumed = engine_runs.checksums(engine_runs.whole_parameters(trainer))
    started_at = trainer._first_step
    trainer = trainer_for(engine, folder, "whole")
    trainer.train()
    whole = engine_runs.checksums(engine_runs.whole_parameters(trainer))
    line = f"started at {started_at}, equal {resumed == whole}, tensors {len(whole)}\n"
    (folder / f"resumed_{rank}.txt").write_text(line)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
