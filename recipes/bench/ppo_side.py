"""One run of one side of ppo_vs_trl.py, in a process of its own; writes its figures as JSON.

Everything but the imports is the same script for TRL's trainer and for ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import PeakMemory, PhaseClock, now_s

SETTINGS: dict[str, Any] = {
    "num_mini_batches": 1,
    "num_ppo_epochs": 4,
    "temperature": 1.0,
    # TRL steps its schedule once an iteration, we once an update: without one both are equal.
    "lr_scheduler_type": "constant",
    "kl_coef": 0.05,
    "num_sample_generations": 0,
    "logging_steps": 1,
    "max_grad_norm": 0.0,
    "disable_tqdm": True,
    "save_strategy": "no",
    "report_to": "none",
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main() -> None:
    options = parse()
    import_all(options.side)
    memory = PeakMemory()
    job = json.loads(options.job.read_text())
    clock = PhaseClock()
    lengths: list[float] = []
    make = make_trl if options.side.startswith("trl") else make_ours
    trainer, audit = make(options, job, clock, lengths)
    clock.enter("other")
    started_s = now_s()
    trainer.train()
    wall_s = now_s() - started_s
    clock.enter(None)
    figures = outcome(trainer, audit, clock, lengths, wall_s)
    figures["peak_bytes"] = memory.peak_bytes()
    if audit is not None:
        figures["planned_peak_bytes"] = planned_peak_bytes(options.side, job)
    options.output.write_text(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", required=True)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def import_all(side: str) -> None:
    """All libraries that the run needs, so that they do not count as its memory."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    if side.startswith("trl"):
        import trl.experimental.ppo  # noqa: F401
    else:
        import trl_sync.audit.callback
        import trl_sync.ppo  # noqa: F401
    _ = transformers.Trainer


def make_trl(options: argparse.Namespace, job: dict[str, Any], clock: Any, lengths: Any) -> Any:
    """TRL's trainer with four full models, or with `peft_config` on the policy."""
    import numpy as np
    from peft import LoraConfig
    from trl.experimental.ppo import PPOTrainer, ppo_trainer

    with_adapter = options.side == "trl_peft"
    rate = job["learning_rates"]["lora" if with_adapter else "full"]
    trainer = PPOTrainer(
        **common(options, job, rate),
        model=causal(job),
        ref_model=None if with_adapter else causal(job),
        reward_model=classifier(job),
        value_model=classifier(job),
        peft_config=LoraConfig(**LORA) if with_adapter else None,
    )
    generate, permutation, log = ppo_trainer.batch_generation, np.random.permutation, trainer.log

    def timed_generation(model: Any, queries: Any, *args: Any) -> Any:
        clock.enter("rollout")
        sequences, logits = generate(model, queries, *args)
        clock.enter("score")
        lengths.extend(response_lengths(sequences[:, queries.shape[1] :], trainer.stop_token_id))
        return sequences, logits

    def timed_permutation(size: int) -> Any:
        clock.enter("update")
        return permutation(size)

    def timed_log(*args: Any, **kwargs: Any) -> None:
        clock.enter("other")
        log(*args, **kwargs)

    ppo_trainer.batch_generation, trainer.log = timed_generation, timed_log
    np.random.permutation = timed_permutation  # only its updates draw one
    return trainer, None


def make_ours(options: argparse.Namespace, job: dict[str, Any], clock: Any, lengths: Any) -> Any:
    """Our trainer with four full models, or on one shared base, in fp32 (bf16) or in NF4."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    from trl_sync import PPOTrainer, SyncAuditCallback, load_reward_model, load_shared_backbone

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.enter("update")

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.enter("other")

    class TimedAudit(SyncAuditCallback):
        """Knows what it took between its first look and its last, which see everything."""

        updates_s = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_begin(*args, **kwargs)
            self._begin_s = self.summary().seconds

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.updates_s = self.summary().seconds - self._begin_s
            super().on_train_end(*args, **kwargs)

    separate = options.side == "ours_separate"
    rate = job["learning_rates"]["full" if separate else "lora"]
    if separate:
        models = {
            "model": causal(job),
            "ref_model": causal(job),
            "reward_model": classifier(job),
            "value_model": classifier(job),
        }
    else:
        loading = frozen_options(job, quantized=options.side.startswith("ours_nf4"))
        models = {
            "model": load_shared_backbone(job["model"], LoraConfig(**LORA), **loading),
            "reward_model": load_reward_model(job["reward_model"], **loading),
        }
    audit = TimedAudit(modules={"reward": models["reward_model"]})
    trainer = PPOTrainer(**common(options, job, rate), **models, callbacks=[audit, Clock()])
    time_rollouts(trainer, clock)
    return trainer, audit


def time_rollouts(trainer: Any, clock: Any) -> None:
    """Has the clock tell rollout and scoring apart."""
    from trl_sync.ppo import experience

    roll_out, score = experience.roll_out, experience.score

    def timed_roll_out(*args: Any, **kwargs: Any) -> Any:
        clock.enter("rollout")
        return roll_out(*args, **kwargs)

    def timed_score(*args: Any, **kwargs: Any) -> Any:
        clock.enter("score")
        return score(*args, **kwargs)

    experience.roll_out, experience.score = timed_roll_out, timed_score


def common(options: argparse.Namespace, job: dict[str, Any], rate: float) -> dict[str, Any]:
    """The arguments that a TRL user and ours pass alike."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, set_seed

    if options.side.startswith("trl"):
        from trl.experimental.ppo import PPOConfig
    else:
        from trl_sync import PPOConfig
    # TRL draws the order of its updates from numpy's global generator, which it never seeds.
    set_seed(options.seed)
    prompts = Dataset.from_dict({"input_ids": job["prompts"]})
    return {
        "args": PPOConfig(
            output_dir=str(options.output.with_suffix("")),
            seed=options.seed,
            learning_rate=rate,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=options.side == "ours_nf4_ckpt",
            **SETTINGS | job["settings"],
        ),
        "processing_class": AutoTokenizer.from_pretrained(job["model"], padding_side="left"),
        "train_dataset": prompts,
        "eval_dataset": prompts,
    }


