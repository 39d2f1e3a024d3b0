# Everything runs in .venv, which `make setup` creates and, when the requirements change, brings up to date.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO := outputs/demo
# The full data: Debian's package dataset-fashion-mnist, or else what torchvision downloads.
FASHION_MNIST ?= $(firstword $(wildcard /usr/share/datasets/fashion-mnist) outputs/fashion-mnist)

.PHONY: setup demo ablation test test-all faults lint clean

setup: $(READY)

# torch is asked for together with torchvision, which pins the build it belongs to.
$(READY): requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: setup
	rm -rf $(DEMO)
	$(BIN)/python main.py @recipes/demo.args
	$(BIN)/python main.py @recipes/demo.args --finetune $(DEMO)/checkpoint-last.pth \
		--model_key model_ema --switch_to_deploy $(DEMO)/deploy.pth

ablation: setup
	$(BIN)/python ablation.py --data_path $(FASHION_MNIST)

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-all: setup
	$(BIN)/python -m pytest

# The thorough form of tests/faults/; it writes the page only if all of it holds.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults --reliability docs/RELIABILITY.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache
