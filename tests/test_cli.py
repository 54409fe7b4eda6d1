"""The command line: what it prints, and the exit codes that scripts rely on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny
from trl_sync import DesyncError, SyncAuditCallback, cli
from trl_sync.audit.faults import FAULTS
from trl_sync.audit.findings import Cause, Finding
from trl_sync.audit.journal import JOURNAL_NAME, Journal
from trl_sync.cli import demo, main

FROZEN = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command line in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["trl-sync", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        code = end.value.code
        return Outcome(code=code if isinstance(code, int) else 1, out=printed.out, err=printed.err)

    return run


def start(*arguments: str, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "trl_sync.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


class EditFrozen(TrainerCallback):
    """Writes to a frozen tensor right after an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            kwargs["model"].get_parameter(FROZEN).data[0, 0] += 1


def train(folder: Path, *, steps: int, resume: bool = False, edit_step: int = 0) -> None:
    """A short audited run on a frozen embedding, with a checkpoint every second step."""
    model = tiny.llama(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    model.get_parameter(FROZEN).requires_grad_(False)
    tokens = torch.randint(3, 64, (32, 8), generator=torch.Generator().manual_seed(5)).tolist()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        callbacks=[EditFrozen(edit_step), SyncAuditCallback(frozen_cover_steps=1)],
    )
    trainer.train(resume_from_checkpoint=resume or None)


