"""Our trainer against TRL 1.12's, from the same weights, prompts and responses: every number.

Generation is replaced by the same recorded responses on both sides. Both do one iteration of two
PPO epochs with plain SGD: Adam at TRL's learning rate would hide a gradient of the wrong sign.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

import oracle
import parity_cases as parity
from trl_sync import PPOConfig, PPOTrainer
from trl_sync.ppo import experience as experience_module
from trl_sync.ppo.batch import Rollout
from trl_sync.ppo.rollout import pad_left

pytestmark = pytest.mark.oracle

CASES = parity.all_cases()
FULL_LENGTH = [case for case in CASES if not case.ragged]
RAGGED = [case for case in CASES if case.ragged]

# fp32 with other shapes (TRL runs the LM head on the prompt too, and adds 1e-7 to the temperature,
# 1.4e-7 of it): sums over up to 48 terms of order 1 to 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="session")
def trl_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TRL 1.12 found for each case, from one process of its own."""
    folder = tmp_path_factory.mktemp("trl")
    oracle.source("experimental/ppo/ppo_trainer.py")  # fails where TRL 1.12 is not installed
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(oracle.ORACLE), str(here)])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(here / "trl_side.py"), str(folder)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {c.name: torch.load(folder / f"{c.name}.pt", weights_only=True) for c in CASES}


class Recorded(PPOTrainer):
    """With plain SGD, and adapters drawn by name."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.recorder = self.optimizer = parity.optimizer_of(self.backbone)
        return self.optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        self.lr_scheduler = LambdaLR(self.optimizer, lambda step: 1.0)
        return self.lr_scheduler


class Flipped(TrainerCallback):
    """Turns the sign of one tensor's gradient, as a wrong implementation would."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameter = dict(kwargs["model"].named_parameters())[self.name]
        parameter.grad.neg_()


