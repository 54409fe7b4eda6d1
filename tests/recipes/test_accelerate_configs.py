"""The accelerate configs: what the launcher makes of each, without starting any process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import ParallelismConfig
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    patch_environment,
)
from torch.distributed.run import config_from_args

import tiny
from ranks import free_port

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes/accelerate_configs"
NAMES = {path.stem for path in CONFIGS.glob("*.yaml")}
ZERO = {"zero1": 1, "zero2": 2, "zero3": 3}
FSDP = {"fsdp2", "fsdp2_qlora", "hsdp"}
NEEDS_DEEPSPEED = functools.partial(pytest.param, marks=pytest.mark.deepspeed)
Launch = Callable[..., dict[str, Any]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launch:
    """What `accelerate launch` would start: the environment, and torchrun's arguments if any."""

    def start(name: str, *flags: str) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def torchrun(args: Any) -> None:
            seen.update(environment=dict(os.environ), torchrun=args)

        class Process:
            returncode = 0

            def __init__(self, command: list[str], env: dict[str, str]) -> None:
                seen.update(environment=env, torchrun=None, command=command)

            def wait(self) -> None:
                pass

        monkeypatch.setattr("torch.distributed.run.run", torchrun)
        monkeypatch.setattr(launch.subprocess, "Popen", Process)
        config = ["--config_file", str(CONFIGS / f"{name}.yaml")]
        port = [] if "--main_process_port" in flags else ["--main_process_port", str(free_port())]
        parser = launch.launch_command_parser()
        launch.launch_command(parser.parse_args([*config, *port, *flags, "script.py", "--x", "1"]))
        return seen

    return start


def test_the_configs_are_those_of_the_docs() -> None:
    expected = {"cpu_1", "cpu_2", "cpu_4", "gpu_1", "ddp", "multi_node"} | set(ZERO) | FSDP
    assert expected == NAMES
    named = {
        line.split("`")[1]
        for line in (ROOT / "docs/scaling.md").read_text().splitlines()
        if line.startswith("| `")
    }
    assert expected <= named


@pytest.mark.parametrize(
    "name", [NEEDS_DEEPSPEED(name) if name in ZERO else name for name in sorted(NAMES)]
)
def test_accelerate_knows_every_key(name: str, launched: Launch) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses unknown keys itself
    parser = launch.launch_command_parser()
    flags = {action.dest for action in parser._actions}
    # It does not look into these, and would drop a misspelt key in silence.
    for part in (config.fsdp_config, config.deepspeed_config, config.parallelism_config):
        assert set(part) <= flags
    engines = {
        **dict.fromkeys(ZERO, DistributedType.DEEPSPEED),
        **dict.fromkeys(FSDP, DistributedType.FSDP),
        **dict.fromkeys(("cpu_1", "gpu_1"), DistributedType.NO),
    }
    assert config.distributed_type == engines.get(name, DistributedType.MULTI_GPU)
    environment = launched(name)["environment"]
    # Else TrainingArguments would take the launcher's precision where PPOConfig asks for fp32.
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert ("ACCELERATE_USE_DEEPSPEED" in environment) == (name in ZERO)
    assert ("ACCELERATE_USE_FSDP" in environment) == (name in FSDP)


@pytest.mark.parametrize(
    "name, processes",
    [
        ("cpu_2", 2),
        ("cpu_4", 4),
        ("ddp", 8),
        NEEDS_DEEPSPEED("zero3", 8),
        ("fsdp2", 8),
        ("hsdp", 8),
    ],
)
def test_how_many_processes_start(name: str, processes: int, launched: Launch) -> None:
    torchrun, *_ = config_from_args(launched(name)["torchrun"])
    assert (torchrun.nproc_per_node, torchrun.max_nodes) == (processes, 1)
    assert launched(name, "--num_processes", "3")["torchrun"].nproc_per_node == "3"
    assert load_config_from_file(str(CONFIGS / f"{name}.yaml")).use_cpu == name.startswith("cpu")


