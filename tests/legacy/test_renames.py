"""Old names in PPOConfig and PPOTrainer: taken with a message, or refused with the alternative."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

import step_loops
import tiny
from trl_sync import ConfigError, PPOConfig, PPOTrainer, legacy
from trl_sync.renames import (
    CONFIG_ALTERNATIVES,
    CONFIG_RENAMES,
    GENERATION_ALTERNATIVES,
    REMOVED_METHODS,
    TRAINER_RENAMES,
)

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
OPTIONS = {"report_to": "none", "use_cpu": True}
VALUES: dict[str, Any] = {
    "base_model": "path",
    "evaluation_strategy": "no",
    "exp_name": "name",
    "horizon": 50.0,
    "init_kl_coef": 0.3,
    "log_with": "none",
    "no_cuda": True,
    "ppo_epochs": 3,
    "steps": 640,
    "target": 3.0,
    "tracker_project_name": "mine",
    "truncate_token": "eos",
    "truncate_token_id": 5,
}


@pytest.mark.parametrize("old", sorted(CONFIG_RENAMES))
def test_a_renamed_field_is_taken_with_a_message(old: str, tmp_path: Path) -> None:
    new = CONFIG_RENAMES[old]
    options = {name: value for name, value in OPTIONS.items() if name != new}
    if old == "horizon":
        options["kl_target"] = 6.0
    with pytest.warns(FutureWarning, match=rf"PPOConfig\({old}=\.\.\.\) is now {new}\.$"):
        config = PPOConfig(str(tmp_path), **{old: VALUES[old]}, **options)
    expected = PPOConfig(str(tmp_path), **{new: VALUES[old]}, **options)
    assert getattr(config, new) == getattr(expected, new)


def test_both_names_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got kl_coef twice, also as init_kl_coef"):
        PPOConfig(str(tmp_path), init_kl_coef=0.2, kl_coef=0.1, **OPTIONS)


@pytest.mark.parametrize("old", sorted(CONFIG_ALTERNATIVES))
def test_a_field_without_an_equal_says_what_to_do(old: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"PPOConfig has no {old}: ") as caught:
        PPOConfig(str(tmp_path), **{old: 1}, **OPTIONS)
    assert CONFIG_ALTERNATIVES[old] in str(caught.value)
    assert "trl_sync.legacy.PPOConfig" in str(caught.value)


@pytest.mark.parametrize("name", sorted(GENERATION_ALTERNATIVES))
def test_an_argument_of_generate_says_which_setting_it_is(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"PPOConfig has no {name}: ") as caught:
        PPOConfig(str(tmp_path), **{name: 5}, **OPTIONS)
    assert GENERATION_ALTERNATIVES[name] in str(caught.value)
    assert f"| `{name}` | {GENERATION_ALTERNATIVES[name]} |" in PAGE.read_text()
    with pytest.raises(ConfigError, match=r"pass it to generate\(\)"):
        legacy.PPOConfig(**{name: 5})


def test_the_step_api_says_where_newer_names_belong(tmp_path: Path) -> None:
    whole = r"trl_sync\.PPOTrainer runs the whole loop"
    with pytest.raises(ConfigError, match=f"num_ppo_epochs is ppo_epochs here.*{whole}"):
        legacy.PPOConfig(num_ppo_epochs=2, batch_size=8, mini_batch_size=4)
    with pytest.raises(ConfigError, match=rf"has no output_dir\. trl_sync\.PPOConfig has: {whole}"):
        legacy.PPOConfig(output_dir=str(tmp_path))
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        legacy.PPOConfig(nonsense=1)
    tokenizer = tiny.tokenizer()
    with pytest.raises(ConfigError, match=f"processing_class is tokenizer here.*{whole}"):
        legacy.PPOTrainer(step_loops.config(), step_loops.model(), processing_class=tokenizer)
    with pytest.raises(ConfigError, match="has no reward_model"):
        legacy.PPOTrainer(step_loops.config(), step_loops.model(), None, tokenizer, reward_model=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        legacy.PPOTrainer(step_loops.config(), step_loops.model(), None, tokenizer, nonsense=1)


def test_alternatives_name_fields_that_exist() -> None:
    fields = set(PPOConfig.__dataclass_fields__)
    assert set(CONFIG_RENAMES.values()) <= fields
    named = {"accelerator_config", "kl_target", "kl_horizon", "save_strategy", "hub_model_id"}
    named |= {"torch_empty_cache_steps", "missing_eos_penalty", "run_name", "project"}
    named |= {"response_length", "stop_token_id", "generation_kwargs"}
    assert named <= fields
    parameters = inspect.signature(PPOTrainer).parameters
    assert set(TRAINER_RENAMES.values()) <= set(parameters)
    assert not set(REMOVED_METHODS) & set(dir(PPOTrainer))


def test_the_kl_penalty_becomes_an_estimator(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="kl_penalty='kl'.* is now kl_estimator='k1'"):
        assert PPOConfig(str(tmp_path), kl_penalty="kl", **OPTIONS).kl_estimator == "k1"
    with pytest.raises(
        ConfigError, match=r"'abs', 'mse' and 'full' are settings of trl_sync\.legacy"
    ):
        PPOConfig(str(tmp_path), kl_penalty="mse", **OPTIONS)
    with pytest.raises(ConfigError, match="contradicts kl_estimator"):
        PPOConfig(str(tmp_path), kl_penalty="kl", kl_estimator="k3", **OPTIONS)


def test_no_tracker_is_none(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="is now report_to"):
        assert PPOConfig(str(tmp_path), log_with=None, use_cpu=True).report_to == []


def test_unknown_fields_are_still_unknown(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        PPOConfig(str(tmp_path), nonsense=1)
    parameters = inspect.signature(PPOConfig).parameters
    assert "num_ppo_epochs" in parameters
    assert "ppo_epochs" not in parameters
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--num_ppo_epochs", "2", "--report_to", "none"]
    )
    assert config.num_ppo_epochs == 2


def new_arguments(folder: Path) -> dict[str, Any]:
    return {
        "args": tiny.config(folder),
        "processing_class": tiny.tokenizer(),
        "model": tiny.llama(),
        "reward_model": tiny.reward_llama(),
        "train_dataset": tiny.prompts(),
    }


def test_names_of_012_are_taken_with_a_message(tmp_path: Path) -> None:
    arguments = new_arguments(tmp_path)
    old = {new: name for name, new in TRAINER_RENAMES.items()}
    renamed = {old.get(name, name): value for name, value in arguments.items()}
    assert {"config", "tokenizer", "policy"} <= set(renamed)
    with pytest.warns(FutureWarning) as caught:
        trainer = PPOTrainer(**renamed, ref_policy=None)
    said = {str(warning.message) for warning in caught if "is now" in str(warning.message)}
    assert said == {f"PPOTrainer({o}=...) is now {n}." for o, n in TRAINER_RENAMES.items()}
    assert trainer.args is arguments["args"]
    assert trainer.processing_class is arguments["processing_class"]
    with pytest.raises(ConfigError, match="got model twice, also as policy"):
        PPOTrainer(**arguments, policy=arguments["model"])


def test_calls_of_the_step_api_point_there(tmp_path: Path) -> None:
    settings, model, tokenizer = step_loops.config(), step_loops.model(), tiny.tokenizer()
    new = tiny.config(tmp_path)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((settings, model, None, tokenizer), {}),
        ((), {"config": settings, "model": model, "tokenizer": tokenizer}),
        ((new, model, model, tokenizer), {}),
        ((), {"config": new, "model": model, "tokenizer": tokenizer}),
        ((), {"config": new, "model": model, "tokenizer": tokenizer, "dataset": tiny.prompts()}),
        ((new,), {"processing_class": tokenizer, "model": model, "lr_scheduler": None}),
    ]
    for args, kwargs in calls:
        with pytest.raises(ConfigError, match=r"trl_sync\.legacy\.PPOTrainer"):
            PPOTrainer(*args, **kwargs)


def test_methods_that_are_gone_say_what_to_call(tmp_path: Path) -> None:
    trainer = PPOTrainer(**new_arguments(tmp_path))
    for name in REMOVED_METHODS:
        assert not hasattr(trainer, name)
        with pytest.raises(AttributeError, match=rf"{name}.*trl_sync\.legacy\.PPOTrainer"):
            getattr(trainer, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
        _ = trainer.nothing


def test_an_error_inside_a_property_of_a_subclass_is_shown(tmp_path: Path) -> None:
    class Broken:
        @property
        def mine(self) -> int:
            missing: Any = None
            return int(missing.absent)

    class Own(Broken, PPOTrainer):
        @property
        def generate(self) -> int:
            return self.mine

    class OwnSteps(Broken, legacy.PPOTrainer):
        @property
        def save_model(self) -> int:
            return self.mine

    own = Own(**new_arguments(tmp_path))
    steps = step_loops.trainer(kind=OwnSteps)
    for trainer, names in ((own, ("mine", "generate")), (steps, ("mine", "save_model"))):
        for name in names:
            with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'absent'"):
                getattr(trainer, name)
