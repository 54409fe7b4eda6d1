"""A PPO run from its first rollout to its page, and what it writes down of itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trl_sync import SyncAuditCallback
from trl_sync.ppo.run_record import public_settings
from trl_sync.report import read_runs, write_completions, write_report

TOKEN = "hf_" + "aB3" * 11


@pytest.fixture
def ppo_runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tests/ppo/runs.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "ppo")
    import runs

    return runs


def test_the_page_of_a_ppo_run_with_a_desync(tmp_path: Path, ppo_runs: Any) -> None:
    trainer = ppo_runs.make(
        tmp_path,
        eval_prompts=tiny.prompts(3),
        hub_token=TOKEN,
        callbacks=[SyncAuditCallback(frozen_cover_steps=1, on_desync="warn")],
    )
    frozen = {n: p for n, p in trainer.backbone.causal_model.named_parameters() if "lora" not in n}
    name, parameter = next(item for item in frozen.items() if not item[1].requires_grad)

    def edit(state: Any, control: Any) -> None:
        if state.global_step == 5:
            with torch.no_grad():
                parameter.view(-1)[0] += 1.0

    trainer.add_callback(ppo_runs.At("on_step_end", edit))
    before = trainer.completions(greedy=True)
    trainer.train()
    trainer.save_state()
    out = tmp_path / "out"
    write_completions(out, before, trainer.completions(greedy=True))
    runs = read_runs([out])
    text = write_report(runs, out / "report.html").page.read_text("utf-8")
    assert "".join(runs[0].missing) == (
        "no summary: the PPO recipes write summary.json when they end."
    )
    [attempt] = runs[0].attempts
    [desync] = [event for event in attempt.events if event.kind == "desync"]
    assert (desync.step, desync.ranks, desync.findings[0].cause) == (6, (0,), "frozen_changed")
    assert desync.findings[0].tensor is not None
    assert desync.findings[0].tensor in text
    assert name.rpartition(".")[0].split(".")[-1] in desync.findings[0].tensor
    for title in ("Reward", "KL to the reference", "Entropy of the policy", "Clip fractions"):
        assert f"<figcaption>{title} <span" in text
    assert "Time by phase" in text
    assert "<dt>response_length</dt><dd>8</dd>" in text
    assert "<dt>engine</dt><dd>one process</dd>" in text
    assert before["query"][0] in text
    assert len(text) < 1_000_000
    assert TOKEN not in text
    assert TOKEN not in (out / "run_record.json").read_text()


def test_the_record_of_a_run(tmp_path: Path, ppo_runs: Any) -> None:
    ppo_runs.train(tmp_path, learning_rate=0.002)
    record = json.loads((tmp_path / "out" / "run_record.json").read_text())
    assert record["world_size"] == 1
    assert record["engine"] == "one process"
    assert record["first_step"] == 0
    assert record["config"]["learning_rate"] == 0.002
    assert record["config"]["stop_token"] == "eos"
    assert record["config"]["response_length"] == 8
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"] == sys.version.split()[0]
    assert {"trl_sync", "transformers", "trl", "peft", "accelerate", "bitsandbytes"} <= set(
        record["versions"]
    )
    assert len(record["devices"]) >= 1
    assert not list((tmp_path / "out").glob("_*"))


def test_settings_are_recorded_without_secrets(tmp_path: Path) -> None:
    config = tiny.config(
        tmp_path,
        hub_token=TOKEN,
        hub_model_id=f"name-{TOKEN}",
        stop_token=None,
        stop_token_id=7,
        generation_kwargs={"top_k": 5},
        chat_template_kwargs={
            "api_key": "mine",
            "inner": [{"client_secret": "mine", "pad_token_id": 3, "a_token_id": "mine"}],
            "url": "https://me:mine@example.org/x",
        },
    )
    settings = public_settings(config)
    assert "mine" not in json.dumps(settings)
    assert TOKEN not in json.dumps(settings)
    assert not {"hub_token", "include_tokens_per_second"} & set(settings)
    assert settings["stop_token_id"] == 7
    assert settings["stop_token"] is None
    assert settings["generation_kwargs"] == {"top_k": 5}
    assert settings["chat_template_kwargs"]["inner"] == [{"pad_token_id": 3}]
    assert settings["chat_template_kwargs"]["url"] == "https://<removed>example.org/x"
    assert settings["seed"] == 42


def test_a_record_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, ppo_runs: Any
) -> None:
    (tmp_path / "out" / "run_record.json").mkdir(parents=True)
    trainer = ppo_runs.train(tmp_path)
    assert trainer.state.global_step == 12
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run_record.json"]
