"""TRL 1.12's PPOTrainer on the recorded responses; run with PYTHONPATH=.oracle.

    python tests/parity/trl_side.py FOLDER

writes one file a case, with everything in the order of the prompts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import trl
from torch.optim.lr_scheduler import LambdaLR
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

import parity_cases as parity


class Recorded(PPOTrainer):
    """With plain SGD, and adapters drawn by name."""

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        parity.draw_adapters(self.model)
        self.recorder = self.optimizer = parity.optimizer_of(self.model)
        self.lr_scheduler = LambdaLR(self.optimizer, lambda step: 1.0)


class Wiretap:
    """What passes through the module's functions during one iteration."""

    def __init__(self, case: parity.Case) -> None:
        self.case = case
        self.rows: list[int] = []
        self.seen: dict[str, list[Any]] = {"whiten": [], "reward": [], "logprobs": []}

    def batch_generation(
        self, model: Any, queries: Any, batch_size: int, pad_token_id: int, config: Any
    ) -> tuple[Any, Any]:
        self.rows = parity.rows_of(queries)
        responses = parity.responses(self.case.ragged)[self.rows]
        both = torch.cat([queries, responses], 1)
        logits = ppo_trainer.forward(model, both, pad_token_id).logits
        start = queries.shape[1] - 1
        return both, logits[:, start:-1] / (parity.TEMPERATURE + 1e-7)

    def tap(self, name: str, key: str) -> Any:
        original = getattr(ppo_trainer, name)

        def passing(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            kept = result if isinstance(result, torch.Tensor) else result[:2]
            inputs = [a.detach().clone() for a in args if isinstance(a, torch.Tensor)]
            self.seen[key].append((inputs, kept))
            return result

        return passing


def run(case: parity.Case, folder: Path) -> None:
    tap = Wiretap(case)
    with torch.random.fork_rng():
        patched = {
            "batch_generation": tap.batch_generation,
            "masked_whiten": tap.tap("masked_whiten", "whiten"),
            "get_reward": tap.tap("get_reward", "reward"),
            "selective_log_softmax": tap.tap("selective_log_softmax", "logprobs"),
        }
        originals = {name: getattr(ppo_trainer, name) for name in patched}
        for name, function in patched.items():
            setattr(ppo_trainer, name, function)
        trainer = Recorded(
            args=PPOConfig(**case.settings(folder / "out")),
            processing_class=parity.tokenizer(),
            model=parity.causal(0),
            ref_model=None if case.peft else parity.causal(1),
            reward_model=parity.classifier(2),
            value_model=parity.classifier(3),
            train_dataset=parity.dataset(),
            eval_dataset=parity.dataset(),
            peft_config=parity.lora() if case.peft else None,
        )
        trainer.train()
        for name, function in originals.items():
            setattr(ppo_trainer, name, function)
    torch.save(found(trainer, tap), folder / f"{case.name}.pt")


def found(trainer: Any, tap: Wiretap) -> dict[str, Any]:
    order = torch.tensor(tap.rows).argsort()
    (raw, mask), whitened = tap.seen["whiten"][-1]
    values, scores = (kept for _, kept in tap.seen["reward"])
    context = values[0].shape[1] - parity.RESPONSE_LENGTH
    # TRL takes the penalty off after the function that was tapped.
    unstopped = ~(parity.responses(tap.case.ragged) == parity.EOS).any(1)
    penalty = (tap.case.missing_eos_penalty or 0.0) * unstopped
    row = {n: v for n, v in trainer.state.log_history[0].items() if isinstance(v, (int, float))}
    return {
        "metrics": row,
        "advantages": (raw * mask)[order],
        "whitened": (whitened * mask)[order],
        "values": values[0][:, context - 1 : -1].squeeze(-1)[order],
        "scores": scores[1][order] - penalty,
        "logprobs": tap.seen["logprobs"][0][1][order],
        "reference_logprobs": tap.seen["logprobs"][1][1][order],
        "gradients": trainer.recorder.gradients,
        "parameters": {n: p.detach().clone() for n, p in trainer.recorder.named.items()},
    }


if __name__ == "__main__":
    assert trl.__version__ == "1.12.0", trl.__version__
    for each in parity.all_cases():
        run(each, Path(sys.argv[1]))
