"""A kill during saving leaves whole checkpoints only, whenever it comes."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

import runs
import tiny
from forked_saves import Child, contents, put_back, save, save_until
from trl_sync import SyncAuditCallback
from trl_sync.audit.manifest import MANIFEST_NAME
from trl_sync.ppo.resume_checks import missing_files

RANDOM_KILLS = 50


class Warm:
    """A trainer after its run, the checkpoints 8 and 12 of it, and what a whole save adds."""

    def __init__(self, folder: Path) -> None:
        self.out, self.backup = folder / "out", folder / "backup"
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
        self.trainer = runs.train(folder, **options)
        shutil.copytree(self.out, self.backup)
        self.whole = self.checkpoints()
        for step in (12, 16):
            put_back(self.backup, self.out)
            assert Child(lambda step=step: save(self.trainer, step)).wait() == "None"
            name = f"checkpoint-{step}"
            self.whole[name] = contents(self.out / name)
        self.first_12 = contents(self.backup / "checkpoint-12")

    def checkpoints(self) -> dict[str, dict[str, bytes]]:
        return {path.name: contents(path) for path in self.out.glob("checkpoint-*")}

    def check(self, step: int) -> str:
        """That what the kill left is whole; returns what it left, before anything is tidied up."""
        found = self.checkpoints()
        leftovers = [path.name.split("-")[0] for path in self.out.glob("_*")]
        for name, files in found.items():
            assert missing_files(self.out / name) == [], name
            as_before = name == "checkpoint-12" and files == self.first_12
            assert as_before or files == self.whole[name], name
        folder = Path(self.trainer._checkpoint_to_resume(True))
        assert folder.name in ("checkpoint-12", f"checkpoint-{step}")
        # Nothing is lost: what has no name for a moment got it back.
        assert {"checkpoint-12"} <= {*self.checkpoints()}
        return " ".join(sorted(found) + sorted(leftovers))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Warm:
    return Warm(tmp_path_factory.mktemp("warm"))


@pytest.mark.parametrize("step", [16, 12], ids=["new", "again"])
def test_a_kill_at_any_file_operation_leaves_whole_checkpoints(warm: Warm, step: int) -> None:
    moment, states = 0, set()
    while True:
        put_back(warm.backup, warm.out)
        moment += 1
        done = Child(lambda m=moment: save_until(warm.trainer, step, warm.out, m)).wait()
        states.add(warm.check(step))
        if done:
            break
    assert int(done) == moment - 1 >= 60, done
    during = {
        16: {
            "checkpoint-12 checkpoint-8 _incomplete",
            "checkpoint-12 checkpoint-16 checkpoint-8 _incomplete",
            "checkpoint-12 checkpoint-16 checkpoint-8",
            "checkpoint-12 checkpoint-16 _deleted",
            "checkpoint-12 checkpoint-16",
        },
        12: {
            "checkpoint-12 checkpoint-8 _incomplete",
            "checkpoint-12 checkpoint-8 _incomplete _replaced",
            "checkpoint-8 _incomplete _replaced",
            "checkpoint-12 checkpoint-8",
        },
    }
    assert states == during[step] | {"checkpoint-12 checkpoint-8"}


@pytest.mark.parametrize("step", [16, 12], ids=["new", "again"])
def test_a_kill_at_any_time_leaves_whole_checkpoints(warm: Warm, step: int) -> None:
    put_back(warm.backup, warm.out)
    started_s = time.perf_counter()
    assert Child(lambda: save(warm.trainer, step)).wait() == "None"
    duration_s = time.perf_counter() - started_s
    generator, landed = random.Random(step), 0
    for _ in range(10 * RANDOM_KILLS):
        put_back(warm.backup, warm.out)
        child = Child(lambda: save(warm.trainer, step))
        landed += child.kill_after(generator.uniform(0, duration_s))
        warm.check(step)
        if landed == RANDOM_KILLS:
            break
    assert landed == RANDOM_KILLS


def test_what_kills_left_is_tidied_up_at_the_next_save(warm: Warm) -> None:
    put_back(warm.backup, warm.out)
    for name in ("incomplete-checkpoint-4", "deleted-checkpoint-4", "replaced-checkpoint-12"):
        shutil.copytree(warm.out / "checkpoint-12", warm.out / f"_{name}")
    (warm.out / "checkpoint-8").rename(warm.out / "_replaced-checkpoint-8")
    warm.trainer.args.save_total_limit = None
    assert Child(lambda: save(warm.trainer, 16)).wait() == "None"
    warm.trainer.args.save_total_limit = 2
    names = sorted(path.name for path in warm.out.glob("*-*"))
    assert names == ["checkpoint-12", "checkpoint-16", "checkpoint-8"]
    assert contents(warm.out / "checkpoint-8") == contents(warm.backup / "checkpoint-8")


def test_a_replaced_checkpoint_is_resumed(warm: Warm, tmp_path: Path) -> None:
    """As a kill leaves it between the two renames."""
    shutil.copytree(warm.backup, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-12")
    (tmp_path / "out" / "checkpoint-8").rename(tmp_path / "out" / "_replaced-checkpoint-8")
    resumed = runs.make(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert runs.rows(resumed)[7]["step"] == 8
    assert runs.same(runs.trained(resumed), runs.trained(warm.trainer))


def test_a_checkpoint_without_a_manifest_is_continued_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a kill leaves it that comes after the save and before the audit looked at it."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    runs.train(tmp_path, callbacks=[SyncAuditCallback()], total_episodes=32, **options)
    assert missing_files(tmp_path / "out" / "checkpoint-8") == []
    (tmp_path / "out" / "checkpoint-8" / MANIFEST_NAME).unlink()
    resumed = runs.make(tmp_path, callbacks=[SyncAuditCallback()], **options)
    resumed.train(resume_from_checkpoint=True)
    assert f"resumed at step 8 without a {MANIFEST_NAME}" in caplog.text
    assert (tmp_path / "out" / "checkpoint-12" / MANIFEST_NAME).is_file()


def test_what_a_full_disk_does(warm: Warm) -> None:
    """No file may become larger than half of the optimizer's."""
    put_back(warm.backup, warm.out)
    limit = (warm.out / "checkpoint-12" / "optimizer.pt").stat().st_size // 2

    def save_on_a_full_disk(step: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(warm.trainer, step)

    before = warm.checkpoints()
    for step in (16, 12):
        said = Child(lambda step=step: save_on_a_full_disk(step)).wait()
        assert said.startswith(f"CheckpointError: {warm.out}/checkpoint-{step} could not be saved")
        assert "Free space or make the folder writable, then resume." in said
        assert warm.checkpoints() == before
        assert list(warm.out.glob("_*")) == []


def test_an_output_folder_that_is_none(warm: Warm) -> None:
    put_back(warm.backup, warm.out)
    shutil.rmtree(warm.out)
    warm.out.write_text("a file")
    said = Child(lambda: save(warm.trainer, 16)).wait()
    warm.out.unlink()
    warm.out.mkdir()
    assert said.startswith(f"CheckpointError: {warm.out}/checkpoint-16 could not be saved: FileE")


def test_callbacks_and_the_state_know_the_final_folder(tmp_path: Path) -> None:
    seen: list[tuple[int, list[str], str]] = []

    def look(state: Any, control: Any) -> None:
        names = sorted(path.name for path in (tmp_path / "out").glob("*-*"))
        seen.append((state.global_step, names, state.best_model_checkpoint))

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "eval_steps": 4}
    trainer = runs.train(
        tmp_path,
        callbacks=[runs.At("on_save", look)],
        eval_prompts=tiny.prompts(8),
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="objective/response_length",
        save_total_limit=1,
        **options,
    )
    evaluations = runs.rows(trainer, "eval_objective/response_length")
    lengths = [row["eval_objective/response_length"] for row in evaluations]
    for step, names, best in seen:
        done = lengths[: step // 4]
        best_step = 4 * (1 + done.index(max(done)))
        assert best == str(tmp_path / "out" / f"checkpoint-{best_step}")
        # The best one and the last one stay.
        assert names == sorted({f"checkpoint-{n}" for n in (best_step, step)})
    assert [step for step, *_ in seen] == [4, 8, 12]
    last = json.loads((Path(seen[-1][2]) / "trainer_state.json").read_text())
    assert last["best_model_checkpoint"] == seen[-1][2]
    assert last["best_global_step"] == int(seen[-1][2].rpartition("-")[2])


def test_an_upload_begins_under_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[str, bool]] = []

    def push(self: Any, folder: str) -> None:
        pushed.append((folder, missing_files(Path(folder)) == []))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = runs.train(tmp_path)
    trainer.args.push_to_hub = True
    save(trainer, 12)
    assert pushed == [(str(tmp_path / "out" / "checkpoint-12"), True)]


def test_only_numbered_checkpoints_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-best").mkdir(parents=True)
    (tmp_path / "out" / "_incomplete-notes").mkdir()
    runs.train(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=1)
    names = sorted(path.name for path in (tmp_path / "out").glob("*-*"))
    assert names == ["_incomplete-notes", "checkpoint-12", "checkpoint-best"]
