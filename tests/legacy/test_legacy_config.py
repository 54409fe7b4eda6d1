"""PPOConfig of the step API, its controllers, small functions, tracking and saving."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import step_loops
from trl_sync import legacy
from trl_sync.errors import ConfigError
from trl_sync.legacy import (
    AdaptiveKLController,
    AutoModelForCausalLMWithValueHead,
    FixedKLController,
    PPOConfig,
    RunningMoments,
    core,
    stats,
)
from trl_sync.legacy.core import PPODecorators

# TRL 0.11.4, ppo_config.py
DEFAULTS = {
    "seed": 0,
    "log_with": None,
    "task_name": None,
    "model_name": "gpt2",
    "steps": 20000,
    "query_dataset": "stanfordnlp/imdb",
    "remove_unused_columns": True,
    "tracker_kwargs": {},
    "reward_model": "sentiment-analysis:lvwerra/distilbert-imdb",
    "accelerator_kwargs": {},
    "project_kwargs": {},
    "tracker_project_name": "trl",
    "push_to_hub_if_best_kwargs": {},
    "learning_rate": 1.41e-5,
    "adap_kl_ctrl": True,
    "init_kl_coef": 0.2,
    "kl_penalty": "kl",
    "target": 6.0,
    "horizon": 10000.0,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "batch_size": 128,
    "forward_batch_size": None,
    "mini_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "ppo_epochs": 4,
    "max_grad_norm": None,
    "optimize_cuda_cache": None,
    "optimize_device_cache": False,
    "early_stopping": False,
    "target_kl": 1.0,
    "compare_steps": 1,
    "ratio_threshold": 10.0,
    "use_score_scaling": False,
    "use_score_norm": False,
    "score_clip": None,
    "whiten_rewards": False,
    "gradient_checkpointing": False,
    "dataset_num_proc": None,
    "world_size": None,
    "is_encoder_decoder": None,
    "is_peft_model": None,
    "global_backward_batch_size": None,
    "global_batch_size": None,
}


def test_fields_and_defaults_are_those_of_trl() -> None:
    config = PPOConfig()
    for name, value in DEFAULTS.items():
        assert getattr(config, name) == value, name
    fields = set(PPOConfig.__dataclass_fields__)
    assert fields == {*DEFAULTS, "exp_name", "backward_batch_size"}
    assert config.backward_batch_size == 128
    assert config.total_ppo_epochs == 157  # 20000 / 128, rounded up


def test_the_experiment_is_named_after_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/sentiment.py"])
    assert PPOConfig().exp_name == "sentiment"


def test_the_command_line_gives_json() -> None:
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        [
            *("--batch_size", "4", "--mini_batch_size", "2", "--kl_penalty", "abs"),
            *("--tracker_kwargs", '{"wandb": {"entity": "me"}}', "--adap_kl_ctrl", "False"),
        ]
    )
    assert config.tracker_kwargs == {"wandb": {"entity": "me"}}
    assert (config.batch_size, config.adap_kl_ctrl) == (4, False)
    assert config.to_dict()["tracker_kwargs/wandb/entity"] == "me"


def test_older_names_are_taken_with_a_message() -> None:
    with pytest.warns(FutureWarning, match="forward_batch_size is now mini_batch_size"):
        assert PPOConfig(forward_batch_size=64).mini_batch_size == 64
    with pytest.warns(FutureWarning, match="optimize_cuda_cache is now optimize_device_cache"):
        assert PPOConfig(optimize_cuda_cache=True).optimize_device_cache


@pytest.mark.parametrize(
    "message, settings",
    [
        ("must be a multiple", {"batch_size": 10, "mini_batch_size": 4}),
        (
            "must be a multiple",
            {"batch_size": 8, "mini_batch_size": 4, "gradient_accumulation_steps": 3},
        ),
        ("batch_size must be positive", {"batch_size": 0}),
        ("target must be positive", {"target": 0.0}),
        ("init_kl_coef must not be negative", {"init_kl_coef": -0.1}),
        ("lam must lie between", {"lam": 1.5}),
        ("kl_penalty must be", {"kl_penalty": "k3"}),
        ("use_score_norm has no effect", {"use_score_norm": True}),
        ("needs repo_id", {"push_to_hub_if_best_kwargs": {"private": True}}),
        (
            "cannot set gradient accumulation",
            {"accelerator_kwargs": {"gradient_accumulation_steps": 2}},
        ),
        ("is not JSON", {"tracker_kwargs": "{"}),
        ("must be a dictionary", {"project_kwargs": [1]}),
    ],
)
def test_settings_that_cannot_work_are_refused(message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**settings)


def test_the_trainer_fills_in_the_sizes() -> None:
    config = step_loops.trainer(step_loops.config(gradient_accumulation_steps=2)).config
    assert (config.world_size, config.is_peft_model, config.is_encoder_decoder) == (1, False, False)
    assert (config.backward_batch_size, config.global_backward_batch_size) == (8, 8)
    assert config.global_batch_size == 8


def test_the_accelerator_gets_its_settings(tmp_path: Path) -> None:
    trainer = step_loops.trainer(
        step_loops.config(
            accelerator_kwargs={"cpu": True}, project_kwargs={"logging_dir": str(tmp_path)}
        )
    )
    assert trainer.accelerator.project_configuration.logging_dir == str(tmp_path)
    assert trainer.current_device == torch.device("cpu")


# --- controllers --------------------------------------------------------------------------------


def test_the_adaptive_coefficient_by_hand() -> None:
    control = AdaptiveKLController(0.2, target=6.0, horizon=10000)
    control.update(6.6, 256)  # 10% too far
    assert control.value == pytest.approx(0.2 * (1 + 0.1 * 256 / 10000))
    control.update(600.0, 256)  # clipped at 20%
    expected = 0.2 * (1 + 0.1 * 0.0256) * (1 + 0.2 * 0.0256)
    assert control.value == pytest.approx(expected)
    fixed = FixedKLController(0.3)
    fixed.update(100.0, 256)
    assert fixed.value == 0.3


def test_running_moments_are_those_of_all_numbers(tmp_path: Path) -> None:
    batches = [torch.tensor([5.0]), torch.tensor([1.0, 2.0, 9.0]), torch.tensor([4.0, 4.0])]
    moments = RunningMoments(Accelerator(cpu=True))
    for number in range(1, 4):
        mean, std = moments.update(batches[number - 1])
        so_far = np.concatenate([batch.numpy() for batch in batches[:number]])
        assert mean == pytest.approx(batches[number - 1].mean().item())
        assert moments.mean == pytest.approx(so_far.mean())
        assert moments.var == pytest.approx(so_far.var())
        if number > 1:
            assert moments.std == pytest.approx(so_far.std(ddof=1))
            assert std == pytest.approx(batches[number - 1].std().item())
    moments.save_to_json(str(tmp_path / "moments.json"))
    again = RunningMoments.load_from_json(moments.accelerator, str(tmp_path / "moments.json"))
    assert again == moments


# --- small functions ----------------------------------------------------------------------------


def test_masked_statistics_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert core.masked_mean(values, mask).item() == 2
    assert core.masked_mean(values, mask, axis=1).tolist() == [1.5, 3]
    assert core.masked_var(values, mask).item() == 1
    assert core.masked_var(values, mask, unbiased=False).item() == pytest.approx(2 / 3)
    assert core.masked_whiten(values, mask)[mask.bool()].tolist() == pytest.approx([-1, 0, 1])
    shifted = core.masked_whiten(values, mask, shift_mean=False)
    assert shifted[mask.bool()].tolist() == pytest.approx([1, 2, 3])
    assert core.whiten(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1, 0, 1])
    # As in TRL; the statistics of a step have 0 there.
    nothing = torch.zeros_like(mask)
    assert core.masked_mean(values, nothing).isnan()
    with pytest.raises(ValueError, match="The mask is empty"):
        core.masked_var(values, nothing)
    assert stats.mean_of_counted(values, nothing) == stats.variance_of_counted(values, nothing) == 0
    assert stats.mean_of_counted(values, mask) == 2
    assert stats.variance_of_counted(values, mask) == 1


def test_cached_memory_is_freed_when_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[str] = []
    monkeypatch.setattr(core, "free_device_cache", lambda: freed.append("cache"))

    @PPODecorators.empty_device_cache()
    def work() -> str:
        return "done"

    assert (work(), freed) == ("done", [])
    for name in ("optimize_device_cache", "optimize_cuda_cache"):
        monkeypatch.setattr(PPODecorators, name, True)
        assert work() == "done"
        with PPODecorators.empty_cuda_cache():
            assert freed == ["cache"]
        assert freed == ["cache", "cache"]
        freed.clear()
        monkeypatch.setattr(PPODecorators, name, False)
    step_loops.trainer(step_loops.config(optimize_device_cache=True))
    work()
    assert freed == ["cache"]
    step_loops.trainer()
    assert not PPODecorators.optimize_device_cache


def test_distributions_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    labels = torch.tensor([[1]])
    assert core.logprobs_from_logits(logits, labels).item() == pytest.approx(math.log(0.75))
    both = core.logprobs_from_logits(logits, labels, gather=False)
    assert both.exp().flatten().tolist() == pytest.approx([0.25, 0.75])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert core.entropy_from_logits(logits).item() == pytest.approx(entropy)
    clipped = core.clip_by_value(
        torch.tensor([-1.0, 0.5, 9.0]), torch.tensor([0.0] * 3), torch.tensor([1.0, 1.0, 2.0])
    )
    assert clipped.tolist() == [0.0, 0.5, 2.0]
    three = torch.tensor([[3.0, 2.0, 1.0]]).log()
    kept = core.top_k_top_p_filtering(three, top_k=2).isfinite().tolist()
    assert kept == [[True, True, False]]
    assert core.top_k_top_p_filtering(three, top_p=0.4).isfinite().tolist() == [
        [True, False, False]
    ]


def test_dictionaries_of_statistics() -> None:
    assert core.flatten_dict({"a": {"b": 1, "c": {}}, "d": 2}) == {"a/b": 1, "d": 2}
    with pytest.raises(ValueError, match="contains the separator"):
        core.flatten_dict({"a/b": 1})
    stacked = core.stack_dicts([{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0])}])
    assert stacked["x"].tolist() == [[1.0, 2.0], [3.0, core.WANDB_PADDING]]
    numbers = core.stats_to_np({"x": torch.tensor([1.5], dtype=torch.bfloat16), "y": 2, "z": "s"})
    assert isinstance(numbers["x"], np.ndarray)
    assert core.convert_to_scalar(numbers) == {"x": 1.5, "y": 2.0, "z": "s"}


# --- tracking and saving ------------------------------------------------------------------------


def logged(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], Any]]:
    calls: list[tuple[dict[str, Any], Any]] = []
    monkeypatch.setattr(
        trainer.accelerator, "log", lambda values, step: calls.append((values, step))
    )
    return calls


def test_statistics_and_rewards_go_to_the_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = step_loops.trainer()
    calls = logged(trainer, monkeypatch)
    for _ in range(2):
        trainer.log_stats({"ppo/mean_scores": 1.0}, {}, [torch.tensor(1.0), torch.tensor(3.0)])
    assert [step for _, step in calls] == [1, 2]
    values, _ = calls[0]
    assert values["ppo/mean_scores"] == 1.0
    assert values["env/reward_mean"] == 2.0
    assert values["env/reward_std"] == pytest.approx(math.sqrt(2))
    assert values["env/reward_dist"].tolist() == [1.0, 3.0]


def test_texts_go_to_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(columns: list[str], data: list[Any]) -> Any:
        return columns, data

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=table))
    trainer = step_loops.trainer()
    trainer.config.log_with = "wandb"
    calls = logged(trainer, monkeypatch)
    batch = {"query": ["a", "b"], "response": ["c", "d"], "other": ["e", "f"]}
    trainer.log_stats({}, batch, torch.tensor([1.0, 2.0]), columns_to_log=["query", "other"])
    values, step = calls[0]
    assert step is None
    assert values["game_log"] == (["query", "other", "reward"], [["a", "e", 1.0], ["b", "f", 2.0]])
    with pytest.raises(ConfigError, match="columns_to_log names response"):
        trainer.log_stats({}, {"query": ["a"]}, torch.tensor([1.0]))


def installed(monkeypatch: pytest.MonkeyPatch, *trackers: LoggerType) -> None:
    for module in ("trl_sync.legacy.setup", "accelerate.tracking"):
        monkeypatch.setattr(f"{module}.get_available_trackers", lambda: list(trackers))


def test_trackers_that_cannot_log_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, LoggerType.TENSORBOARD)
    for log_with, said in (
        ("wandb", "'wandb', but that tracker is not installed"),
        (["tensorboard", LoggerType.COMETML], "'comet_ml', but that tracker is not installed"),
        ("nonsense", "'nonsense' is no tracker of accelerate: choose from aim"),
    ):
        project = {"logging_dir": "logs"}
        with pytest.raises(ConfigError, match=f"log_with={said}"):
            step_loops.trainer(step_loops.config(log_with=log_with, project_kwargs=project))
    with pytest.raises(ConfigError, match=r"project_kwargs=\{'logging_dir': \.\.\.\}"):
        step_loops.trainer(step_loops.config(log_with="tensorboard"))


def test_comet_gets_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = MagicMock()
    comet = SimpleNamespace(__version__="3.49.0", start=lambda **_: experiment)
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    installed(monkeypatch, LoggerType.COMETML)
    trainer = step_loops.trainer(step_loops.config(log_with="comet_ml"))
    trainer.log_stats({"ppo/mean_scores": 2.0}, {}, [torch.tensor(1.0), torch.tensor(3.0)])
    experiment.log_metric.assert_any_call("ppo/mean_scores", 2.0, step=1)
    experiment.log_metric.assert_any_call("env/reward_mean", 2.0, step=1)


def test_trackers_are_started_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, name, **options: calls.append((name, options))
    )
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_, **__: [object()])
    installed(monkeypatch, LoggerType.TENSORBOARD, LoggerType.WANDB)
    settings = {
        "tracker_project_name": "mine",
        "tracker_kwargs": {"wandb": {"entity": "me"}},
        "project_kwargs": {"logging_dir": "logs"},
    }
    for tracker in ("tensorboard", "wandb", None):
        step_loops.trainer(step_loops.config(log_with=tracker, **settings))
    assert [name for name, _ in calls] == ["mine", "mine"]
    flat, nested = (options["config"] for _, options in calls)
    assert flat["init_kl_coef"] == nested["trl_ppo_trainer_config"]["init_kl_coef"] == 0.2
    assert calls[1][1]["init_kwargs"] == {"wandb": {"entity": "me"}}


def test_saved_models_load(tmp_path: Path) -> None:
    trainer = step_loops.trainer()
    trainer.save_pretrained(str(tmp_path / "saved"))
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "saved"))
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "[EOS]"
    card = (tmp_path / "saved" / "README.md").read_text()
    assert 'AutoModelForCausalLMWithValueHead.from_pretrained("saved")' in card


def test_saving_pushes_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = MagicMock()
    hub.create_repo.return_value.repo_id = "me/saved"
    monkeypatch.setattr("trl_sync.legacy.saving.HfApi", lambda token=None: hub)
    trainer = step_loops.trainer()
    trainer.save_pretrained(tmp_path / "saved", push_to_hub=False)
    hub.upload_folder.assert_not_called()
    trainer.save_pretrained(tmp_path / "saved", push_to_hub=True, allow_patterns="*.json")
    hub.create_repo.assert_called_once_with("saved", private=None, exist_ok=True)
    assert hub.upload_folder.call_args.kwargs["allow_patterns"] == "*.json"
    trainer.push_to_hub("me/saved", ignore_patterns=["*.bin"], delete_patterns="*.txt")
    uploaded = hub.upload_folder.call_args.kwargs
    assert (uploaded["ignore_patterns"], uploaded["delete_patterns"]) == (["*.bin"], "*.txt")
    with pytest.raises(ConfigError, match="repo_id, private has no effect without push_to_hub"):
        trainer.save_pretrained(tmp_path / "saved", repo_id="me/saved", private=True)
    with pytest.raises(ConfigError, match="config has no effect"):
        trainer.push_to_hub("me/saved", config={})


def test_the_best_model_is_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[set[str]] = []

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> str:
            assert repo_id == "me/best"
            assert "me/best" in (Path(folder_path) / "README.md").read_text()
            pushed.append({file.name for file in Path(folder_path).iterdir()})
            return "https://hub/commit"

    monkeypatch.setattr("trl_sync.legacy.saving.HfApi", Hub)
    kwargs = {"repo_id": "me/best", "token": "secret"}
    trainer = step_loops.trainer(
        step_loops.config(push_to_hub_if_best_kwargs=kwargs, compare_steps=2, ppo_epochs=1)
    )
    queries, responses, _ = step_loops.episodes(0)
    counts = []
    # looked at every second step: 1.0 is the best so far, 0.5 is not, 3.0 is
    for score in (1.0, 9.0, 0.5, 9.0, 3.0):
        trainer.step(queries, responses, [torch.tensor(score)] * 8)
        counts.append(len(pushed))
    assert counts == [1, 1, 1, 1, 2]
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= pushed[0]


def test_names_that_are_gone_say_what_to_use() -> None:
    with pytest.raises(ImportError, match=r"use trl_sync\.PPOTrainer"):
        exec("from trl_sync.legacy import PPOv2Trainer")
    assert not hasattr(legacy, "nothing")
    assert all(hasattr(legacy, name) for name in legacy.__all__)
