"""`import trl_sync.shim` and `python -m trl_sync.shim`, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import oracle

SILENT = {"TRL_EXPERIMENTAL_SILENCE": "1"}


def _run(*command: str, folder: Path | None = None, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `python command`."""
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def _check(code: str, **environment: str) -> str:
    """What that code printed; the test fails if it raised."""
    exit_code, output, errors = _run("-c", code, **(SILENT | environment))
    assert exit_code == 0, errors
    return output


EVERY_NAME = """
import sys
import trl_sync.shim
heavy = {"torch", "transformers", "trl"} & sys.modules.keys()
assert not heavy, f"the shim alone imported {heavy}"

import importlib
from trl_sync.shim.names import MODULES, NAMES
for module, names in (MODULES | NAMES).items():
    found = importlib.import_module(module)
    for name in names:
        assert getattr(found, name) is not None, (module, name)
        exec(f"from {module} import {name}")

import pickle
import trl
import trl_sync
import trl.experimental.ppo as p
from trl import PPOConfig, PPOTrainer
from trl.experimental.ppo import ppo_trainer
assert PPOTrainer is p.PPOTrainer is ppo_trainer.PPOTrainer is trl_sync.PPOTrainer
assert trl.trainer.PPOConfig is PPOConfig is trl_sync.PPOConfig
assert sys.modules["trl.experimental.ppo.ppo_trainer"] is ppo_trainer
copy = pickle.loads(pickle.dumps(PPOConfig("runs/pickled", use_cpu=True, kl_coef=0.5)))
assert (type(copy), copy.kl_coef) == (PPOConfig, 0.5)
# A pickle that TRL wrote names its class by TRL's path.
assert pickle.loads(b"ctrl.experimental.ppo.ppo_config\\nPPOConfig\\n.") is PPOConfig

from trl.experimental.ppo.ppo_trainer import *
assert INVALID_LOGPROB == 1.0
# What TRL still has is TRL's, also where this package has the same.
assert trl.experimental.utils.get_reward.__module__ == "trl.experimental.utils"
assert trl.trainer.utils.selective_log_softmax.__module__ == "trl.trainer.utils"
assert trl.create_reference_model.__module__ == "trl.models.utils"
for module in (trl, p, trl.trainer.utils):
    try:
        module.Nonsense
    except AttributeError as error:
        assert "Nonsense" in str(error)
    else:
        raise AssertionError(module)
config = trl.ModelConfig(dtype="float16")
assert (config.torch_dtype, config.trust_remote_code) == ("float16", False)
import trl_sync.shim
importlib.reload(trl_sync.shim)
assert sum(type(finder).__module__ == "trl_sync.shim" for finder in sys.meta_path) == 1
"""


@pytest.mark.newest
def test_every_name_is_found_with_the_shim_first() -> None:
    _check(EVERY_NAME)


TRL_FIRST = """
import trl
import trl.trainer.utils
from trl import ModelConfig
try:
    from trl import PPOTrainer
except ImportError:
    pass
import trl_sync.shim
from trl import PPOTrainer
from trl.trainer.utils import SIMPLE_CHAT_TEMPLATE
import trl.experimental.ppo
assert trl.experimental.ppo.PPOTrainer is PPOTrainer is trl.PPOTrainer
assert PPOTrainer.__module__.startswith("trl_sync.")
assert ModelConfig().torch_dtype == ModelConfig().dtype
"""


@pytest.mark.newest
def test_trl_first() -> None:
    _check(TRL_FIRST)


NO_SHIM = """
import importlib.util, sys
before = list(sys.meta_path)
import trl
import trl_sync
import trl_sync.ppo
import trl_sync.ppo.compat
import trl.experimental
assert "trl_sync.shim" not in sys.modules
assert sys.meta_path[: len(before)] == before
assert not hasattr(trl, "PPOTrainer")
assert not hasattr(trl, "AutoModelForCausalLMWithValueHead")
for name in ("trl.core", "trl.experimental.ppo", "trl.trainer.ppo_trainer"):
    assert importlib.util.find_spec(name) is None, name
"""


