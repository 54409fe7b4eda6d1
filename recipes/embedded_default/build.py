"""The embedded default from the cache, or built into it: once, by one process, whole or not at all.

A build runs in a process of its own, into a folder with a temporary name, which is renamed when it
is complete. Processes that ask at the same time wait on a file lock and take what the first built.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from datasets import Dataset

PROGRESS = "embedded default"
MANIFEST = "complete.json"
PACKAGE_FOLDER = Path(__file__).resolve().parent
# What the bytes of the models depend on besides the source of this package.
DECISIVE_PACKAGES = ("torch", "transformers", "trl", "tokenizers", "datasets", "accelerate")
# A build is one process on one device, whatever launched the caller.
LAUNCHER_VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
     "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "CROSS_RANK", "CROSS_SIZE", "DS_ACCELERATOR",
     "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME"}
)  # fmt: skip
LAUNCHER_PREFIXES = (
    "ACCELERATE_", "TORCHELASTIC_", "TORCH_NCCL_", "NCCL_", "ROLE_", "FSDP_", "DEEPSPEED_",
    "PARALLELISM_CONFIG_", "MEGATRON_LM_", "CCL_", "OMPI_", "PMI_", "PMIX_", "MV2_", "I_MPI_",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How much the models learn from; the number of steps follows from it."""

    num_reviews: int
    num_pairs: int


PROFILES: Mapping[str, Profile] = {
    "full": Profile(num_reviews=22528, num_pairs=7168),
    # For tests of the cache: two steps each, so the models have learned nothing.
    "tiny": Profile(num_reviews=128, num_pairs=128),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedDefault:
    """What PPO starts from; both prompt sets have one text column, "prompt"."""

    model_path: Path
    reward_model_path: Path
    train_prompts: "Dataset"
    eval_prompts: "Dataset"


class BuildError(RuntimeError):
    """The embedded default could not be built; the message carries the end of the output."""


def embedded_default(
    cache_dir: Path | None = None, seed: int = 0, *, profile: str = "full"
) -> EmbeddedDefault:
    """The models and prompts of this seed, built first where the cache does not hold them.

    `cache_dir` defaults to `$TRL_SYNC_CACHE`, then to `trl_sync` in the XDG cache folder.
    Every rank may call this; one of them builds. Raises BuildError.
    """
    cache = cache_dir or default_cache_dir()
    folder = cache / f"embedded_default-{profile}-{fingerprint(seed)}"
    if not is_complete(folder):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{folder.name}.lock"):
                if not is_complete(folder):
                    _build(folder, seed, profile)
        except OSError as error:
            raise BuildError(
                f"cannot write the embedded default to {cache}: {error}. "
                "Set TRL_SYNC_CACHE to a folder that this user may write."
            ) from error
    return EmbeddedDefault(
        model_path=folder / "model",
        reward_model_path=folder / "reward_model",
        train_prompts=_read_rows(folder / "train_prompts.json"),
        eval_prompts=_read_rows(folder / "eval_prompts.json"),
    )


def default_cache_dir() -> Path:
    """`$TRL_SYNC_CACHE`, else `trl_sync` in `$XDG_CACHE_HOME`, else `~/.cache/trl_sync`."""
    if chosen := os.environ.get("TRL_SYNC_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "trl_sync"


def fingerprint(seed: int) -> str:
    """Sixteen hex digits that change with the seed, this package's source or a library's version.

    The device is not part of it: a build on another device differs in rounding, not in kind.
    """
    digest = hashlib.sha256(f"seed {seed}\n".encode())
    for path in sorted(PACKAGE_FOLDER.glob("*.py")):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    for package in DECISIVE_PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        digest.update(f"{package} {found}\n".encode())
    return digest.hexdigest()[:16]


def is_complete(folder: Path) -> bool:
    """True where the folder holds every file its manifest names, each of the size it names."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a build: as given, but of one process, one device and no network."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    paths = [str(PACKAGE_FOLDER.parent), environment.get("PYTHONPATH", "")]
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # With several GPUs in sight the trainers would wrap so small a model in DataParallel.
    kept["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    kept["HF_HUB_OFFLINE"] = "1"
    # On busy cores, threads that spin long before they sleep make a build ten times as long;
    # with this count an idle machine loses about a tenth.
    kept["GOMP_SPINCOUNT"] = "2000"
    kept["PYTHONUNBUFFERED"] = "1"
    return kept


def _build(folder: Path, seed: int, profile: str) -> None:
    """Fill the folder; the lock is held. What a killed build left behind is removed first."""
    for leftover in folder.parent.glob(f"{folder.name}.building-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.building-", dir=folder.parent))
    try:
        _report(f"building once, for later runs too, in {folder}")
        _run_build(temporary, seed, profile)
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
        (temporary / MANIFEST).write_text(json.dumps(sizes, indent=0), encoding="utf-8")
        if folder.exists():
            # Incomplete, or this build would not run: renaming needs the name free.
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run_build(folder: Path, seed: int, profile: str) -> None:
    """Run the build process, pass its progress on, and raise BuildError where it fails."""
    command = [sys.executable, "-P", "-m", __package__ or "embedded_default"]
    command += ["--into", str(folder), "--seed", str(seed), "--profile", profile]
    tail: deque[str] = deque(maxlen=30)
    with subprocess.Popen(
        command,
        env=child_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                tail.append(line)
                if line.startswith(PROGRESS):
                    _report(line.removeprefix(PROGRESS).strip())
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise BuildError(
            f"building the embedded default failed with exit code {process.returncode} "
            f"({' '.join(command)}). Its last lines:\n{''.join(tail)}"
        )


def _report(text: str) -> None:
    print(f"{PROGRESS} {text}", file=sys.stderr, flush=True)


def _read_rows(path: Path) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list(json.loads(path.read_text(encoding="utf-8")))
