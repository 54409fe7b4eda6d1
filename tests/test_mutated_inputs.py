"""Files that somebody else made, damaged in every way: what is read still loads or is refused.

Refused means: an error of this package that says what is wrong, in time, with nothing written.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

import inputs
import tiny
from mutated_files import (
    BYTES,
    JSON,
    SAFETENSORS,
    Mutation,
    tree,
    write_mutated,
)
from trl_sync import PPOTrainer, SyncAuditCallback
from trl_sync.audit.manifest import MANIFEST_NAME, write_manifest
from trl_sync.audit.manifest_format import own_checksum
from trl_sync.backbone.loading import initialise_value, load_reward_model, load_shared_backbone
from trl_sync.backbone.model_files import load_weights, save_weights
from trl_sync.backbone.reward_adapter import can_share_a_base
from trl_sync.cli import main
from trl_sync.cli.report import show_report
from trl_sync.errors import AuditError, CheckpointError, ConfigError, RewardError
from trl_sync.ppo.prompts import PromptDataset
from trl_sync.ppo.resume_checks import last_whole_checkpoint
from trl_sync.value_head_files import read_score_head, read_value_head, write_value_head

pytestmark = [
    # Warnings are no errors for users.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(10, func_only=True),
]

ROOT = Path(__file__).parent.parent
OWN_ERRORS = (ConfigError, AuditError, RewardError)
SEEDS = (0, 1, 2)
# What tokenizing writes beside a dataset of Arrow files.
MAY_APPEAR = re.compile(r"/cache-\w+\.arrow$")


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names of models that a mutation made up are looked up nowhere, and the cache is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@contextlib.contextmanager
def loads_or_is_refused(folder: Path) -> Iterator[None]:
    """The block ends well or with an error of this package, and `folder` is as it was."""
    before = tree(folder)
    refusal = "nothing was wrong with it"
    try:
        yield
    except OWN_ERRORS as error:
        refusal = str(error)
    assert 20 < len(refusal) < 3000
    after = tree(folder)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in set(after) - set(before) if not MAY_APPEAR.search(path)]


def cases(*sources: dict[str, Mutation], seeds: tuple[int, ...] = (0,)) -> Any:
    """Every mutation with every seed."""
    named = [(name, mutation) for source in sources for name, mutation in source.items()]
    return pytest.mark.parametrize(
        "mutation, seed",
        [
            pytest.param(mutation, seed, id=f"{name}-{seed}")
            for name, mutation in named
            for seed in seeds
        ],
    )


def mutated_copy(source: Path, folder: Path, name: str, mutation: Mutation, seed: int) -> Path:
    """A copy of `source` in which the file `name` is damaged."""
    shutil.copytree(source, folder)
    write_mutated(folder / name, mutation, seed)
    return folder


# Journals and manifests, on the command line.


def command(capsys: Any, monkeypatch: Any, *arguments: Any) -> int:
    """The exit code of `trl-sync`, which says at most one line of what went wrong."""
    monkeypatch.setattr(sys, "argv", ["trl-sync", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    said = capsys.readouterr()
    if code == 2:
        assert said.err.startswith("error: ")
        assert len(said.err.splitlines()) == 1
    else:
        assert not said.err
    assert isinstance(code, int)
    return code


def finding(**changes: Any) -> dict[str, Any]:
    fields = {"cause": "stale_replica", "step": 3, "ranks": [1], "scope": "trainable"}
    fields |= {"tensor": "body.weight", "role": "policy", "fatal": True, "evidence": "it stood"}
    return fields | changes


JOURNAL: list[dict[str, Any]] = [
    {"event": "begin", "time_s": 1.0, "version": "0", "step": 0, "world_size": 2}
    | {"engine": "MULTI_CPU", "every_steps": 1, "on_desync": "repair"}
    | {"scopes": {"frozen": {"status": "audited", "tensors": 5, "size_bytes": 1234}}},
    {"event": "audit", "step": 1, "audit": 2, "size_bytes": 10, "seconds": 0.5, "roots": {}},
    {"event": "warning", **finding(cause="buffers_differ", step=2, fatal=False)},
    {"event": "desync", "step": 3, "audit": 4, "action": "repair", "findings": [finding()]},
    {"event": "repair", "step": 3, "audit": 4},
    {"event": "save", "step": 4, "folder": "checkpoint-4", "verified": True},
    {"event": "resume", "step": 4, "folder": "checkpoint-4", "verified": True},
    {"event": "end", "audits": 5, "desyncs": 1, "size_bytes": 50, "seconds": 2.5}
    | {"share_of_step": 0.01},
]


def mutated_journal(mutation: Mutation, seed: int) -> bytes:
    """The journal with one line changed, or all of it."""
    lines = [json.dumps(line).encode() for line in JOURNAL]
    if mutation in BYTES.values():
        return mutation(b"\n".join(lines) + b"\n", Random(seed))
    number = Random(seed).randrange(len(lines))
    lines[number] = mutation(lines[number], Random(seed))
    return b"\n".join(lines) + b"\n"


@cases(BYTES, JSON, seeds=(0, 1))
def test_report(
    tmp_path: Path, capsys: Any, monkeypatch: Any, mutation: Mutation, seed: int
) -> None:
    journal = tmp_path / "sync_audit.jsonl"
    journal.write_bytes(mutated_journal(mutation, seed))
    with loads_or_is_refused(tmp_path):
        codes = {
            command(capsys, monkeypatch, "report", journal),
            command(capsys, monkeypatch, "report", "--json", "--no-html", tmp_path),
        }
    assert codes <= {0, 2, 3}


def test_an_intact_journal_is_read(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    journal = tmp_path / "sync_audit.jsonl"
    journal.write_bytes(mutated_journal(lambda content, random: content, 0))
    assert command(capsys, monkeypatch, "report", journal) == 3


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["value up", "value half a character", "name lines"])
def test_a_page_is_written_into_its_folder_only(
    tmp_path: Path, capsys: Any, monkeypatch: Any, name: str, seed: int
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "sync_audit.jsonl").write_bytes(mutated_journal(JSON[name], seed))
    before = tree(tmp_path)
    assert command(capsys, monkeypatch, "report", run) in (0, 2, 3)
    after = tree(tmp_path)
    assert all(after[path] == content for path, content in before.items())
    assert set(after) - set(before) <= {"run/report.html"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards with an index and a manifest, beside the base it belongs to."""
    parent = tmp_path_factory.mktemp("manifest")
    folder, base = parent / "checkpoint-4", parent / "base"
    folder.mkdir()
    base.mkdir()
    frozen = {f"model.{n}.weight": torch.arange(6.0) + n for n in range(4)}
    save_file(frozen, base / "model.safetensors")
    trained = {f"lora_{n}": torch.full((2, 3), float(n)) for n in range(4)}
    for number, shard in enumerate(("model-1.safetensors", "model-2.safetensors")):
        names = [f"lora_{2 * number}", f"lora_{2 * number + 1}"]
        save_file({n: trained[n] for n in names}, folder / shard)
    shards = {f"lora_{n}": f"model-{1 + n // 2}.safetensors" for n in range(4)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "value").mkdir()
    (folder / "value" / "notes.txt").write_text("of the value model")
    scopes = {"trainable": trained.items(), "frozen": frozen.items()}
    write_manifest(folder, scopes, step=4, world_size=2, verified=True)
    return parent


