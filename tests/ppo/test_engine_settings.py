"""What PPO refuses under an engine: at construction, with the reason and the alternative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig

import engines
import runs
import tiny
from trl_sync import ConfigError
from trl_sync.ppo.engines import check_engine_settings

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1 is not supported.*fsdp_version: 2"),
        (FSDP | {"FSDP_VERSION": "1"}, "FSDP1 is not supported.*fsdp_version: 2"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing=True"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported.*FSDP2"),
    ],
)
def test_the_launcher_asks_for_what_cannot_work(
    tmp_path: Path, monkeypatch: Any, environment: dict[str, str], message: str
) -> None:
    config = tiny.config(tmp_path / "out")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check_engine_settings(config)


@pytest.mark.parametrize("name, what", [("tp", "tensor"), ("cp", "context"), ("sp", "sequence")])
@pytest.mark.parametrize("by", ["environment", "argument"])
def test_parallelism_within_a_sequence_or_layer_is_refused(
    tmp_path: Path, monkeypatch: Any, name: str, what: str, by: str
) -> None:
    config = tiny.config(tmp_path / "out")
    if by == "argument":
        config.parallelism_config = ParallelismConfig(**{f"{name}_size": 2})
    else:
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "2")
    with pytest.raises(ConfigError, match=rf"{what} parallelism \({name}_size=2\).*FSDP2"):
        check_engine_settings(config)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"version": 1}, "FSDP1"),
        ({"version": 2, "activation_checkpointing": True}, "gradient_checkpointing=True"),
    ],
)
def test_the_arguments_ask_for_what_cannot_work(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    config = tiny.config(tmp_path / "out", fsdp="full_shard", fsdp_config=settings)
    with pytest.raises(ConfigError, match=message):
        check_engine_settings(config)


def test_fsdp_that_is_not_active_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    """One process on a CPU: accelerate offers no FSDP there, and says nothing."""
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="FSDP was asked for, but accelerate runs one process"):
        runs.make(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def fall_back_to_ddp(folder: str) -> str:
    try:
        runs.make(Path(folder), use_cpu=True)
    except ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.ranks
def test_fsdp_that_becomes_ddp_is_an_error_on_every_rank(tmp_path: Path) -> None:
    from ranks import run_on_ranks

    environment = FSDP | engines.ENVIRONMENTS["ddp"]
    said = run_on_ranks(fall_back_to_ddp, str(tmp_path), environment=environment)
    assert all("FSDP was asked for, but accelerate runs DDP" in text for text in said)