@pytest.fixture(scope="module")
def healthy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, then two more after a resume from checkpoint-4."""
    folder = tmp_path_factory.mktemp("healthy")
    train(folder, steps=4)
    train(folder, steps=6, resume=True)
    return folder


@pytest.fixture(scope="module")
def desynced_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desynced")
    with pytest.raises(DesyncError, match="frozen_changed"):
        train(folder, steps=6, edit_step=3)
    return folder


@pytest.fixture
def checkpoint(healthy_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(healthy_run / "checkpoint-4", tmp_path / "checkpoint-4")


# help and usage


def test_help_comes_at_once_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; sys.argv = ['trl-sync', '--help']\n"
        "from trl_sync.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)))\n"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *_, heavy, processor_s = done.stdout.splitlines()
    assert heavy == "[]"
    assert float(processor_s) < 1  # 0.2 s on an idle machine; torch alone takes more than one
    assert all(command in done.stdout for command in ("demo", "report", "verify"))


def test_without_a_command_the_help_is_shown(call: Call) -> None:
    done = call()
    assert done.code == 2
    assert "Usage: " in done.out
    assert done.err == ""


@pytest.mark.parametrize("command", ["demo", "report", "verify", "env"])
def test_help_documents_the_exit_codes(call: Call, command: str) -> None:
    done = call(command, "--help")
    assert done.code == 0
    assert "Exit codes: 0" in done.out


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["rapport"], "rapport"),
        (["demo", "--faul", "none"], "--faul"),
        (["demo", "--seed", "one"], "--seed"),
        (["demo", "--seed", "-1"], "greater than or equal to 0"),
        (["report"], "RUN_DIR_OR_JOURNAL"),
        (["verify"], "CHECKPOINT"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(call: Call, arguments: list[str], named: str) -> None:
    done = call(*arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert named in done.err
    assert done.err.count("\n") == 1


def test_an_unknown_fault_names_the_near_ones(call: Call) -> None:
    done = call("demo", "--fault", "gradient_not_reducd")
    assert done.code == 2
    assert "gradient_not_reduced" in done.err
    assert done.err.startswith("error: no fault or cause is called 'gradient_not_reducd'")


# demo


def test_the_list_has_every_fault_with_its_cause(call: Call) -> None:
    done = call("demo", "--list")
    assert done.code == 0
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    for fault in FAULTS.values():
        assert fault.cause in rows[fault.name]
        assert fault.description in rows[fault.name]
        assert fault.seen_by in rows[fault.name]
        assert fault.on in rows[fault.name]


def test_a_cause_stands_for_its_first_fault() -> None:
    found = demo.find_fault("frozen_changed")
    assert found is not None
    assert found.name == "adapter_merged"
    assert demo.find_fault("none") is None


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    "fault, cause, on",
    [
        ("forward_unwrapped", "gradient_not_reduced", "all 2 CPU ranks, in update 3"),
        ("base_byte_changed", "frozen_changed", "rank 1 of 2 CPU ranks, in update 3"),
        # Those that end a process, or need a launch or a checkpoint of their own: the others stand
        # in tests/audit/test_fault_matrix.py.
        *(
            (f"{fault}_{place}", "rank_missing", "rank 1 of 2 CPU ranks, in update 3")
            for fault in ("killed", "delayed")
            for place in ("before_backward", "in_step", "before_audit")
        ),
        ("launched_alone", "not_distributed", "all 2 CPU ranks, before the first update"),
        ("byte_flipped", "manifest_mismatch", "in the checkpoint that 2 CPU ranks resume from"),
        ("shard_missing", "manifest_mismatch", "in the checkpoint that 2 CPU ranks resume from"),
        ("other_base", "manifest_mismatch", "2 CPU ranks"),
    ],
)
def test_a_planted_fault_is_named(fault: str, cause: str, on: str) -> None:
    done = start("demo", "--fault", fault)
    print(f"{fault}: {done.stdout.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"Planted  {fault}")
    assert lines[1].startswith("Where ")
    assert on in lines[1]
    assert f"See docs/errors.md#{cause}" in done.stdout
    assert lines[-1].startswith(f"named right: cause {cause}, ")


@pytest.mark.slow
@pytest.mark.ranks
def test_the_healthy_run_is_silent() -> None:
    done = start("demo", "--fault", "none", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sync audit: " in done.stdout
    assert "no desync" in done.stdout


FINDING: dict[str, Any] = {"cause": "stale_replica", "ranks": [1], "step": 3, "tensor": "a.b"}
NAMED = demo.RankOutcome(
    rank=0,
    exit_code=0,
    log="",
    planted={"rank": 1, "step": 3, "tensor": None},
    message="step 3 ...",
    findings=(FINDING,),
    after_ms=12.0,
    since="update 3 began",
    summary=None,
)
STRUCK = replace(NAMED, rank=1, planted={"rank": 1, "step": 3, "tensor": "a.b"})


def test_the_right_verdict_has_no_mistakes() -> None:
    assert demo.mistakes(FAULTS["step_skipped"], [NAMED, STRUCK], NAMED) == []


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"cause": "optimizer_diverged"}, "expected cause stale_replica, found optimizer_diverged"),
        ({"ranks": [0]}, "expected ranks [1], found [0]"),
        ({"step": 4}, "expected step 3 to 3, found 4"),
        ({"step": 2}, "expected step 3 to 3, found 2"),
        ({"tensor": "a.bc"}, "expected tensor a.b, found a.bc"),
    ],
)
def test_a_wrong_verdict_is_told(change: dict[str, Any], complaint: str) -> None:
    wrong = replace(NAMED, findings=({**FINDING, **change},))
    other = replace(STRUCK, findings=wrong.findings)
    assert demo.mistakes(FAULTS["step_skipped"], [wrong, other], wrong) == [complaint]


def test_a_rank_that_found_nothing_is_told() -> None:
    silent = replace(STRUCK, message=None, findings=())
    (complaint,) = demo.mistakes(FAULTS["step_skipped"], [NAMED, silent], NAMED)
    assert complaint == "rank 1 ended as if nothing had been found"


def test_the_list_as_json(call: Call) -> None:
    done = call("demo", "--list", "--json")
    assert done.code == 0
    faults = {fault["name"]: fault for fault in json.loads(done.out)}
    assert set(faults) == set(FAULTS)
    assert faults["step_skipped"]["cause"] == "stale_replica"
    assert faults["step_skipped"]["description"] == FAULTS["step_skipped"].description


def test_the_drill_as_json(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_ranks", lambda *_: [NAMED, STRUCK])
    done = call("demo", "--fault", "step_skipped", "--json")
    assert done.code == 0
    content = json.loads(done.out)
    assert content["planted"] == {"ranks": [1], "step": 3, "tensor": "a.b"}
    assert content["ranks"][1]["findings"] == [FINDING]
    assert content["mistakes"] == []
    healthy = call("demo", "--fault", "none", "--json")
    assert healthy.code == 1
    assert "rank 0 was not silent" in json.loads(healthy.out)["mistakes"][0]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_the_commands(shell: str) -> None:
    code = "import sys; sys.argv[0] = 'trl-sync'; from trl_sync.cli import main; main()"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"_TRL_SYNC_COMPLETE": f"source_{shell}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"_TRL_SYNC_COMPLETE=complete_{shell}" in done.stdout
    words = {"COMP_WORDS": "trl-sync re", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "trl-sync re"}
    environment |= words | {"_TRL_SYNC_COMPLETE": f"complete_{shell}"}
    environment |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "report" in done.stdout
    assert "verify" not in done.stdout


def test_completion_is_installed_for_the_shell_that_asks(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "trl-sync"
    program.write_text(f"#!{sys.executable}\nfrom trl_sync.cli import main\nmain()\n")
    program.chmod(0o755)
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{folder}:{os.environ['PATH']}"}
    for option in ("--show-completion", "--install-completion"):
        # Two commands, so that bash stays the parent process.
        done = subprocess.run(
            ["bash", "-c", f"trl-sync {option}; exit $?"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
    installed = tmp_path / ".bash_completions" / "trl-sync.sh"
    assert "complete -o default -F" in installed.read_text()
    assert str(installed) in (tmp_path / ".bashrc").read_text()


def ranks_of(group: int) -> list[str]:
    """Command lines of the processes in that group that are ranks of a drill."""
    found = [p for p in psutil.process_iter(["pid", "cmdline"]) if p.info["cmdline"]]
    return [
        " ".join(process.info["cmdline"])
        for process in found
        if "trl_sync.cli.demo_rank" in process.info["cmdline"]
        and psutil.pid_exists(process.pid)
        and os.getpgid(process.pid) == group
    ]


def test_an_interrupt_ends_with_code_130() -> None:
    command = [sys.executable, "-m", "trl_sync.cli", "demo"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Planted")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
        deadline_s = time.monotonic() + 30
        while ranks_of(process.pid) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert not ranks_of(process.pid)  # none goes on alone


def test_the_page_lists_every_command_with_its_flags_and_codes() -> None:
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    app = typer.main.get_command(cli.app)
    for name, command in app.commands.items():
        rows = [line for line in page.splitlines() if line.startswith(f"| `trl-sync {name}")]
        assert rows, name
        codes = re.findall(r"\b\d\b", re.split(r"Exit codes:", command.help or "")[-1])
        # 2 is said of all commands below the table.
        assert set(codes) - {"2"} <= set(re.findall(r"\b\d\b", " ".join(rows)))
        if name == "env":
            continue  # the sizes of --plan are on the page of memory
        flags = {o for p in command.params for o in p.opts if o.startswith("--")} - {"--json"}
        assert flags <= set(re.findall(r"--[a-z-]+", " ".join(rows))), name


def test_silence_on_a_fault_ends_with_code_1(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [replace(o, message=None, findings=(), log="its own words") for o in (NAMED, STRUCK)]
    monkeypatch.setattr(demo, "run_ranks", lambda *_: ranks)
    done = call("demo", "--fault", "step_skipped")
    assert done.code == 1
    assert "NOT named right: expected cause stale_replica" in done.out
    assert "its own words" in done.out


def test_an_alarm_in_a_healthy_run_ends_with_code_1(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run_ranks", lambda *_: [NAMED, STRUCK])
    done = call("demo", "--fault", "none")
    assert done.code == 1
    assert "NOT silent" in done.out


@pytest.mark.parametrize("cause", ["frozen_changed", "never_updated"])
def test_late_causes_have_a_later_last_update(cause: str) -> None:
    first, last = demo.named_between(Cause(cause), 3)
    assert first == 3
    assert last > 3


# report


def test_the_report_shows_both_runs_of_a_resumed_training(call: Call, healthy_run: Path) -> None:
    done = call("report", healthy_run)
    assert done.code == 0
    assert "2 runs" in done.out
    assert "Run 1 from step 0: 1 rank, engine NO, audited every step" in done.out
    assert "Run 2 from step 4" in done.out
    assert done.out.count("end      regular") == 2
    assert "checkpoint-4 (verified)" in done.out
    assert "\x1b" not in done.out  # plain text where there is no terminal


def test_the_report_as_json(call: Call, healthy_run: Path) -> None:
    done = call("report", healthy_run / JOURNAL_NAME, "--json")
    assert done.code == 0
    content = json.loads(done.out)
    first, second = content["runs"]
    assert content["desynced"] is False
    assert (first["first_step"], first["last_step"]) == (0, 4)
    assert (second["first_step"], second["last_step"]) == (4, 6)
    assert [save["step"] for save in first["saves"]] == [2, 4]
    assert all(save["verified"] for save in first["saves"])
    # The embedding of 64 tokens and 16 numbers of 4 bytes is frozen.
    assert first["begin"]["scopes"]["frozen"]["size_bytes"] == 64 * 16 * 4
    assert first["audits"] >= 5
    assert 0 < first["share_of_step"] < 1
    assert [resume["step"] for resume in second["resumes"]] == [4]


def test_a_desync_in_the_journal_ends_with_code_3(call: Call, desynced_run: Path) -> None:
    done = call("report", desynced_run)
    assert done.code == 3
    row = next(line for line in done.out.splitlines() if "frozen_changed" in line)
    assert FROZEN in row
    assert row.split()[0] == "4"
    content = json.loads(call("report", desynced_run, "--json").out)
    assert content["desynced"] is True
    (desync,) = content["runs"][0]["desyncs"]
    assert desync["findings"][0]["cause"] == "frozen_changed"
    assert content["runs"][0]["share_of_step"] is None


def test_a_cut_last_line_is_left_out(call: Call, healthy_run: Path, tmp_path: Path) -> None:
    text = (healthy_run / JOURNAL_NAME).read_text()
    journal = tmp_path / JOURNAL_NAME
    journal.write_text(text[: text.rindex('{"event": "end"') + 20])
    content = json.loads(call("report", tmp_path, "--json").out)
    assert [run["ended"] for run in content["runs"]] == [True, False]


@pytest.mark.parametrize("text", ["", '{"event": "be'])
def test_a_journal_without_events_is_an_error(call: Call, tmp_path: Path, text: str) -> None:
    (tmp_path / JOURNAL_NAME).write_text(text)
    done = call("report", tmp_path)
    assert done.code == 2
    assert f"{tmp_path / JOURNAL_NAME} holds no events" in done.err


def test_no_journal_is_an_error_that_names_the_path(
    call: Call, healthy_run: Path, tmp_path: Path
) -> None:
    for path in (tmp_path, tmp_path / "nothing", healthy_run / "checkpoint-4"):
        done = call("report", path)
        assert done.code == 2
        assert done.err.startswith("error: ")
        assert str(path) in done.err
    shutil.copytree(healthy_run, tmp_path / "run")
    assert f"there is {tmp_path / 'run' / JOURNAL_NAME}" in call("report", tmp_path).err


def test_another_file_is_no_journal(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a journal\nat all\n")
    done = call("report", file)
    assert done.code == 2
    assert f"{file}, line 1: not JSON" in done.err


def test_a_journal_of_another_version_is_an_error(call: Call, tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_text('{"event": "end", "audits": 3}\n')
    done = call("report", tmp_path)
    assert done.code == 2
    assert done.err.startswith(f"error: {tmp_path / JOURNAL_NAME} is not as this version writes it")
    assert "size_bytes" in done.err


def test_a_run_that_was_refused_at_once_is_shown(call: Call, tmp_path: Path) -> None:
    finding = Finding(cause=Cause.NOT_DISTRIBUTED, step=0, ranks=(0,))
    journal = Journal(tmp_path / JOURNAL_NAME)
    journal.write("desync", step=0, audit=0, findings=[finding.as_dict()], message="[alone]")
    journal.close()
    done = call("report", tmp_path)
    assert done.code == 3
    assert "Run 1: refused before its first audit" in done.out
    assert "not_distributed" in done.out


# verify


def test_a_checkpoint_as_it_was_saved_is_verified(call: Call, checkpoint: Path) -> None:
    done = call("verify", checkpoint)
    assert done.code == 0
    num_files = sum(path.is_file() for path in checkpoint.iterdir()) - 1  # without the manifest
    assert done.out.startswith(f"verified: {num_files} files, ")
    assert done.out.rstrip().endswith("step 4")
    content = json.loads(call("verify", checkpoint, "--json").out)
    assert content["verified"] is True
    assert content["problems"] == []
    assert content["files"] == num_files


def test_a_flipped_byte_is_a_problem_that_names_the_tensor(call: Call, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    done = call("verify", checkpoint)
    assert done.code == 1
    assert "model.safetensors: " in done.out
    (problem,) = json.loads(call("verify", checkpoint, "--json").out)["problems"]
    assert problem["kind"] == "changed"
    assert problem["place"] == "model.safetensors"
    assert problem["name"] is not None


def test_a_missing_file_is_a_problem(call: Call, checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()
    done = call("verify", checkpoint)
    assert done.code == 1
    assert "optimizer.pt" in done.out


def test_a_base_is_compared_on_demand(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    assert call("verify", checkpoint, "--base", checkpoint).code == 0
    other = tiny.llama(seed=7, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    other.save_pretrained(tmp_path / "other")
    done = call("verify", checkpoint, "--base", tmp_path / "other")
    assert done.code == 1
    assert FROZEN in done.out


def test_a_base_that_is_not_there_is_an_error(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    done = call("verify", checkpoint, "--base", tmp_path / "nowhere")
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert "nowhere" in done.err
    assert done.err.count("\n") == 1


def test_a_checkpoint_without_manifest_is_an_error(call: Call, checkpoint: Path) -> None:
    (checkpoint / "sync_manifest.json").unlink()
    done = call("verify", checkpoint)
    assert done.code == 2
    assert "sync_manifest.json does not exist" in done.err
    for path in (checkpoint / "nothing", checkpoint / "config.json"):
        done = call("verify", path)
        assert done.code == 2
        assert str(path) in done.err


def test_an_unverified_checkpoint_is_refused_with_its_reason(call: Call, tmp_path: Path) -> None:
    from trl_sync.audit.manifest import write_manifest

    (tmp_path / "weights.bin").write_bytes(b"abc")
    write_manifest(tmp_path, {}, step=7, world_size=2, verified=False, reason="ranks had parted")
    done = call("verify", tmp_path)
    assert done.code == 1
    assert "ranks had parted" in done.out
