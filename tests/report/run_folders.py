"""Run folders made by hand, small enough to know every number in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = {
    "log": "trainer_state.json",
    "journal": "sync_audit.jsonl",
    "summary": "summary.json",
    "record": "run_record.json",
    "completions": "completions.jsonl",
}


def log_row(iteration: int, reward: float) -> dict[str, Any]:
    """A line of PPOTrainer's log: 16 episodes and 4 updates an iteration."""
    return {
        "episode": 16 * iteration,
        "step": 4 * iteration,
        "objective/scores": reward,
        "objective/kl": 0.1 * iteration,
        "policy/entropy_avg": 1.5,
        "policy/clipfrac_avg": 0.02,
        "val/clipfrac_avg": 0.07,
        "val/explained_variance": 0.25,
        "objective/response_length": 8.0,
        "grad_norm": 0.5,
        "learning_rate": 1e-3 / iteration,
        "loss": 0.01,
        "time/rollout_s": 0.5,
        "time/score_s": 0.25,
    }


def finding(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "cause": "stale_replica",
        "step": 3,
        "ranks": [1],
        "scope": "trainable",
        "tensor": "body.weight",
        "role": "policy",
        "num_tensors": 2,
        "holders": [[[0], "d620"], [[1], "8693"]],
        "last_equal_step": 2,
        "evidence": "rank 1 did not move",
        "difference": None,
        "fatal": True,
        "replicas": [],
    }
    return fields | changes


def journal_lines() -> list[dict[str, Any]]:
    """Two attempts on two ranks with an event of every kind."""
    begin = {"event": "begin", "time_s": 1.0, "version": "0", "step": 0, "world_size": 2}
    begin |= {"engine": "MULTI_CPU", "every_steps": 1, "on_desync": "repair"}
    begin |= {"scopes": {"frozen": {"status": "audited", "tensors": 5, "size_bytes": 1234}}}
    audits = [
        {"event": "audit", "step": step, "audit": step + 1, "equal": True, "size_bytes": 10}
        | {"seconds": 0.5, "roots": {}}
        for step in range(6)
    ]
    end = {"event": "end", "audits": 5, "desyncs": 1, "size_bytes": 50}
    end |= {"seconds": 2.5, "share_of_step": 0.01}
    desync = {"event": "desync", "step": 3, "audit": 4, "action": "repair"}
    desync |= {"findings": [finding()], "message": "step 3, body.weight: rank 0 holds d620"}
    missing = {"event": "desync", "step": 7, "audit": 3, "action": "raise"}
    missing |= {"findings": [finding(cause="rank_missing", step=7, tensor=None, scope=None)]}
    missing |= {"message": "rank 1 was killed"}
    return [
        begin,
        *audits[:3],
        {"event": "warning", **finding(cause="buffers_differ", step=2, fatal=False)},
        desync,
        {"event": "repair", "step": 3, "audit": 4},
        {"event": "save", "step": 4, "folder": "checkpoint-4", "verified": True},
        {"event": "save_without_manifest", "step": 4, "folder": "other", "reason": "full disk"},
        *audits[4:],
        end,
        begin | {"step": 4},
        {"event": "resume", "step": 4, "folder": "checkpoint-4", "verified": True},
        {"event": "not_compared", "step": 4, "folder": "checkpoint-4", "reason": "ZeRO-2"},
        audits[5] | {"step": 6},
        missing,
    ]


RECORD = {
    "format": 1,
    "time_s": 1.0,
    "engine": "DDP",
    "world_size": 2,
    "device": "cpu",
    "devices": ["cpu, 2 cores"],
    "platform": "Linux",
    "base_model": "tiny",
    "versions": {"torch": "2.13.0", "trl_sync": "0.1.0"},
    "config": {"learning_rate": 1e-3, "seed": 42, "output_dir": "runs/a", "nested": {"a": [1, 2]}},
}
COMPLETIONS = [
    {
        "query": "2 + 2 =",
        "before": {"model response": " 5", "score": 0.0},
        "after": {"model response": " 4", "score": 1.0},
    },
    {"query": "1 + 1 =", "before": None, "after": {"model response": " 2", "score": None}},
]


def write_run(folder: Path, **changes: Any) -> Path:
    """Writes a run folder; what is given replaces a file's content, None leaves the file out."""
    folder.mkdir()
    rows = [log_row(n, reward=0.5 * n) for n in range(1, 4)]
    files: dict[str, Any] = {
        "log": {"global_step": 12, "log_history": rows},
        "journal": journal_lines(),
        "summary": {"reward_first": 0.5, "reward_last": 1.5, "episodes": 48},
        "record": RECORD,
        "completions": COMPLETIONS,
    }
    for what, content in (files | changes).items():
        if isinstance(content, list):
            content = "".join(f"{json.dumps(line)}\n" for line in content)
        elif isinstance(content, dict):
            content = json.dumps(content)
        if content is not None:
            (folder / FILES[what]).write_text(content)
    return folder