def causal(job: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job["model"])


def classifier(job: dict[str, Any]) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(job["reward_model"], num_labels=1)


def frozen_options(job: dict[str, Any], *, quantized: bool) -> dict[str, Any]:
    """How the frozen models are loaded."""
    import torch
    from transformers import BitsAndBytesConfig

    if not quantized:
        return {}
    compute = torch.bfloat16 if job["settings"]["bf16"] else torch.float32
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    }


def response_lengths(responses: Any, stop: int | None) -> list[int]:
    """Tokens of each response up to and including the first `stop`."""
    if stop is None:
        return [responses.shape[1]] * len(responses)
    return [[*row, stop].index(stop) + 1 for row in responses.tolist()]


def outcome(
    trainer: Any, audit: Any, clock: PhaseClock, lengths: list[float], wall_s: float
) -> dict[str, Any]:
    rows = [row for row in trainer.state.log_history if "objective/scores" in row]
    tenth = max(1, len(rows) // 10)
    seconds = dict(clock.seconds) | {"audit": 0.0}
    audited_updates_s = 0.0
    if audit is not None:
        seconds["audit"], audited_updates_s = audit.summary().seconds, audit.updates_s
        # The clock does not know of the audit: at updates it counts as theirs.
        seconds["update"] -= audited_updates_s
        seconds["other"] -= seconds["audit"] - audited_updates_s
        lengths = [row["objective/response_length"] for row in rows]
    limit = trainer.args.response_length
    return {
        "episodes": trainer.args.total_episodes,
        "wall_s": wall_s,
        "episodes_per_s": trainer.args.total_episodes / wall_s,
        "seconds": seconds,
        "audited_updates_s": audited_updates_s,
        "state_bytes": state_bytes(trainer),
        "mean_response": statistics.mean(min(length, limit) for length in lengths),
        "response_limit": limit,
        "first_reward": statistics.mean(row["objective/scores"] for row in rows[:tenth]),
        "last_reward": statistics.mean(row["objective/scores"] for row in rows[-tenth:]),
    }


def planned_peak_bytes(side: str, job: dict[str, Any]) -> int:
    """What `trl-sync env --plan` computes for this run: the floor of its peak on a GPU."""
    import torch

    from trl_sync.backbone.logprob import default_chunk_bytes
    from trl_sync.planning.architecture import read_architecture
    from trl_sync.planning.options import PlanOptions
    from trl_sync.planning.plan import make_plan

    settings, separate = job["settings"], side == "ours_separate"
    in_4bit = side.startswith("ours_nf4")
    shared = {} if separate else {
        "lora_rank": LORA["r"],
        "lora_dropout": 0.0,
        "quantization": "nf4" if in_4bit else "none",
    }  # fmt: skip
    plan = PlanOptions(
        model=read_architecture(job["model"]),
        reward=read_architecture(job["reward_model"]),
        reward_in_4bit=in_4bit,
        separate=separate,
        batch=settings["per_device_train_batch_size"],
        rollout_batch=settings["local_rollout_forward_batch_size"],
        prompt_tokens=max(map(len, job["prompts"])),
        response_tokens=settings["response_length"],
        dtype="bf16" if settings["bf16"] else "fp32",
        gradient_checkpointing=side == "ours_nf4_ckpt",
        logprob_chunk_bytes=default_chunk_bytes(
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ),
        **shared,
    )
    return make_plan(plan).peak_bytes


def state_bytes(trainer: Any) -> dict[str, int]:
    """Bytes of what all models consist of (with quantization state), gradients and optimizer."""
    import torch

    models = [trainer.model, trainer.reward_model, getattr(trainer, "ref_model", None)]
    held: dict[int, Any] = {}
    for model in models:
        if isinstance(model, torch.nn.Module):
            held |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    trained = [tensor for tensor in held.values() if tensor.requires_grad]
    states = trainer.optimizer.state.values()
    return {
        "parameters": sum(tensor.nbytes + quantization_bytes(tensor) for tensor in held.values()),
        "gradients": sum(tensor.nbytes for tensor in trained),
        "optimizer": sum(
            value.nbytes for state in states for value in state.values() if torch.is_tensor(value)
        ),
    }


def quantization_bytes(tensor: Any) -> int:
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return 0
    nested = state.state2
    parts = [state.absmax, state.code] + ([] if nested is None else [nested.absmax, nested.code])
    return sum(part.nbytes for part in parts)


if __name__ == "__main__":
    main()
