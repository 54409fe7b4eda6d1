"""Runs recipes/ppo.py under a launcher's config for GPUs, on CPU ranks.

    accelerate launch --config_file CONFIG.yaml on_cpu_ranks.py ENGINE FLAGS

accelerate offers neither DeepSpeed nor FSDP on CPUs by itself: see tests/engines.py.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "recipes")]

if __name__ == "__main__":
    from engines import bring_up

    recipe = str(ROOT / "recipes/ppo.py")
    engine, flags = sys.argv[1], sys.argv[2:]
    bring_up(engine)
    sys.argv = [recipe, *flags, "--accelerator_config", '{"use_configured_state": true}']
    runpy.run_path(recipe, run_name="__main__")
