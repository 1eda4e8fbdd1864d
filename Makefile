# Two commands do everything: `make demo` and `make test`. Both set up a virtual environment first, once.
# PYTHON names another interpreter (3.11 or later), VENV another place for the environment.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
EXTRAS := prune,fast,ort,trt-rtx,report,dev

DEMO := prune --model resnet18 --data digits --criterion chip --macs 0.5 --target ort-cpu
DEMO_RTX := --target trt-rtx:sm86,sm89
DEMO_OUT := --out runs/demo

.PHONY: help setup demo test test-matrix lint types format pytest wheel doctor clean

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 13

setup: $(STAMP)  ## a virtual environment with everything in it, once

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later was found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: setup  ## prune, export, build and measure a real network: about five minutes on two cores
	@if $(BIN)/python -c 'import tensorrt_rtx' >/dev/null 2>&1; then rtx='$(DEMO_RTX)'; \
	else rtx=''; echo 'TensorRT-RTX has no package for this platform: the demo leaves the target trt-rtx out.'; fi; \
	set -x; $(BIN)/chip-deploy $(DEMO) $$rtx $(DEMO_OUT)

test: setup lint pytest  ## lint, types and the tests, all but the matrix

test-matrix: setup  ## every network by every criterion: an hour of one core; ONLY='densenet40 or lamp' for a part
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m matrix $(if $(ONLY),-k '$(ONLY)') deploy_tests/zoo

lint: setup types  ## style, import bans and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: setup  ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pytest: setup  ## the tests alone, in JOBS processes of one thread each (a core each, four at most)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 25

wheel: setup  ## dist/*.whl
	$(BIN)/python -m build --wheel

doctor: setup  ## what this machine can do
	$(BIN)/chip-deploy doctor

clean:  ## take away what was built; the environment and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
