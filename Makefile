# Everything runs in .venv, which `make setup` creates and, when the requirements change, brings up to date.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO := outputs/demo
DETECTION := outputs/detection
DETECT := object_detection/main.py @object_detection/recipes/demo.args
# The full data: Debian's package dataset-fashion-mnist, or else what torchvision downloads.
FASHION_MNIST ?= $(firstword $(wildcard /usr/share/datasets/fashion-mnist) outputs/fashion-mnist)

.PHONY: setup demo demo-detection ablation gpu test test-all faults lint clean

setup: $(READY)

# torch is asked for together with torchvision, which pins the build it belongs to.
$(READY): requirements.txt requirements-deploy.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: setup
	rm -rf $(DEMO)
	$(BIN)/python main.py @recipes/demo.args
	$(BIN)/python main.py @recipes/demo.args --finetune $(DEMO)/checkpoint-last.pth \
		--model_key model_ema --switch_to_deploy $(DEMO)/deploy.pth

demo-detection: setup
	rm -rf $(DETECTION) outputs/garments
	$(BIN)/python -m object_detection.make_garments outputs/garments
	$(BIN)/python main.py @object_detection/recipes/demo_backbone.args
	$(BIN)/python $(DETECT) --backbone_weights $(DETECTION)/backbone/checkpoint-last.pth
	$(BIN)/python $(DETECT) --finetune $(DETECTION)/checkpoint-last.pth --model_key model_ema \
		--switch_to_deploy $(DETECTION)/deploy.pth
	$(BIN)/python $(DETECT) --finetune $(DETECTION)/deploy.pth --deploy true \
		--eval true --draw $(DETECTION)/detections.png

ablation: setup
	$(BIN)/python ablation.py --data_path $(FASHION_MNIST)

# Everything that takes a GPU, in any environment with torch and timm: what else is missing is named and left out.
# DRY=1 walks through it on the CPU.
GPU_PYTHON ?= $(if $(DRY),$(BIN)/python,python3)

gpu: $(if $(DRY),setup)
	$(GPU_PYTHON) -m benchmarking.gpu $(if $(DRY),--dry true)

# A process a core, each with the tests of whole files, which share what they train; one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 10

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

# The thorough form of tests/faults/; it writes the page only if all of it holds.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults --reliability docs/RELIABILITY.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache
