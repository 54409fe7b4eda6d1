"""`trl-sync env`: what it prints, and its exit codes."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planned_models import write_config
from trl_sync.cli import env, main

Call = Callable[..., tuple[int, str, str]]
SIZES = ("--batch", "4", "--rollout-batch", "16", "--response-tokens", "512")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls `trl-sync env` in this process: exit code, standard output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trl-sync", "env", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        code = end.value.code
        return code if isinstance(code, int) else 1, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config("Llama-3.1-8B", tmp_path_factory.mktemp("models"))


# Without --plan


def content_of_versions(call: Call) -> dict[str, str]:
    versions: dict[str, str] = json.loads(call("--json")[1])["versions"]
    return versions


def test_versions_devices_and_engines(call: Call) -> None:
    code, out, _ = call()
    assert code == 0
    assert "\x1b" not in out  # plain text where there is no terminal
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines() if len(line.split()) > 1}
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes"):
        assert rows[package] == importlib.metadata.version(package)
    assert rows["python"] == sys.version.split()[0]
    assert f"system         {platform.platform()}" in out
    assert content_of_versions(call)["CUDA of torch"] == (torch.version.cuda or "none")
    assert "triton" in rows
    content = json.loads(call("--json")[1])
    assert content["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(content) == {"versions", "devices", "engines", "abilities", "known_problems"}
    assert content["abilities"]["4-bit weights (NF4)"] == {"can_run": True, "reason": ""}
    assert content["abilities"]["checksums on the GPU"]["can_run"] == torch.cuda.is_available()
    assert content["known_problems"] == []
    assert "problem: none known of these versions" in out


def test_what_is_not_installed_is_said(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found = env.installed_version
    monkeypatch.setattr(env, "installed_version", lambda p: None if p == "deepspeed" else found(p))
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: None)
    content = json.loads(call("--json")[1])
    assert content["versions"]["deepspeed"] == "not installed"
    zero = content["engines"]["ZeRO-1, ZeRO-2, ZeRO-3"]
    assert zero == {"can_run": False, "reason": "DeepSpeed is not installed: trl-sync[deepspeed]"}


def test_versions_with_problems_are_named(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found = env.installed_version
    odd = {"transformers": "5.6.0", "trl": "9.0.0"}
    monkeypatch.setattr(env, "installed_version", lambda p: odd.get(p, found(p)))
    monkeypatch.setattr(env, "has_accelerator", lambda: False)
    trl, resume = json.loads(call("--json")[1])["known_problems"]
    assert trl.startswith("trl 9.0.0 is installed, but trl_sync needs trl")
    assert resume.startswith("transformers 5.6.0 cannot resume")
    assert "problem: trl 9.0.0" in call()[1]


def test_a_bitsandbytes_that_does_not_work_is_said(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes.functional

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("no library for this device")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fails)
    four_bit = json.loads(call("--json")[1])["abilities"]["4-bit weights (NF4)"]
    assert four_bit == {"can_run": False, "reason": "bitsandbytes: no library for this device"}


def can_run(call: Call) -> dict[str, bool]:
    engines = json.loads(call("--json")[1])["engines"]
    return {name: engine["can_run"] for name, engine in engines.items()}


@pytest.mark.parametrize("count, runs", [(0, False), (1, True), (4, True)])
def test_engines_depend_on_accelerators(
    call: Call, monkeypatch: pytest.MonkeyPatch, count: int, runs: bool
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(env, "list_devices", lambda: ["a device"])
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: object())
    names = ("one process", "DDP", "ZeRO-1, ZeRO-2, ZeRO-3", "FSDP2, HSDP")
    assert can_run(call) == dict(zip(names, (True, True, runs, runs), strict=True))
    out = call()[1]
    assert ("several machines still can" in out) == (count == 1)
    assert ("there is no accelerator: on CPUs use DDP" in out) == (count == 0)


def test_sizes_without_plan_are_refused(call: Call) -> None:
    code, _, err = call("--engine", "ddp", "--batch", "4")
    assert code == 2
    assert err == "error: --engine, --batch: for --plan only. Add --plan, or leave it out.\n"


# With --plan


def test_a_plan_as_a_table(call: Call, model: Path) -> None:
    code, out, _ = call("--plan", "--model", model, *SIZES)
    assert code == 0
    assert "\x1b" not in out
    assert "8.03 B parameters: shared base (nf4), adapters of rank 16, in bf16" in out
    assert "Engine none, 1 GPU. Micro-batch 4, rollout batch 16, 512 + 512 tokens, with" in out
    rows = {
        " ".join(line.split()[:-1]): line.split()[-1] for line in out.splitlines() if line.split()
    }
    assert rows["static base: linear layers"] == "3.49"
    assert rows["total static"] == "7.04"
    assert "not measured" in out


def test_a_plan_as_json_adds_up(call: Call, model: Path) -> None:
    code, out, _ = call("--plan", "--model", model, "--engine", "hsdp", "--json", *SIZES)
    assert code == 0
    content = json.loads(out)
    assert content["parameters"] == 8_030_261_248
    settings, totals = content["settings"], content["totals"]
    assert (settings["num_gpus"], settings["num_shards"]) == (8, 4)
    assert (settings["quantization"], settings["lora_rank"]) == ("nf4", 16)
    assert (content["gpu_memory_gb"], content["fits"]) == (None, None)
    static = sum(content["static"].values())
    assert totals["static"] == static
    assert totals["peak in update"] == static + sum(content["update"].values())
    rollout = max(sum(content["generation"].values()), sum(content["scoring"].values()))
    assert totals["peak in rollout"] == static + rollout
    assert totals["peak"] == max(totals[f"peak in {x}"] for x in ("loading", "rollout", "update"))


@pytest.mark.parametrize("memory, code, verdict", [(24, 0, "fits"), (12, 1, "does not fit")])
def test_the_exit_code_says_whether_it_fits(
    call: Call, model: Path, memory: int, code: int, verdict: str
) -> None:
    plan = ("--plan", "--model", model, "--gpu-memory", memory, *SIZES)
    found, out, _ = call(*plan)
    assert found == code
    assert f"A GPU of {memory} GB: {verdict} (" in out
    found, out, _ = call(*plan, "--json")
    assert found == code
    assert json.loads(out)["fits"] is (code == 0)


def test_every_flag_reaches_the_plan(call: Call, model: Path) -> None:
    flags: dict[str, Any] = {
        "engine": "hsdp",
        "gpus": 16,
        "shards": 8,
        "batch": 3,
        "rollout-batch": 5,
        "prompt-tokens": 7,
        "response-tokens": 9,
        "lora-rank": 4,
        "lora-dropout": 0.0,
        "quantization": "none",
        "dtype": "fp32",
        "reward": model,
    }
    named = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    code, out, _ = call(
        "--plan",
        "--model",
        model,
        *named,
        "--reward-in-4bit",
        "--no-gradient-checkpointing",
        "--json",
    )
    assert code == 0
    content = json.loads(out)
    expected = {name.replace("-", "_"): value for name, value in flags.items()}
    expected |= {"num_gpus": expected.pop("gpus"), "num_shards": expected.pop("shards")}
    expected |= {"reward_in_4bit": True, "gradient_checkpointing": False, "separate": False}
    assert content["reward"] == str(expected.pop("reward"))
    assert expected.items() <= content["settings"].items()


def test_separate_models_have_no_adapters(call: Call, model: Path) -> None:
    code, out, _ = call("--plan", "--model", model, "--separate", "--json")
    assert code == 0
    assert json.loads(out)["settings"]["lora_rank"] is None
    assert "whole models" in call("--plan", "--model", model, "--separate")[1]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((), "--plan needs --model"),
        (("--model", "NOWHERE"), "No config of a model can be read at"),
        (("--model", "MODEL", "--engine", "fsdp"), "--engine fsdp is not known"),
        (("--model", "MODEL", "--gpu-memory", "0"), "expected a positive number of GB"),
        (("--model", "MODEL", "--batch", "many"), "Invalid value for '--batch'"),
        (("--model", "MODEL", "--reward", "NOWHERE"), "No config of a model can be read at"),
    ],
)
def test_wrong_usage_ends_with_code_2(
    call: Call, model: Path, tmp_path: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    places = {"MODEL": str(model), "NOWHERE": str(tmp_path / "nothing")}
    code, out, err = call("--plan", *(places.get(text, text) for text in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert complaint in err
