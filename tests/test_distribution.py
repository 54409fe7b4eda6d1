"""The wheel and the sdist, built as for a release, installed and used in an empty environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
from trl_sync import __version__

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.timeout(900)]

PPO = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from datasets import Dataset
from trl_sync import PPOConfig, PPOTrainer, SyncAuditCallback

trainer = PPOTrainer(
    PPOConfig("out", total_episodes=16, per_device_train_batch_size=4, response_length=8,
              num_ppo_epochs=2, use_cpu=True, report_to="none"),
    AutoTokenizer.from_pretrained("base"),
    AutoModelForCausalLM.from_pretrained("base"),
    reward_model=lambda prompts, completions, **columns: [-float(len(c)) for c in completions],
    train_dataset=Dataset.from_dict({"prompt": ["a b c", "d e", "f", "g h"] * 4}),
)
trainer.add_callback(SyncAuditCallback())
trainer.train()
trainer.save_model()
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """What was built, and an environment that has the wheel and what it depends on, no more."""

    sdist: Path
    wheel: Path
    environment: Path

    def run(self, *command: str, cwd: Path, timeout_s: int = 300) -> str:
        """What a program of the environment printed; nothing of this checkout is on its path."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        clean["PATH"] = f"{self.environment / 'bin'}{os.pathsep}{clean['PATH']}"
        done = subprocess.run(
            [str(self.environment / "bin" / command[0]), *command[1:]],
            cwd=cwd, env=clean, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


def sources() -> list[str]:
    """What git tracks, or would: other things that lie about must not make a build work."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("distribution")
    source, built = folder / "source", folder / "dist"
    for name in sources():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--outdir", str(built), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [sdist], [wheel] = built.glob("*.tar.gz"), built.glob("*.whl")
    venv.create(folder / "empty", with_pip=True)
    pip = [str(folder / "empty/bin/pip"), "install", "--quiet", "--constraint", str(CONSTRAINTS)]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Installed(sdist, wheel, folder / "empty")


def test_the_version_comes_from_one_place(installed: Installed, tmp_path: Path) -> None:
    assert installed.wheel.name.startswith(f"trl_sync-{__version__}-py3-")
    assert installed.sdist.name == f"trl_sync-{__version__}.tar.gz"
    code = "import importlib.metadata, trl_sync; print(trl_sync.__version__, trl_sync.__file__, "
    code += "importlib.metadata.version('trl-sync'))"
    version, file, recorded = installed.run("python", "-c", code, cwd=tmp_path).split()
    assert version == recorded == __version__
    assert file.startswith(str(installed.environment))


def test_the_wheel_has_the_package_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "trl_sync").rglob("*.py")}
    of_package = {name for name in names if ".dist-info/" not in name}
    assert of_package == modules | {"trl_sync/py.typed"}


def test_the_sdist_has_recipes_documents_and_tests(installed: Installed) -> None:
    expected = {name for name in sources() if not name.startswith((".github/", ".gitignore"))}
    with tarfile.open(installed.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert expected - names == set()
    assert {"recipes/ppo.py", "docs/audit.md", "tests/conftest.py", "LICENSE"} <= names


def test_the_sdist_installs_what_the_wheel_does(installed: Installed, tmp_path: Path) -> None:
    options = ["--quiet", "--no-deps", "--target", str(tmp_path / "from_sdist")]
    installed.run("pip", "install", *options, str(installed.sdist), cwd=tmp_path)
    found = {
        str(path.relative_to(tmp_path / "from_sdist"))
        for path in (tmp_path / "from_sdist" / "trl_sync").rglob("*.py")
    }
    with zipfile.ZipFile(installed.wheel) as wheel:
        expected = {name for name in wheel.namelist() if name.endswith(".py")}
    assert found == expected


def test_dependencies_have_no_conflicts(installed: Installed, tmp_path: Path) -> None:
    assert "No broken requirements" in installed.run("pip", "check", cwd=tmp_path)


def test_a_desync_is_caught_from_the_wheel_alone(installed: Installed, tmp_path: Path) -> None:
    printed = installed.run("trl-sync", "demo", cwd=tmp_path)
    assert "Cause: gradient_not_reduced" in printed
    assert "named right" in printed
    assert not list(tmp_path.iterdir())


def test_the_environment_is_told(installed: Installed, tmp_path: Path) -> None:
    told = json.loads(installed.run("trl-sync", "env", "--json", cwd=tmp_path))
    assert __version__ in json.dumps(told)


def test_ppo_runs_from_the_wheel_alone(installed: Installed, tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "mine.py").write_text(textwrap.dedent(PPO))
    printed = installed.run("python", "mine.py", cwd=tmp_path)
    assert "no desync" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    report = installed.run("trl-sync", "report", "out", cwd=tmp_path)
    assert report


def test_a_recipe_of_the_sdist_runs(installed: Installed, tmp_path: Path) -> None:
    with tarfile.open(installed.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    recipe = source / "recipes" / "audit_demo.py"
    printed = installed.run(
        "accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", str(recipe), cwd=tmp_path,
    )  # fmt: skip
    assert "Cause: " in printed
