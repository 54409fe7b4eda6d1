"""A drill of the audit on a real trainer: TRL's SFTTrainer with one planted fault.

    accelerate launch --config_file recipes/accelerate_configs/cpu_2.yaml recipes/audit_demo.py
    ... recipes/audit_demo.py --fault bit_flipped --step 5

Your own script is drilled in the same way: `with planted(...)` around `trainer.train()`. The faults
are those of `trl-sync demo --list` that strike a model or an optimizer while it is trained. Without
--fault that is gradient_not_reduced, or on one process, which has nobody to differ from, a byte of
the frozen base that changes. Faults of a rank that is killed or late end the processes; the message
is then in the log alone.

Ends with 0 if the audit named the cause that the fault stands for, else with 1.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from sft_audited import reviews
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from embedded_default import embedded_default
from inputs import load_causal_model, trainer_parser
from trl_sync import ConfigError, DesyncError, SyncAuditCallback
from trl_sync.audit.faults import FAULTS, FaultNotPlantedError, Planted

EMBEDDED_SETTINGS = {
    "output_dir": "runs/audit-demo",
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "use_peft": True,
    "lora_target_modules": ["all-linear"],
    "max_length": 64,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
TIMEOUT_S = 10.0
# A frozen byte is found at the latest after this many updates: less than the drill has left.
COVER_UPDATES = 4


@dataclass
class DrillArguments:
    """Which fault strikes when."""

    fault: str | None = field(
        default=None, metadata={"help": "A fault, or a cause: its first fault."}
    )
    step: int = field(default=3, metadata={"help": "The optimizer step in which it strikes."})


def main() -> None:
    parser = trainer_parser((DrillArguments, SFTConfig, ModelConfig), __doc__, EMBEDDED_SETTINGS)
    try:
        sys.exit(0 if drill(*parser.parse_args_and_config()) else 1)
    except (ConfigError, FaultNotPlantedError) as error:
        sys.exit(f"error: {error}")


def drill(drill_args: DrillArguments, config: SFTConfig, model_args: ModelConfig) -> bool:
    """True if the audit named the planted fault's cause."""
    alone = config.world_size == 1
    default = "frozen_changed" if alone else "gradient_not_reduced"
    expected = FAULTS[find(drill_args.fault or default)]
    path = model_args.model_name_or_path or str(embedded_default().model_path)
    trainer = SFTTrainer(
        load_causal_model(path, model_args),
        config,
        train_dataset=reviews(config.seed),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=get_peft_config(model_args),
        callbacks=[SyncAuditCallback(timeout_s=TIMEOUT_S, frozen_cover_steps=COVER_UPDATES)],
    )
    try:
        with planted(expected.name, trainer, drill_args.step):
            trainer.train()
    except DesyncError as error:
        if trainer.is_world_process_zero():
            print(f"Planted {expected.name} in step {drill_args.step}. The audit says:\n\n{error}")
        return bool(error.findings) and error.findings[0].cause == expected.cause
    print(f"Planted {expected.name}, and the audit was silent.", file=sys.stderr)
    return False


def find(name: str) -> str:
    """A fault by its name, or the first one with this cause."""
    names = [fault.name for fault in FAULTS.values() if name in (fault.name, fault.cause)]
    if not names:
        raise ConfigError(f"no fault or cause is called {name!r}; see trl-sync demo --list.")
    return names[0]


def planted(fault: str, trainer: SFTTrainer, step: int) -> AbstractContextManager[Planted]:
    """The fault's block, with what it asks for out of what a trainer has before it trains."""
    offered: dict[str, Any] = {"model": trainer.model, "step": step, "delay_s": 3 * TIMEOUT_S}
    if trainer.args.world_size == 1:
        offered["rank"] = 0
    plant = FAULTS[fault].plant
    parameters = inspect.signature(plant).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty}
    if required - set(offered) or "step" not in inspect.signature(plant).parameters:
        raise ConfigError(f"{fault} strikes no model in training: try trl-sync demo.")
    return plant(**{p.name: offered[p.name] for p in parameters if p.name in offered})


if __name__ == "__main__":
    main()
