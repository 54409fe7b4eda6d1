"""PPO with a verifiable reward: 1.0 for the right number, 0.0 for anything else.

Without arguments: sums of two digits. A small model is first taught them by examples of which four
in ten are wrong, and answers as they do; PPO, which sees only right or wrong, makes more of its
answers right. About two minutes on two CPU cores:

    accelerate launch recipes/ppo_math.py

With your own model on GSM8K, or on any data with columns `question` and `answer`:

    accelerate launch recipes/ppo_math.py --model_name_or_path my/sft-model \\
        --dataset_name openai/gsm8k --dataset_config main --response_length 256 --stop_token eos \\
        --output_dir runs/gsm8k

The mean score in the log is the accuracy of the sampled answers: learning_curve.png has its curve,
summary.json that of the answers to the evaluation questions, before and after.
"""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import ppo_run
from datasets import Dataset
from lessons import taught_policy
from trl import ModelConfig

from embedded_default import embedded_default
from inputs import ScriptArguments, load_prompts
from trl_sync import PPOConfig

EMBEDDED_SETTINGS = ppo_run.EMBEDDED_SETTINGS | {
    "output_dir": "runs/ppo-math",
    "total_episodes": 5120,
    "response_length": 4,
    "learning_rate": 5e-3,
    "kl_coef": 0.01,
    "missing_eos_penalty": None,
}
PROMPT = "Question: {question}\nAnswer:"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
LARGEST = 9
REPEATS = 10
WRONG_SHARE = 0.4
NUM_LESSONS = 12800


def main() -> None:
    ppo_run.main(run, __doc__, EMBEDDED_SETTINGS)


def run(script: ScriptArguments, config: PPOConfig, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        untaught, folder = str(embedded_default().model_path), Path(config.output_dir) / "taught"
        path = str(taught_policy(untaught, lessons(), folder))
        train, test = sums(config.seed)
    else:
        path = model_args.model_name_or_path
        train, test = (as_problems(split) for split in load_prompts(script, config, None))
    trainer, audit = ppo_run.make_trainer((script, config, model_args), path, is_right, train, test)
    summary, before, after = ppo_run.train(trainer, audit)
    summary |= {"accuracy_before": mean(before["score"]), "accuracy_after": mean(after["score"])}
    if trainer.is_world_process_zero():
        ppo_run.write_outcome(trainer, summary, reward="accuracy")


def is_right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The reward: whether the last number of the completion is that of the answer."""
    return [
        float(found is not None and found == last_number(expected))
        for found, expected in zip(map(last_number, completions), answer, strict=True)
    ]


def last_number(text: str) -> float | None:
    """The last number in a text; GSM8K's answers end with it, behind `####`."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def as_problems(questions: Dataset) -> Dataset:
    """The columns `prompt` and `answer` of a dataset of questions and answers."""
    prompts = [PROMPT.format(question=question) for question in questions["question"]]
    return Dataset.from_dict({"prompt": prompts, "answer": questions["answer"]})


def sums(seed: int) -> tuple[Dataset, Dataset]:
    """Prompts to train on, with every sum `REPEATS` times, and all sums to evaluate on."""
    numbers = range(LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    problems = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in pairs]
    repeated = problems * REPEATS
    Random(seed).shuffle(repeated)
    return Dataset.from_list(repeated), Dataset.from_list(problems)


def lessons() -> list[dict[str, str]]:
    """Sums as a careless teacher gives them."""
    random = Random(0)

    def lesson() -> dict[str, str]:
        a, b = random.randint(0, LARGEST), random.randint(0, LARGEST)
        wrong = random.random() < WRONG_SHARE
        said = random.randint(0, 2 * LARGEST) if wrong else a + b
        return {"prompt": f"{a} + {b} =", "completion": f" {said}"}

    return [lesson() for _ in range(NUM_LESSONS)]


if __name__ == "__main__":
    main()
