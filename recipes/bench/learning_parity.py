"""Does our PPO learn as well as TRL 1.12's? The embedded task, paired seeds, alternating runs.

    pip install --no-deps --target .oracle trl==1.12.0
    python recipes/bench/learning_parity.py --seeds 5 --json learning_parity.json

Each run is a process of its own that differs from its pair in the import alone: policy, reference,
reward and value model are four full models, made from the same files. Printed are the mean scores
of the last tenth of the episodes, their differences, and the lower end of the one-sided 95%
interval of the mean difference (t distribution), in standard deviations of the scores of single
episodes: of the policy that both begin with, and (smaller, so stricter) of TRL's last tenth.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ORACLE = ROOT / ".oracle"
# One-sided 95% quantiles of Student's t by degrees of freedom.
T_QUANTILES = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 9: 1.833}
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "num_ppo_epochs": 4,
    "response_length": 40,
    "stop_token": "eos",
    "temperature": 1.0,
    "learning_rate": 3e-4,
    # TRL steps its schedule once an iteration, we once an update: without one both are equal.
    "lr_scheduler_type": "constant",
    "kl_coef": 0.05,
    "missing_eos_penalty": 1.0,
    "local_rollout_forward_batch_size": 128,
    "num_sample_generations": 0,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "report_to": "none",
}


def main() -> None:
    options = parse()
    if options.child is not None:
        child(options)
        return
    outcome = compare(options)
    print(json.dumps(outcome, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(outcome, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds, at least 2")
    parser.add_argument("--episodes", type=int, default=2560)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--child", choices=("trl", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: an interval needs two")
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, in turns, and the interval of their differences."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from embedded_default import embedded_default

    task = embedded_default()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {
            "model": str(task.model_path),
            "reward_model": str(task.reward_model_path),
            "prompts": list(task.train_prompts["prompt"]),
        }
        (folder / "task.json").write_text(json.dumps(paths))
        for seed in range(options.seeds):
            # The order changes from pair to pair.
            sides = ("trl", "ours") if seed % 2 else ("ours", "trl")
            rows.append({side: run(side, seed, options.episodes, folder) for side in sides})
            print(f"seed {seed}: {rows[-1]}", file=sys.stderr)
    return judge(rows) | {"episodes": options.episodes, "runs": rows}


def run(side: str, seed: int, episodes: int, folder: Path) -> dict[str, float]:
    environment = dict(os.environ)
    if side == "trl":
        environment["PYTHONPATH"] = str(ORACLE)
    command = [sys.executable, "-W", "ignore", __file__, "--child", side, "--seed", str(seed)]
    command += ["--episodes", str(episodes), "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side}, seed {seed}:\n{done.stderr[-3000:]}")
    return json.loads((folder / f"{side}-{seed}.json").read_text())


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean difference and its lower bound, in standard deviations of TRL's scores."""
    differences = [row["ours"]["last"] - row["trl"]["last"] for row in rows]
    deviations = {
        when: statistics.mean(row["trl"][f"{when}_std"] for row in rows)
        for when in ("first", "last")
    }
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    lower = mean - T_QUANTILES[len(differences) - 1] * error
    return {
        "first_trl": statistics.mean(row["trl"]["first"] for row in rows),
        "first_ours": statistics.mean(row["ours"]["first"] for row in rows),
        "last_trl": statistics.mean(row["trl"]["last"] for row in rows),
        "last_ours": statistics.mean(row["ours"]["last"] for row in rows),
        "std_of_scores": deviations,
        "mean_difference_in_std": {when: mean / std for when, std in deviations.items()},
        "lower_bound_in_std": {when: lower / std for when, std in deviations.items()},
    }


def child(options: argparse.Namespace) -> None:
    """One run; writes the mean scores of its first and last tenth."""
    import time

    if options.child == "trl":
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
    else:
        from trl_sync import PPOConfig, PPOTrainer
    trainer = make_trainer(options, PPOConfig, PPOTrainer)
    stds: list[float] = []
    if options.child == "trl":
        record_scores(ppo_trainer, trainer.reward_model, stds)
    started_s = time.perf_counter()
    trainer.train()
    wall_s = time.perf_counter() - started_s
    rows = [row for row in trainer.state.log_history if "objective/scores" in row]
    scores = [row["objective/scores"] for row in rows]
    stds = stds or [row["objective/scores_std"] for row in rows]
    tenth = max(1, len(scores) // 10)
    outcome = {
        "first": statistics.mean(scores[:tenth]),
        "last": statistics.mean(scores[-tenth:]),
        "first_std": statistics.mean(stds[:tenth]),
        "last_std": statistics.mean(stds[-tenth:]),
        "kl_last": statistics.mean(row["objective/kl"] for row in rows[-tenth:]),
        "wall_s": wall_s,
    }
    (options.folder / f"{options.child}-{options.seed}.json").write_text(json.dumps(outcome))


def make_trainer(options: argparse.Namespace, config: Any, trainer: Any) -> Any:
    """The script of a TRL user: nothing in it tells whose trainer it makes."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        set_seed,
    )

    task = json.loads((options.folder / "task.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    prompts = Dataset.from_dict(
        {"input_ids": [tokenizer(prompt)["input_ids"] for prompt in task["prompts"]]}
    )
    # TRL draws the order of its updates from numpy's global generator, which it never seeds.
    set_seed(options.seed)

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            task["reward_model"], num_labels=1
        )

    return trainer(
        args=config(
            output_dir=str(options.folder / f"{options.child}-{options.seed}"),
            seed=options.seed,
            total_episodes=options.episodes,
            **SETTINGS,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(task["model"]),
        ref_model=AutoModelForCausalLM.from_pretrained(task["model"]),
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=prompts,
        eval_dataset=prompts,
    )


def record_scores(module: Any, reward_model: Any, stds: list[float]) -> None:
    """Appends the standard deviation of each batch of rewards, which TRL does not log."""
    get_reward = module.get_reward

    def recorded(model: Any, *args: Any) -> Any:
        result = get_reward(model, *args)
        if model is reward_model:
            stds.append(float(result[1].std()))
        return result

    module.get_reward = recorded


if __name__ == "__main__":
    main()