@pytest.mark.newest
def test_the_package_alone_patches_nothing() -> None:
    _check(NO_SHIM)


TRL_WITH_PPO = """
import trl_sync.shim
import trl
assert trl.__version__ == "1.12.0"
import trl.experimental.ppo as ppo
from trl.experimental.ppo.ppo_trainer import masked_mean
assert ppo.PPOTrainer.__module__ == "trl.experimental.ppo.ppo_trainer"
assert ppo.PPOConfig.__module__ == "trl.experimental.ppo.ppo_config"
assert masked_mean.__module__ == "trl.experimental.ppo.ppo_trainer"
import trl_sync
assert trl.PPOConfig is trl_sync.PPOConfig  # TRL 1.12.0 has no such name
"""


@pytest.mark.oracle
def test_a_trl_with_ppo_keeps_its_own() -> None:
    oracle.source("__init__.py")
    exit_code, _, errors = _run("-c", TRL_WITH_PPO, PYTHONPATH=str(oracle.ORACLE), **SILENT)
    assert exit_code == 0, errors
    assert "The installed TRL has a PPOTrainer of its own" in errors


def test_trl_s_own_warning_stays() -> None:
    code = "import trl_sync.shim; from trl.experimental.ppo import PPOConfig"
    exit_code, _, errors = _run("-W", "error", "-c", code, TRL_EXPERIMENTAL_SILENCE="")
    assert exit_code == 1
    assert "TRLExperimentalWarning" in errors


SCRIPT = """\
import pickle
import sys
import neighbour
from trl.experimental.ppo import PPOConfig

class Own:
    pass

def fail():
    raise RuntimeError("on purpose")

if __name__ == "__main__":
    assert neighbour.HERE
    assert type(pickle.loads(pickle.dumps(Own()))) is Own
    assert PPOConfig.__module__ == "trl_sync.ppo.config"
    print(sys.argv[1:], __file__ == sys.argv[0])
    if "exit" in sys.argv:
        sys.exit(7)
    if "fail" in sys.argv:
        fail()
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("HERE = True\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


@pytest.mark.newest
def test_a_script_runs_as_itself(script: str) -> None:
    command = ("-m", "trl_sync.shim", script, "-h", "--", "exit")
    exit_code, output, errors = _run(*command, **SILENT)
    assert (exit_code, output.splitlines()[-1]) == (7, "['-h', '--', 'exit'] True"), errors


@pytest.mark.newest
def test_a_failing_script_shows_its_own_lines(script: str) -> None:
    exit_code, _, errors = _run("-m", "trl_sync.shim", script, "fail", **SILENT)
    assert exit_code == 1
    lines = errors.splitlines()
    assert lines[-1] == "RuntimeError: on purpose"
    assert lines[-2].strip() == 'raise RuntimeError("on purpose")'
    assert lines[-3].strip() == f'File "{script}", line 10, in fail'


@pytest.mark.newest
@pytest.mark.slow
def test_accelerate_launches_the_shim(script: str) -> None:
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    exit_code, output, errors = _run(*launch, "-m", "trl_sync.shim", script, "one", **SILENT)
    assert exit_code == 0, errors
    assert output.splitlines()[-1] == "['one'] True"


def test_a_missing_script_is_one_line(tmp_path: Path) -> None:
    for arguments, said in (
        (["absent.py"], "cannot read 'absent.py': No such file or directory"),
        ([], "expected a script, got nothing; -h for help"),
        (["--lr", "1"], "expected a script, got --lr; -h for help"),
    ):
        exit_code, output, errors = _run("-m", "trl_sync.shim", *arguments, folder=tmp_path)
        assert (exit_code, output) == (2, "")
        assert errors.splitlines() == [f"python -m trl_sync.shim: {said}"]


def test_help() -> None:
    exit_code, output, errors = _run("-m", "trl_sync.shim", "-h")
    assert (exit_code, errors) == (0, "")
    assert "script.py" in output
