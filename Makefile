# Every target makes its own environment in .venv from any Python >= 3.12; `make VENV=elsewhere ...` puts it elsewhere.
export VENV ?= .venv
BIN := $(VENV)/bin
TEXT := examples/texts/pride_and_prejudice.txt
PICTURE := demo/cache.png
QUESTION := examples/question.txt

.PHONY: help demo test lint format typecheck bench clean

help:
	@echo "make demo       a real model answers from a full and from a compressed cache, side by side"
	@echo "make test       the test suite"
	@echo "make lint       ruff, and the README's generated parts"
	@echo "make typecheck  basedpyright"
	@echo "make format     rewrite the sources in ruff's format, and the README's generated parts"
	@echo "make bench      decode and prefill times on this CPU, into examples/results/cpu.json"

demo:
	@.ci/environment
	$(BIN)/minikv compare --prompt-file $(TEXT) --raw --one-line --max-new-tokens 32 --picture $(PICTURE) \
		"$$(cat $(QUESTION))"

test:
	@.ci/environment test
	$(BIN)/python -m pytest -n 2 --durations=10

lint:
	@.ci/environment dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m minikv_jax.bench.tables --check README.md
	$(BIN)/python -m minikv_jax.bench.tables --check examples/quality.md

typecheck:
	@.ci/environment dev
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format:
	@.ci/environment dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m minikv_jax.bench.tables --write README.md
	$(BIN)/python -m minikv_jax.bench.tables --write examples/quality.md

bench:
	@.ci/environment
	$(BIN)/python -m minikv_jax.bench.cpu --out examples/results/cpu.json

clean:
	rm -rf $(VENV) demo
