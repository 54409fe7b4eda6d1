VENV := .venv
PYTHON ?= python3
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# What a quick run leaves out: slow tests, several processes, comparisons with another TRL.
FAST := not slow and not ranks and not oracle

.PHONY: demo test test-fast test-floor engines engines-short bench lint format clean

# PPO on one shared 4-bit base, from nothing: builds a small task, solves it, shows before and after.
demo: $(INSTALLED)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
		--dynamo_backend no recipes/ppo.py

# All but the tests of the engines, which have commands of their own. Two files at a time, for a
# process has one thread, and even several ranks wait: for a launcher, for pip, for a timeout.
test: $(VENV)/.deepspeed .oracle/trl
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not engines"

# PPO and the audit under DDP, ZeRO-1/2/3, FSDP2 and HSDP on CPU ranks; ends with a table.
engines: $(VENV)/.deepspeed
	$(BIN)/python -m pytest -m engines

engines-short: $(VENV)/.deepspeed
	$(BIN)/python -m pytest -m "engines and not slow"

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "$(FAST)"

# The same on the oldest supported TRL and transformers, for what depends on them.
test-floor: $(INSTALLED) .floor/trl
	PYTHONPATH=$(CURDIR)/.floor $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		-m "$(FAST) and not newest" \
		tests/test_versions.py tests/test_value_head.py tests/backbone tests/ppo tests/legacy \
		tests/compat $(addprefix tests/audit/test_,inventory.py manifest_base.py manifest_tensors.py)

# PPO beside TRL 1.12 and against its own sizes; the figures lie in runs/bench.
bench: $(INSTALLED) .oracle/trl
	mkdir -p runs/bench
	$(BIN)/python recipes/bench/ppo_vs_trl.py --jobs 15m:natural --pairs 3 \
		--sides trl trl_peft ours_shared ours_nf4 --json runs/bench/natural.json
	$(BIN)/python recipes/bench/ppo_vs_trl.py --jobs 110m:limit --pairs 1 --json runs/bench/limit.json
	$(BIN)/python recipes/bench/scaling.py --quick --json runs/bench/scaling.json

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch is pinned in constraints.txt: an open range would take the newest CUDA build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Without its compiled operators, which it builds where they are used.
$(VENV)/.deepspeed: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel ninja py-cpuinfo hjson msgpack
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	touch $@

# The last TRL with a PPOTrainer, to compare with; beside the installed one, never imported with it.
.oracle/trl: $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps --target .oracle trl==1.12.0
	touch $@

# Beside the installed versions, before them on the path.
.floor/trl: constraints-floor.txt $(INSTALLED)
	rm -rf .floor
	$(BIN)/pip install --quiet --no-deps --target .floor --requirement constraints-floor.txt
	touch $@

clean:
	rm -rf $(VENV) .oracle .floor build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
