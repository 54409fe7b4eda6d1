"""PPO on summaries, as TRL's users write it: the calls of TRL's example `ppo_tldr.py`."""

import shutil

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from trl.experimental.ppo import PPOConfig, PPOTrainer

LONGEST_PROMPT = 512


def prepared(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, processes: int | None
) -> Dataset:
    """The prompts as `input_ids` with their `lengths`, the longest ones left out."""

    def tokenize(row: dict) -> dict:
        input_ids = tokenizer(row["prompt"], padding=False)["input_ids"]
        return {"input_ids": input_ids, "lengths": len(input_ids)}

    dataset = dataset.map(tokenize, remove_columns=dataset.column_names, num_proc=processes)
    return dataset.filter(lambda row: row["lengths"] <= LONGEST_PROMPT, num_proc=processes)


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_into_dataclasses()
    shutil.rmtree(training_args.output_dir, ignore_errors=True)

    dtype = model_args.dtype
    if dtype not in ("auto", None):
        dtype = getattr(torch, dtype)
    model_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": dtype,
    }
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        model_kwargs["quantization_config"] = quantization_config

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    value_model, reward_model = (
        AutoModelForSequenceClassification.from_pretrained(
            training_args.reward_model_path, num_labels=1, **model_kwargs
        )
        for _ in range(2)
    )
    sft = training_args.sft_model_path
    policy = AutoModelForCausalLM.from_pretrained(sft, **model_kwargs)
    peft_config = get_peft_config(model_args)
    ref_policy = None
    if peft_config is None:
        ref_policy = AutoModelForCausalLM.from_pretrained(sft, **model_kwargs)

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    train_dataset = dataset[script_args.dataset_train_split]
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = dataset[script_args.dataset_test_split]
    with PartialState().local_main_process_first():
        train_dataset = prepared(train_dataset, tokenizer, training_args.dataset_num_proc)
        if eval_dataset is not None:
            eval_dataset = prepared(eval_dataset, tokenizer, training_args.dataset_num_proc)
    assert train_dataset[0]["input_ids"][-1] != tokenizer.eos_token_id

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