def signed(mutation: Mutation) -> Mutation:
    """The mutation, with the checksum that a forger would write."""

    def mutate(content: bytes, random: Random) -> bytes:
        changed = mutation(content, random)
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            value = json.loads(changed)
            checksum = json.loads(content)["checksum"]
            return changed.replace(checksum.encode(), own_checksum(value).encode())
        return changed

    return mutate


SIGNED = {f"signed {name}": signed(mutation) for name, mutation in JSON.items()}


def check_verify(
    run: Callable[..., int], source: Path, tmp_path: Path, file: str, mutation: Any, seed: int
) -> None:
    folder = tmp_path / "copies"
    mutated_copy(source, folder, file, mutation, seed)
    own = folder / "checkpoint-4"
    with loads_or_is_refused(tmp_path):
        codes = {run("verify", "--base", folder / "base", own)}
    assert codes <= {0, 1, 2}


@pytest.fixture
def run(capsys: Any, monkeypatch: Any) -> Callable[..., int]:
    return lambda *arguments: command(capsys, monkeypatch, *arguments)


MANIFEST = f"checkpoint-4/{MANIFEST_NAME}"


@cases(BYTES, JSON)
def test_verify_manifest(
    run: Any, checkpoint: Path, tmp_path: Path, mutation: Any, seed: int
) -> None:
    check_verify(run, checkpoint, tmp_path, MANIFEST, mutation, seed)


@cases(SIGNED)
def test_verify_forged_manifest(
    run: Any, checkpoint: Path, tmp_path: Path, mutation: Any, seed: int
) -> None:
    check_verify(run, checkpoint, tmp_path, MANIFEST, mutation, seed)


@cases(BYTES, SAFETENSORS)
def test_verify_weights(
    run: Any, checkpoint: Path, tmp_path: Path, mutation: Any, seed: int
) -> None:
    check_verify(run, checkpoint, tmp_path, "checkpoint-4/model-1.safetensors", mutation, seed)


@cases(BYTES, JSON)
def test_verify_index(run: Any, checkpoint: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    file = "checkpoint-4/model.safetensors.index.json"
    check_verify(run, checkpoint, tmp_path, file, mutation, seed)


@cases(BYTES, SAFETENSORS)
def test_verify_base(run: Any, checkpoint: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    check_verify(run, checkpoint, tmp_path, "base/model.safetensors", mutation, seed)


# Adapters.

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `sft` and `reward`: a model, and two adapters trained on it."""
    parent = tmp_path_factory.mktemp("adapters")
    base = str(parent / "base")
    tiny.llama(**SIZES).save_pretrained(base)
    options: dict[str, Any] = {"r": 2, "target_modules": TARGETS}
    sft = get_peft_model(tiny.llama(**SIZES), LoraConfig(task_type="CAUSAL_LM", **options))
    sft.peft_config["default"].base_model_name_or_path = base
    sft.save_pretrained(str(parent / "sft"), save_embedding_layers=False)
    scored = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    reward = get_peft_model(scored, LoraConfig(task_type="SEQ_CLS", **options))
    reward.save_pretrained(str(parent / "reward"))
    return parent


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_sft(adapters: Path, tmp_path: Path, file: str, mutation: Any, seed: int) -> None:
    folder = mutated_copy(adapters / "sft", tmp_path / "sft", file, mutation, seed)
    with loads_or_is_refused(tmp_path):
        load_shared_backbone(str(folder))


def check_reward(adapters: Path, tmp_path: Path, file: str, mutation: Any, seed: int) -> None:
    folder = str(mutated_copy(adapters / "reward", tmp_path / "reward", file, mutation, seed))
    backbone = load_shared_backbone(
        str(adapters / "base"), LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    for read in (
        lambda: can_share_a_base(folder),
        lambda: backbone.add_reward_adapter(folder),
        lambda: initialise_value(backbone, folder),
        lambda: load_reward_model(folder),
        lambda: read_score_head(folder, {}),
    ):
        with loads_or_is_refused(tmp_path):
            read()
    if not backbone.has_reward:
        # What was refused left nothing behind.
        backbone.add_reward_adapter(str(adapters / "reward"))


def test_intact_adapters_load(adapters: Path) -> None:
    backbone = load_shared_backbone(str(adapters / "sft"), reward_adapter=str(adapters / "reward"))
    assert backbone.has_reward
    assert can_share_a_base(str(adapters / "reward"))


@cases(BYTES, JSON)
def test_sft_adapter_options(adapters: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    check_sft(adapters, tmp_path, CONFIG, mutation, seed)


@cases(BYTES, SAFETENSORS)
def test_sft_adapter_weights(adapters: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    check_sft(adapters, tmp_path, WEIGHTS, mutation, seed)


@cases(BYTES, JSON)
def test_reward_adapter_options(adapters: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    check_reward(adapters, tmp_path, CONFIG, mutation, seed)


@cases(BYTES, SAFETENSORS)
def test_reward_adapter_weights(adapters: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    check_reward(adapters, tmp_path, WEIGHTS, mutation, seed)


OPTIONS = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "bias")
OPTIONS += ("target_modules", "exclude_modules", "modules_to_save", "peft_type", "task_type")
OPTIONS += ("base_model_name_or_path", "layers_to_transform", "init_lora_weights", "use_rslora")
WRONG: dict[str, Any] = {"null": None, "object": {"x": [1]}, "list": [[]], "minus": -1}
WRONG |= {"huge": 10**15, "infinite": float("inf"), "text": "((("}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("wrong", WRONG)
def test_each_option_of_an_adapter(adapters: Path, tmp_path: Path, option: str, wrong: str) -> None:
    def mutation(content: bytes, random: Random) -> bytes:
        return json.dumps(json.loads(content) | {option: WRONG[wrong]}).encode()

    check_sft(adapters, tmp_path, CONFIG, mutation, 0)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_folder_in_place_of_a_file(adapters: Path, tmp_path: Path, kind: str, file: str) -> None:
    folder = shutil.copytree(adapters / kind, tmp_path / kind)
    (folder / file).unlink()
    (folder / file).mkdir()
    base = str(adapters / "base")
    if kind == "sft" and file == WEIGHTS:
        with loads_or_is_refused(tmp_path), pytest.raises(ConfigError, match=WEIGHTS):
            load_shared_backbone(str(folder))
    elif kind == "reward":
        with loads_or_is_refused(tmp_path), pytest.raises(ConfigError):
            load_shared_backbone(base, reward_adapter=str(folder))


# Value heads.


@pytest.fixture(scope="module")
def value_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`own`: both files of a value head; `whole`: a sharded model that holds one."""
    parent = tmp_path_factory.mktemp("value heads")
    head = {"v_head.summary.weight": torch.ones(1, 8), "v_head.summary.bias": torch.zeros(1)}
    write_value_head(parent / "own", head, for_trl=True)
    (parent / "whole").mkdir()
    save_file(head, parent / "whole" / "model-2.safetensors")
    shards = dict.fromkeys(head, "model-2.safetensors") | {"lm_head": "model-1.safetensors"}
    index = parent / "whole" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    return parent


def check_value_head(source: Path, tmp_path: Path, file: str, mutation: Any, seed: int) -> None:
    folder = mutated_copy(source, tmp_path / "copy", file, mutation, seed)
    with loads_or_is_refused(tmp_path):
        state = read_value_head(str(folder), {})
        assert all(isinstance(tensor, torch.Tensor) for tensor in (state or {}).values())


@cases(BYTES, SAFETENSORS)
def test_value_head(value_heads: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    check_value_head(value_heads / "own", tmp_path, "v_head.safetensors", mutation, seed)


@cases(BYTES, seeds=SEEDS)
def test_value_head_of_trl(value_heads: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    check_value_head(value_heads / "own", tmp_path, "pytorch_model.bin", mutation, seed)


@cases(BYTES, JSON)
def test_value_head_index(value_heads: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    file = "model.safetensors.index.json"
    check_value_head(value_heads / "whole", tmp_path, file, mutation, seed)


class Trap:
    """What runs a program when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("content", [Trap(), [1, 2], {"v_head.summary.weight": "x"}, {3: 4}])
def test_value_head_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with loads_or_is_refused(tmp_path), pytest.raises(CheckpointError) as refusal:
        read_value_head(str(tmp_path), {})
    # Torch advises to read such a file all the same.
    assert "weights_only" not in str(refusal.value)
    assert not (tmp_path / "sprung").exists()


# Checkpoints of PPO.


@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with adaptive KL and score scaling, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("ppo")
    make_trainer(folder).train()
    return folder


def make_trainer(folder: Path, *, episodes: int = 16) -> PPOTrainer:
    config = tiny.config(
        folder / "out",
        save_strategy="steps",
        save_steps=4,
        total_episodes=episodes,
        kl_target=1.0,
        use_score_scaling=True,
    )
    return PPOTrainer(
        config,
        tiny.tokenizer(),
        tiny.llama(hidden_size=16, intermediate_size=16, num_hidden_layers=1),
        reward_model=lambda prompts, completions: [float(len(text)) for text in completions],
        train_dataset=tiny.prompts(),
        peft_config=LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )


class LoadedError(Exception):
    """The training that was resumed comes to its first step."""


class StopsThere(TrainerCallback):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        raise LoadedError


@pytest.fixture(scope="module")
def trainer(ppo: Path) -> PPOTrainer:
    trainer = make_trainer(ppo, episodes=32)  # one more iteration than the checkpoint has
    trainer.add_callback(StopsThere())
    return trainer


CHECKPOINT = "out/checkpoint-4"


def check_resume(
    trainer: PPOTrainer,
    ppo: Path,
    tmp_path: Path,
    file: str,
    mutation: Any,
    seed: int = 0,
    *,
    with_sizes: bool = True,
) -> None:
    run = mutated_copy(ppo, tmp_path / "run", f"{CHECKPOINT}/{file}", mutation, seed)
    state = run / CHECKPOINT / "ppo_state.json"
    if not with_sizes:
        # As versions wrote it that did not notice a file cut short by its size.
        content = json.loads(state.read_text())
        del content["sizes"]
        state.write_text(json.dumps(content))
    other = tmp_path / "other"
    trainer.args.output_dir = str(other)
    with loads_or_is_refused(run), contextlib.suppress(LoadedError):
        trainer.train(resume_from_checkpoint=str(run / CHECKPOINT))
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "other"}
    assert set(tree(other)) <= {"run_record.json"}
    trainer.args.output_dir = str(run / "out")
    with loads_or_is_refused(run):
        last_whole_checkpoint(trainer.args)


def test_an_intact_checkpoint_is_resumed(trainer: PPOTrainer, ppo: Path) -> None:
    with pytest.raises(LoadedError):
        trainer.train(resume_from_checkpoint=str(ppo / CHECKPOINT))
    assert trainer.state.global_step == 4


@cases(BYTES, JSON)
def test_ppo_state(trainer: Any, ppo: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    check_resume(trainer, ppo, tmp_path, "ppo_state.json", mutation, seed)


@cases(BYTES, JSON)
def test_trainer_state(trainer: Any, ppo: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    check_resume(trainer, ppo, tmp_path, "trainer_state.json", mutation, seed)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@cases(BYTES)
def test_ppo_tensors(
    trainer: Any, ppo: Path, tmp_path: Path, file: str, mutation: Any, seed: int
) -> None:
    check_resume(trainer, ppo, tmp_path, file, mutation, seed, with_sizes=False)


@pytest.mark.parametrize("file", ["value/value_head.safetensors", WEIGHTS])
@cases(BYTES, SAFETENSORS)
def test_ppo_weights(
    trainer: Any, ppo: Path, tmp_path: Path, file: str, mutation: Any, seed: int
) -> None:
    check_resume(trainer, ppo, tmp_path, file, mutation, seed, with_sizes=False)


WRONG_NUMBERS: dict[str, Any] = {"text": "../../x", "format": "%s", "list": [4], "object": {"a": 4}}
WRONG_NUMBERS |= {"true": True, "minus": -4, "huge": 10**400, "null": None}


@pytest.mark.parametrize("wrong", WRONG_NUMBERS)
@pytest.mark.parametrize(
    "file, field",
    [("trainer_state.json", n) for n in ("global_step", "max_steps", "stateful_callbacks")]
    + [("ppo_state.json", n) for n in ("world_size", "batch_size", "sizes", "files", "state")],
)
def test_each_field_of_a_state_is_checked(
    trainer: Any, ppo: Path, tmp_path: Path, file: str, field: str, wrong: str
) -> None:
    run = shutil.copytree(ppo, tmp_path / "run")
    content = json.loads((run / CHECKPOINT / file).read_text())
    (run / CHECKPOINT / file).write_text(json.dumps(content | {field: WRONG_NUMBERS[wrong]}))
    trainer.args.output_dir = str(run / "out")
    with (
        loads_or_is_refused(tmp_path),
        pytest.raises(CheckpointError, match="not a whole checkpoint"),
    ):
        trainer.train(resume_from_checkpoint=str(run / CHECKPOINT))


@pytest.mark.parametrize("numbers", [{"world_size": 1 << 62}, {"batch_size": 1 << 62}])
def test_huge_numbers_are_not_counted_up_to(
    trainer: Any, ppo: Path, tmp_path: Path, numbers: dict[str, int]
) -> None:
    run = shutil.copytree(ppo, tmp_path / "run")
    state = run / CHECKPOINT / "ppo_state.json"
    content = json.loads(state.read_text())
    del content["sizes"]
    state.write_text(json.dumps(content | {"world_size": 2} | numbers))
    with loads_or_is_refused(tmp_path), pytest.raises(CheckpointError):
        trainer.train(resume_from_checkpoint=str(run / CHECKPOINT))


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, as a checkpoint of separate models has it."""
    folder = tmp_path_factory.mktemp("separate")
    save_weights(tiny.llama(**SIZES), folder)
    return folder


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@cases(BYTES, JSON)
def test_settings_of_a_whole_model(
    separate: Path, tmp_path: Path, file: str, mutation: Any, seed: int
) -> None:
    folder = mutated_copy(separate, tmp_path / "model", file, mutation, seed)
    with loads_or_is_refused(tmp_path):
        load_weights(tiny.llama(**SIZES), folder)


@cases(BYTES, SAFETENSORS)
def test_weights_of_a_whole_model(separate: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    folder = mutated_copy(separate, tmp_path / "model", "model.safetensors", mutation, seed)
    with loads_or_is_refused(tmp_path):
        load_weights(tiny.llama(**SIZES), folder)


# Datasets.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same prompts in each format that recipes read."""
    folder = tmp_path_factory.mktemp("data")
    prompts = tiny.prompts(8)
    prompts.to_json(folder / "prompts.jsonl")
    (folder / "prompts.json").write_text(json.dumps(prompts.to_list()))
    prompts.to_csv(folder / "prompts.csv", index=False)
    prompts.to_parquet(folder / "prompts.parquet")
    prompts.save_to_disk(folder / "saved")
    return folder


def check_dataset(path: Path, folder: Path) -> None:
    with loads_or_is_refused(folder):
        loaded = inputs.load_local(path)
        rows = loaded if isinstance(loaded, Dataset) else loaded["train"]
        PromptDataset(rows, tiny.tokenizer(), max_prompt_tokens=64, response_length=8)


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.parquet", "prompts.csv"])
@cases(BYTES)
def test_dataset(data: Path, tmp_path: Path, name: str, mutation: Any, seed: int) -> None:
    folder = mutated_copy(data, tmp_path / "data", name, mutation, seed)
    check_dataset(folder / name, folder)


@cases(JSON)
def test_dataset_of_json(data: Path, tmp_path: Path, mutation: Any, seed: int) -> None:
    folder = mutated_copy(data, tmp_path / "data", "prompts.json", mutation, seed)
    check_dataset(folder / "prompts.json", folder)


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json"])
@cases(JSON)
def test_dataset_on_disk(data: Path, tmp_path: Path, file: str, mutation: Any, seed: int) -> None:
    folder = mutated_copy(data, tmp_path / "data", f"saved/{file}", mutation, seed)
    check_dataset(folder / "saved", folder)


@pytest.mark.parametrize("name", ["prompts.json", "prompts.parquet"])
def test_folder_in_place_of_a_dataset(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with loads_or_is_refused(tmp_path), pytest.raises(ConfigError):
        inputs.load_local(tmp_path / name)


@pytest.mark.parametrize("names", ["_data_files", "splits"])
def test_a_dataset_names_no_files_elsewhere(data: Path, tmp_path: Path, names: str) -> None:
    """Or what is written beside them would be written there."""
    folder = shutil.copytree(data, tmp_path / "data")
    shutil.move(folder / "saved", folder / "dataset" / "train")
    (folder / "elsewhere").mkdir()
    if names == "splits":
        (folder / "dataset" / "dataset_dict.json").write_text('{"splits": ["../elsewhere"]}')
        shutil.copytree(folder / "dataset" / "train", folder / "elsewhere", dirs_exist_ok=True)
    else:
        (folder / "dataset" / "dataset_dict.json").write_text('{"splits": ["train"]}')
        state = folder / "dataset" / "train" / "state.json"
        content = json.loads(state.read_text())
        file = content["_data_files"][0]["filename"]
        shutil.copy(state.with_name(file), folder / "elsewhere")
        content["_data_files"][0]["filename"] = f"../../elsewhere/{file}"
        state.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="elsewhere"):
        inputs.load_local(folder / "dataset")


MESSAGE = {"role": "user", "content": "hello"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "null": [{"prompt": None}],
    "null among text": [{"prompt": "a"}, {"prompt": None}],
    "number": [{"prompt": 3}],
    "true": [{"prompt": True}],
    "object": [{"prompt": {"role": "user"}}],
    "no text": [{"prompt": ""}],
    "list of text": [{"prompt": ["a", "b"]}],
    "lists of lists": [{"prompt": [[MESSAGE]]}],
    "no messages": [{"prompt": [MESSAGE]}, {"prompt": []}],
    "message without role": [{"prompt": [{"content": "x"}]}],
    "message without content": [{"prompt": [{"role": "user"}]}],
    "content of nothing": [{"prompt": [{"role": "user", "content": None}]}],
    "content of lists": [{"prompt": [{"role": "user", "content": [["x"]]}]}],
    "role of a number": [{"prompt": [{"role": 3, "content": "x"}]}],
    "NUL": [{"prompt": "a\0b"}],
    "long": [{"prompt": "x" * 100_000}],
    "tools of a number": [{"prompt": [MESSAGE], "tools": 3}],
    "tools of no JSON": [{"prompt": [MESSAGE], "tools": "{"}],
    "tools nested": [{"prompt": [MESSAGE], "tools": "[" * 9000 + "]" * 9000}],
    "arguments of a list": [{"prompt": [MESSAGE], "chat_template_kwargs": ["x"]}],
    "arguments of text": [{"prompt": [MESSAGE], "chat_template_kwargs": "3"}],
    "arguments that are ours": [
        {"prompt": [MESSAGE], "chat_template_kwargs": {"tokenizer": "x", "tools": "y"}}
    ],
    "ids of text": [{"input_ids": ["a"]}],
    "ids of fractions": [{"input_ids": [1.5, 2.5]}],
    "ids of a number": [{"input_ids": 3}],
    "ids of null": [{"input_ids": [3, None]}],
    "ids of nothing": [{"input_ids": []}],
    "ids below zero": [{"input_ids": [-1]}],
    "ids beyond": [{"input_ids": [1 << 40]}],
    "ids nested": [{"input_ids": [[3]]}],
    "mask of a number": [{"input_ids": [3], "attention_mask": 1}],
    "mask of text": [{"input_ids": [3], "attention_mask": "1"}],
    "mask of null": [{"input_ids": [3], "attention_mask": [None]}],
    "mask too long": [{"input_ids": [3], "attention_mask": [1, 1]}],
    "mask nested": [{"input_ids": [3], "attention_mask": [[1]]}],
    "mask of an object": [{"input_ids": [3], "attention_mask": {"x": 1}}],
    "other columns": [{"question": "x"}],
    "our own column": [{"prompt": "a", "trl_sync_prompt_token_ids": "x"}],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(tmp_path: Path, name: str) -> None:
    with loads_or_is_refused(tmp_path):
        dataset = PromptDataset(
            Dataset.from_list(ROWS[name]),
            tiny.tokenizer(),
            max_prompt_tokens=64,
            response_length=8,
        )
        dataset.batch([0])


# What this package writes and how it reads.

SOURCES = [*(ROOT / "trl_sync").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
# Times what ranks would send one another: it unpickles what it has pickled itself.
OWN_PICKLES = {"recipes/bench/audit_scaling.py"}
RUN_PROGRAMS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Each call as its dotted name and its keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield name, {word.arg: word.value for word in node.keywords if word.arg}


def test_nothing_is_read_that_may_run_programs() -> None:
    for file in SOURCES:
        source = ast.parse(file.read_text())
        for name, keywords in calls(source):
            if name == "torch.load":
                # True is the default of the oldest torch supported.
                value = keywords.get("weights_only", ast.Constant(value=True))
                assert ast.unparse(value) == "True", file
            assert name not in ("yaml.load", "yaml.unsafe_load"), file
            assert not {"allow_pickle", "trust_remote_code"} & set(keywords), file
        if str(file.relative_to(ROOT)) not in OWN_PICKLES:
            assert not imported(source) & RUN_PROGRAMS, file


def imported(source: ast.AST) -> set[str]:
    """The packages that a file imports."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_code_of_models_is_never_trusted() -> None:
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            assert not isinstance(node, ast.Attribute) or node.attr != "trust_remote_code", file
            pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
            options = {getattr(key, "value", None): ast.unparse(value) for key, value in pairs}
            # What scripts of older TRL ask for is answered with False.
            assert options.get("trust_remote_code", "lambda config: False") in (
                "False",
                "lambda config: False",
            ), file


def test_the_audit_reads_single_variables_of_the_environment() -> None:
    """So that none gets into a journal. The faults for tests start processes with all of them."""
    for file in (ROOT / "trl_sync" / "audit").glob("*.py"):
        source = ast.parse(file.read_text())
        uses = [n for n in ast.walk(source) if ast.unparse(n) in ("os.environ", "environ")]
        single = [name for name, _ in calls(source) if name == "os.environ.get"]
        assert len(uses) == len(single), file


def test_a_run_writes_down_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "hf_" + "s" * 30, "WANDB_API_KEY": "w" * 40, "MY_PASSWORD": "tr0ub4dor"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer(tmp_path)
    trainer.add_callback(SyncAuditCallback())
    trainer.train()
    show_report([tmp_path / "out"], as_json=False, html=True, output=None)
    assert (tmp_path / "out" / "report.html").is_file()
    written = b"".join(content or b"" for content in tree(tmp_path).values())
    journal = (tmp_path / "out" / "sync_audit.jsonl").read_text()
    assert '"event": "end"' in journal
    for name, value in secrets.items():
        assert value.encode() not in written
        assert name not in journal
    assert os.environ["PATH"] not in journal
