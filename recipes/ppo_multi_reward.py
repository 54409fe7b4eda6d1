"""PPO with two rewards: a reward adapter on the shared base, and a function of the length.

Policy, value model, reference and reward model are then one base in memory with three adapters.
Without arguments the reward adapter is trained on the spot, on pairs of reviews; the function asks
for reviews of twelve words. About two minutes on two CPU cores:

    accelerate launch recipes/ppo_multi_reward.py

With your own model, and a reward adapter that was trained on that very model:

    accelerate launch recipes/reward_audited.py --model_name_or_path my/sft-model --use_peft \\
        --lora_task_type SEQ_CLS --dataset_name my/pairs --output_dir runs/my-reward
    accelerate launch recipes/ppo_multi_reward.py --model_name_or_path my/sft-model \\
        --reward_model_path runs/my-reward --reward_weights 1.0 0.5 \\
        --dataset_name my/prompts --stop_token eos --output_dir runs/mine

--reward_function file.py:name takes the place of the length function. Each reward has a curve of
its own in the log; their weighted sum is what PPO maximises.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import ppo_run
from lessons import taught_reward
from peft import LoraConfig
from trl import ModelConfig

from embedded_default import embedded_default
from embedded_default.corpus import draw_corpus
from inputs import ScriptArguments, load_function, load_prompts
from trl_sync import ConfigError, PPOConfig

EMBEDDED_SETTINGS = ppo_run.EMBEDDED_SETTINGS | {
    "output_dir": "runs/ppo-multi-reward",
    "total_episodes": 1280,
    "reward_weights": [1.0, 2.0],
}
WORDS_WANTED = 12
NUM_PAIRS = 3200


def main() -> None:
    ppo_run.main(run, __doc__, EMBEDDED_SETTINGS)


def run(script: ScriptArguments, config: PPOConfig, model_args: ModelConfig) -> None:
    task = embedded_default() if model_args.model_name_or_path is None else None
    path = model_args.model_name_or_path or str(task.model_path)
    train, test = load_prompts(script, config, task)
    adapter = reward_adapter(path, config, embedded=task is not None)
    length = load_function(script.reward_function) if script.reward_function else close_to_length
    trainer, audit = ppo_run.make_trainer(
        (script, config, model_args), path, [adapter, length], train, test
    )
    summary, before, after = ppo_run.train(trainer, audit)
    summary |= {"words_before": mean_words(before), "words_after": mean_words(after)}
    if trainer.is_world_process_zero():
        ppo_run.write_outcome(trainer, summary)


def reward_adapter(path: str, config: PPOConfig, *, embedded: bool) -> str:
    """The reward adapter's folder: the one given, or for the embedded task one trained now."""
    if config.reward_model_path != PPOConfig.reward_model_path:  # TRL's default is no reward model
        return config.reward_model_path
    if not embedded:
        raise ConfigError("No reward: give --reward_model_path, an adapter on that model.")
    pairs = draw_corpus(0, NUM_PAIRS, config.seed + 1).pairs
    wanted = ("prompt", "chosen", "rejected")
    lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear")
    folder = Path(config.output_dir) / "reward"
    rows = [{name: str(pair[name]) for name in wanted} for pair in pairs]
    return str(taught_reward(path, rows, folder, lora))


def close_to_length(completions: list[str], **columns: Any) -> list[float]:
    """0.0 for a completion of `WORDS_WANTED` words, less the further its length is from that."""
    return [-abs(len(text.split()) - WORDS_WANTED) / WORDS_WANTED for text in completions]


def mean_words(answers: ppo_run.Columns) -> float:
    return mean(len(answer.split()) for answer in answers["model response"])


if __name__ == "__main__":
    main()