def our_results(
    case: parity.Case, folder: Path, callbacks: list[TrainerCallback] | None = None
) -> dict[str, Any]:
    """The same as `trl_side.found`, of our trainer, in the order of the prompts."""
    seen: dict[str, Any] = {}
    make_experience = experience_module.make_experience

    def roll_out(model: Any, prompts: Any, sampling: Any, **kwargs: Any) -> Rollout:
        rows = [parity.prompts().index(ids) for ids in prompts.token_ids]
        lengths = torch.tensor(parity.response_lengths(case.ragged))[rows]
        responses = parity.responses(case.ragged)[rows]
        ids, mask = pad_left(prompts.token_ids, torch.device("cpu"))
        seen["order"] = torch.tensor(rows).argsort()
        return Rollout(
            prompts=prompts,
            prompt_ids=ids,
            prompt_mask=mask,
            response_ids=responses,
            response_mask=torch.arange(parity.RESPONSE_LENGTH) < lengths[:, None],
            stopped=(responses == parity.EOS).any(1),
        )

    def recorded_experience(scored: Any, *args: Any, **kwargs: Any) -> Any:
        result = make_experience(scored, *args, **kwargs)
        seen["scored"], seen["experience"] = scored, result[0]
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experience_module, "roll_out", roll_out)
        patch.setattr(experience_module, "make_experience", recorded_experience)
        trainer = Recorded(
            PPOConfig(**case.settings(folder)),
            parity.tokenizer(),
            parity.causal(0),
            None if case.peft else parity.causal(1),
            parity.classifier(2),
            parity.dataset(),
            parity.classifier(3),
            peft_config=parity.lora() if case.peft else None,
            callbacks=callbacks,
        )
        parity.draw_adapters(trainer.backbone)
        trainer.train()
    scored, experience, order = seen["scored"], seen["experience"], seen["order"]
    rows = [row for row in trainer.state.log_history if "loss/policy_avg" in row]
    means = {n: sum(row[n] for row in rows) / len(rows) for n in rows[-1] if "/" in n}
    return {
        "metrics": trainer.state.log_history[0] | means,
        "returns": experience.returns[order],
        "whitened": experience.advantages[order],
        "values": scored.values[order],
        "scores": scored.scores[order],
        "logprobs": scored.logprobs[order],
        "reference_logprobs": scored.reference_logprobs[order],
        "mask": experience.response_mask[order],
        "gradients": trainer.recorder.gradients,
        "parameters": {n: p.detach().clone() for n, p in trainer.recorder.named.items()},
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


ROLLOUT_METRICS = (
    *("objective/kl", "objective/entropy", "objective/non_score_reward"),
    *("objective/rlhf_reward", "objective/scores", "val/num_eos_tokens"),
)
UPDATE_METRICS = (
    *("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg"),
    *("loss/value_avg", "val/clipfrac_avg", "val/ratio"),
)


def check_metrics(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        wanted = pytest.approx(theirs["metrics"][name], rel=2e-5, abs=2e-6)
        assert ours["metrics"][name] == wanted, name


def check_gradients(ours: dict[str, Any], theirs: dict[str, Any], part: str = "") -> None:
    """Every tensor's gradient of the first update, and the parameters after one step of SGD."""
    first, second = ours["gradients"]
    assert first.keys() == theirs["gradients"][0].keys()
    checked = [name for name in first if name.startswith(part)]
    assert checked
    for name in checked:
        assert relative_error(first[name], theirs["gradients"][0][name]) < 1e-5, name
    for name in checked:
        # The second update starts from parameters after one step of SGD, and clips.
        assert relative_error(second[name], theirs["gradients"][1][name]) < 1e-4, name
        found, expected = ours["parameters"][name], theirs["parameters"][name]
        assert relative_error(found, expected) < 1e-5, name


@pytest.mark.parametrize("case", FULL_LENGTH, ids=lambda case: case.name)
def test_full_length_responses(
    case: parity.Case, trl_results: dict[str, Any], tmp_path: Path
) -> None:
    """Advantages, returns, losses, KL, scores, entropy, gradients and the parameters after SGD."""
    ours, theirs = our_results(case, tmp_path), trl_results[case.name]
    for name in ("logprobs", "reference_logprobs", "values", "scores", "whitened"):
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE, msg=name)
    # TRL keeps no returns: they are its advantages before whitening plus its values.
    returns = theirs["advantages"] + theirs["values"]
    torch.testing.assert_close(ours["returns"], returns, **CLOSE)
    check_metrics(ours, theirs, ROLLOUT_METRICS + UPDATE_METRICS)
    assert ours["metrics"]["policy/clipfrac_avg"] > 0.05, "nothing was clipped"
    check_gradients(ours, theirs)


@pytest.mark.parametrize("case", RAGGED, ids=lambda case: case.name)
def test_responses_that_stop_early(
    case: parity.Case, trl_results: dict[str, Any], tmp_path: Path
) -> None:
    """All that does not depend on where TRL puts the score, which is behind the last token."""
    ours, theirs = our_results(case, tmp_path), trl_results[case.name]
    mask = ours["mask"]
    for name in ("logprobs", "reference_logprobs", "values"):
        expected = theirs[name].masked_fill(~mask, 0.0)
        torch.testing.assert_close(ours[name], expected, **CLOSE, msg=name)
    torch.testing.assert_close(ours["scores"], theirs["scores"], **CLOSE)
    check_metrics(ours, theirs, ROLLOUT_METRICS)
    if case.lam == 1.0:
        # With lambda 1 the advantage is what is still to come, wherever the score stands.
        torch.testing.assert_close(ours["whitened"], theirs["whitened"], **CLOSE)
        check_metrics(ours, theirs, ("loss/policy_avg", "policy/clipfrac_avg"))
        check_gradients(ours, theirs, "policy.")


@pytest.mark.parametrize("case", [c for c in RAGGED if c.lam < 1], ids=lambda case: case.name)
def test_defect_17_the_score_is_discounted_by_one_step(
    case: parity.Case, trl_results: dict[str, Any], tmp_path: Path
) -> None:
    """TRL puts the score one position behind a response that stops early, and a value with it.

    With last token n - 1: its A_{n-1} = R_{n-1} + V_n - V_{n-1} + lambda (S - V_n), where it should
    be R_{n-1} + S - V_{n-1}. So the two differ there by (1 - lambda) (V_n - S), and by that times
    lambda^k k tokens earlier.
    """
    ours, theirs = our_results(case, tmp_path), trl_results[case.name]
    raw = ours["returns"] - ours["values"]
    for row, length in enumerate(parity.response_lengths(ragged=True)):
        behind = length < parity.RESPONSE_LENGTH
        shift = theirs["values"][row, min(length, 7)] - theirs["scores"][row] if behind else 0.0
        for token in range(length):
            wrong = (1 - case.lam) * case.lam ** (length - 1 - token) * shift
            found = float(theirs["advantages"][row, token] - raw[row, token])
            assert found == pytest.approx(float(wrong), abs=2e-5), (row, token)


def test_a_flipped_gradient_is_found(trl_results: dict[str, Any], tmp_path: Path) -> None:
    case = FULL_LENGTH[0]
    name = "policy.model.layers.1.mlp.down_proj.weight"
    ours = our_results(case, tmp_path, callbacks=[Flipped(name)])
    with pytest.raises(AssertionError, match=name):
        check_gradients(ours, trl_results[case.name])
