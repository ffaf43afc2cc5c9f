# make demo    install and run the main job (TASK=inverted-pendulum, or TASK=hopper)
# make test    lint, types, import floors, tests
# make world   train the default world that ships in the wheel again
# make bench   measure speed on this machine beside the peers, in a venv of its own; writes benchmarks/results.md
# make reproduce   run every experiment (hours), refresh docs/reproduce.md; goes on where it was stopped
PYTHON ?= python3
VENV ?= .venv
TASK ?= inverted-pendulum
BIN := $(VENV)/bin
BENCH ?= $(VENV)-bench

.PHONY: demo test world bench reproduce clean

demo: $(VENV)/.base
	$(BIN)/learneddyn demo --task $(TASK) --resume true

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal --durations 15

world: $(VENV)/.base
	$(BIN)/learneddyn collect InvertedPendulum-v5 learneddyn/pendulum-random-v0 --steps 2000 --overwrite true
	$(BIN)/learneddyn collect InvertedPendulum-v5 learneddyn/pendulum-medium-v0 --steps 4000 --grade medium \
	  --algorithm PPO --algorithm_kwargs '{n_steps: 512}' --target_return 900 --train_steps 100000 --overwrite true
	$(BIN)/learneddyn fit --config inverted-pendulum

bench: $(BENCH)/.bench
	$(BENCH)/bin/python benchmarks/run.py

reproduce: $(VENV)/.reproduce
	$(BIN)/learneddyn reproduce all --docs docs --resume true

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.reproduce: $(VENV)/.base
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[reproduce]'
	touch $@

# mbrl-lib asks for releases that nothing else here can live with; it runs on today's (the bench extra brings them).
$(BENCH)/.bench: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BENCH)/bin/python -m pip install -q --no-deps mbrl==0.2.0
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
