"""Summaries by PPO, judged by a reward model that was trained on preferences.

Without arguments the posts are reviews of the embedded task, and a summary says in three words what
its author thinks. A small model is taught by examples half of which are wrong or longwinded, a
reward model by pairs of a good and a bad summary; then PPO. About three minutes on two CPU cores:

    accelerate launch recipes/ppo_tldr.py

On the posts of TL;DR, with a summarizer and a reward model that were trained before:

    accelerate launch recipes/ppo_tldr.py \\
        --model_name_or_path cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr \\
        --reward_model_path cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr \\
        --dataset_name trl-lib/tldr --response_length 53 --stop_token eos \\
        --missing_eos_penalty 1.0 --output_dir runs/tldr

A reward model of your own preferences: recipes/reward_audited.py.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import ppo_run
from datasets import Dataset
from lessons import taught_policy, taught_reward
from trl import ModelConfig

from embedded_default import REVIEWS, embedded_default, judge
from embedded_default.grammar import STANCES, draw_completion, prompts
from inputs import ScriptArguments, load_prompts, load_reward
from trl_sync import ConfigError, PPOConfig

EMBEDDED_SETTINGS = ppo_run.EMBEDDED_SETTINGS | {
    "output_dir": "runs/ppo-tldr",
    "total_episodes": 2560,
    "response_length": 24,
}
SUMMARIES = {
    "positive": " They liked it.",
    "negative": " They disliked it.",
    "neutral": " They were undecided.",
}
NUM_EXAMPLES, NUM_PAIRS, NUM_PROMPTS = 6400, 3200, 1280
HELD_OUT = 256
BAD_SHARE = 0.5


def main() -> None:
    ppo_run.main(run, __doc__, EMBEDDED_SETTINGS)


def run(script: ScriptArguments, config: PPOConfig, model_args: ModelConfig) -> None:
    embedded = model_args.model_name_or_path is None
    if embedded:
        path, reward, train, test = embedded_task(Path(config.output_dir))
        reward = load_reward(script, config, None) or str(reward)
    else:
        path, reward = model_args.model_name_or_path, load_reward(script, config, None)
        if reward is None:
            raise ConfigError("No reward: give --reward_model_path, or train one first.")
        train, test = load_prompts(script, config, None)
    trainer, audit = ppo_run.make_trainer((script, config, model_args), path, reward, train, test)
    summary, before, after = ppo_run.train(trainer, audit)
    if embedded:
        summary |= {"right_before": right_share(before), "right_after": right_share(after)}
    if trainer.is_world_process_zero():
        ppo_run.write_outcome(trainer, summary)


def embedded_task(folder: Path) -> tuple[str, Path, Dataset, Dataset]:
    """The summarizer, the reward model, and posts to train and to evaluate on."""
    random, openings = Random(0), list(prompts(REVIEWS))

    def post() -> str:
        opening = random.choice(openings)
        return opening.text + draw_completion(REVIEWS, opening, random.choice(STANCES), random)

    def example() -> dict[str, str]:
        text = post()
        bad = random.random() < BAD_SHARE
        return {
            "prompt": asked(text),
            "completion": bad_summary(text, random) if bad else right_summary(text),
        }

    def preference() -> dict[str, str]:
        text = post()
        return {
            "prompt": asked(text),
            "chosen": right_summary(text),
            "rejected": bad_summary(text, random),
        }

    untaught = str(embedded_default().model_path)
    path = taught_policy(untaught, [example() for _ in range(NUM_EXAMPLES)], folder / "taught")
    pairs = [preference() for _ in range(NUM_PAIRS)]
    reward = taught_reward(untaught, pairs, folder / "reward")
    posts = Dataset.from_list([{"prompt": asked(post())} for _ in range(NUM_PROMPTS + HELD_OUT)])
    held_out = range(NUM_PROMPTS, NUM_PROMPTS + HELD_OUT)
    return str(path), reward, posts.select(range(NUM_PROMPTS)), posts.select(held_out)


def asked(post: str) -> str:
    return f"{post}\nTL;DR:"


def right_summary(post: str) -> str:
    """What a reader of the post would say: the verdict of the grammar's judge."""
    return SUMMARIES[judge(post).label]


def bad_summary(post: str, random: Random) -> str:
    """Another verdict, or the post all over again."""
    if random.random() < 0.5:
        return " " + post
    return random.choice([s for s in SUMMARIES.values() if s != right_summary(post)])


def right_share(answers: ppo_run.Columns) -> float:
    """The share of posts whose summary is the right one."""
    pairs = zip(answers["query"], answers["model response"], strict=True)
    right = [said == right_summary(query.removesuffix("\nTL;DR:")) for query, said in pairs]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