def test_one_process_starts_without_torchrun(launched: Launch) -> None:
    cpu, gpu = launched("cpu_1"), launched("gpu_1")
    assert cpu["torchrun"] is gpu["torchrun"] is None
    assert cpu["command"][1:] == ["script.py", "--x", "1"]
    assert cpu["environment"]["ACCELERATE_USE_CPU"] == "True"
    assert gpu["environment"]["ACCELERATE_USE_CPU"] == "False"
    assert gpu["environment"]["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.deepspeed
@pytest.mark.parametrize("name, stage", ZERO.items())
def test_zero_leaves_batches_and_clipping_to_the_trainer(
    name: str, stage: int, launched: Launch
) -> None:
    environment = launched(name)["environment"]
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment
    with patch_environment(**environment):
        plugin = DeepSpeedPlugin()
    config = plugin.deepspeed_config
    assert config["zero_optimization"]["stage"] == stage
    for key in ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size"):
        assert config[key] == "auto"
    assert plugin.zero3_init_flag is False
    assert config["zero_optimization"]["offload_param"]["device"] == "none"


@pytest.mark.parametrize("name", sorted(FSDP))
def test_fsdp_is_the_second_version_and_shards_layers(name: str, launched: Launch) -> None:
    environment = launched(name)["environment"]
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False
    assert plugin.sharding_strategy is None
    plugin.set_auto_wrap_policy(tiny.llama())
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {
        type(tiny.llama().model.layers[0])
    }


def test_hsdp_has_a_mesh_of_copies_and_shards(launched: Launch) -> None:
    environment = launched("hsdp")["environment"]
    assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    with patch_environment(**environment):
        mesh = ParallelismConfig()
    assert mesh._get_mesh() == (("dp_replicate", "dp_shard"), (2, 4))
    flags = ("--parallelism_config_dp_shard_size", "8", "--num_processes", "16")
    with patch_environment(**launched("hsdp", *flags)["environment"]):
        mesh = ParallelismConfig()
    assert (mesh.dp_replicate_size, mesh.dp_shard_size, mesh.total_size) == (2, 8, 16)
    assert "ACCELERATE_USE_PARALLELISM_CONFIG" not in launched("fsdp2")["environment"]


@pytest.mark.parametrize("name", ["multi_node", NEEDS_DEEPSPEED("zero3"), "hsdp"])
def test_one_launcher_runs_on_each_machine(name: str, launched: Launch) -> None:
    flags = ["--main_process_ip", "10.1.2.3", "--main_process_port", str(free_port())]
    if name != "multi_node":
        flags += ["--num_machines", "2", "--num_processes", "16"]
    for rank in ("0", "1"):
        started = launched(name, *flags, "--machine_rank", rank)["torchrun"]
        torchrun, *_ = config_from_args(started)
        assert (torchrun.min_nodes, torchrun.max_nodes, torchrun.nproc_per_node) == (2, 2, 8)
        assert (torchrun.rdzv_backend, torchrun.rdzv_configs["rank"]) == ("static", int(rank))
        assert torchrun.rdzv_endpoint == f"{flags[1]}:{flags[3]}"


def test_the_slurm_script_starts_one_launcher_on_each_machine(tmp_path: Path) -> None:
    print_arguments = "import json, sys; print(json.dumps(sys.argv[1:]))"
    stand_ins = {
        "scontrol": '[ "$3" = "node[1-2]" ] && printf "node1\\nnode2\\n"',
        # As srun does: the same command on each machine, with its number in the environment.
        "srun": 'shift\nfor i in 0 1; do SLURM_NODEID=$i "$@"; done',
        "accelerate": f"{sys.executable} -c '{print_arguments}' \"$@\"",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "4242",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    done = subprocess.run(
        ["bash", str(CONFIGS / "multi_node.slurm"), "--output_dir", "a folder"],
        env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(calls) == 2
    for rank, (command, *arguments) in enumerate(calls):
        assert command == "launch"
        assert arguments[-3:] == ["recipes/ppo.py", "--output_dir", "a folder"]
        flags = dict(zip(arguments[:-3:2], arguments[1:-3:2], strict=True))
        assert (ROOT / flags["--config_file"]).is_file()
        assert flags["--num_machines"] == "2"
        assert flags["--num_processes"] == "8"
        assert flags["--machine_rank"] == str(rank)
        assert flags["--main_process_ip"] == "node1"
        assert flags["--main_process_port"] == str(20000 + 4242)
