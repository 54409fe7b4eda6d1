"""PPO on sentiment prompts, as TRL's users write it: the calls of TRL's example `ppo.py`."""

import shutil

from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, ScriptArguments, get_peft_config
from trl.experimental.ppo import PPOConfig, PPOTrainer

EVALUATION_PROMPTS = 8


def tokenized(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, processes: int | None
) -> Dataset:
    """The prompts as `input_ids`, without any other column."""
    return dataset.map(
        lambda rows: {"input_ids": tokenizer(rows["prompt"], padding=False)["input_ids"]},
        batched=True,
        remove_columns=dataset.column_names,
        num_proc=processes,
    )


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_into_dataclasses()
    shutil.rmtree(training_args.output_dir, ignore_errors=True)

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    value_model, reward_model = (
        AutoModelForSequenceClassification.from_pretrained(
            training_args.reward_model_path, num_labels=1
        )
        for _ in range(2)
    )
    policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
    peft_config = get_peft_config(model_args)
    ref_policy = None
    if peft_config is None:
        ref_policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)

    dataset = load_dataset(
        script_args.dataset_name,
        name=script_args.dataset_config,
        split=script_args.dataset_train_split,
    )
    prompts = len(dataset) - EVALUATION_PROMPTS
    train_dataset = dataset.select(range(prompts))
    eval_dataset = dataset.select(range(prompts, len(dataset)))
    with PartialState().local_main_process_first():
        train_dataset = tokenized(train_dataset, tokenizer, training_args.dataset_num_proc)
        eval_dataset = tokenized(eval_dataset, tokenizer, training_args.dataset_num_proc)

    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )
    trainer.train()

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)

    trainer.generate_completions()
