# Every target makes its own environment in .venv from any Python >= 3.12; `make VENV=elsewhere ...` puts it elsewhere.
export VENV ?= .venv
BIN := $(VENV)/bin
TEXT := examples/texts/pride_and_prejudice.txt
PICTURE := demo/cache.png
QUESTION := examples/question.txt
SPREAD := -n 2 --dist worksteal
PYTEST := $(BIN)/python -m pytest $(SPREAD)
SLOW := -m 'slow and not gpu'
GENERATED := README.md $(addprefix docs/,methods.md models.md speed.md losses.md quality.md promises.md)
MANY := -m 'hypothesis and not gpu' --hypothesis-profile many

.PHONY: help demo test slow properties coverage promises lint format typecheck docs bench clean

help:
	@echo "make demo       a real model answers from a full and from a compressed cache, side by side"
	@echo "make test       the test suite, six minutes at most on two cores"
	@echo "make slow       the slow tests"
	@echo "make properties properties over 500 examples each instead of 25"
	@echo "make coverage   the test suite, and the lines that it runs: 95 % at least"
	@echo "make promises   the test suite, the slow tests, and docs/promises.md, the table of what they show"
	@echo "make lint       ruff, and the generated parts of documents"
	@echo "make typecheck  basedpyright"
	@echo "make format     rewrite the sources in ruff's format, and the generated parts of documents"
	@echo "make docs       the documents as a site, in site/"
	@echo "make bench      decode and prefill times on this CPU, into examples/results/cpu.json"

demo:
	@.ci/environment
	$(BIN)/minikv compare --prompt-file $(TEXT) --raw --one-line --max-new-tokens 32 --picture $(PICTURE) \
		"$$(cat $(QUESTION))"

test:
	@.ci/environment test
	$(PYTEST) --durations=10

slow:
	@.ci/environment test
	$(PYTEST) $(SLOW) --durations=20

properties:
	@.ci/environment test
	$(PYTEST) $(MANY)

coverage:
	@.ci/environment test
	COVERAGE_CORE=sysmon $(PYTEST) --durations=10 --cov --cov-report=term-missing:skip-covered

promises:
	@.ci/environment test
	$(PYTEST) --promises
	$(PYTEST) $(SLOW) --promises
	$(BIN)/python -m minikv_jax.bench.tables --write docs/promises.md

lint:
	@.ci/environment dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m minikv_jax.bench.tables --check $(GENERATED)

typecheck:
	@.ci/environment dev
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format:
	@.ci/environment dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m minikv_jax.bench.tables --write $(GENERATED)

docs:
	@.ci/environment docs
	$(BIN)/mkdocs build

bench:
	@.ci/environment
	$(BIN)/python -m minikv_jax.bench.cpu --out examples/results/cpu.json

clean:
	rm -rf $(VENV) demo site
