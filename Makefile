# make demo                            the whole path on the demo's own small SSD; pictures in build/demo/results
# make demo MODEL=path IMAGES=path     the same on your model (LABELS=file for its class names)
# make test                            lint, format and tests; make test-zoo: the large models of ../shared
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= build/demo
MODEL ?= demo/ssd_mobilenet_v1_shapes
IMAGES ?= demo/images
LABELS ?= $(if $(filter demo/%,$(MODEL)),demo/ssd_mobilenet_v1_shapes/labels.txt)
IN_VENV = $(VENV)/bin/python

.PHONY: demo test test-zoo lint clean

demo: $(VENV)/.ready
	@mkdir -p $(OUTPUT)
	$(IN_VENV) create_onnx.py --saved_model $(MODEL) --onnx $(OUTPUT)/model.onnx
	$(IN_VENV) infer.py --engine $(OUTPUT)/model.onnx --input $(IMAGES) --output $(OUTPUT)/results $(if $(LABELS),--labels $(LABELS))

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: lint
	$(IN_VENV) -m pytest -m "not zoo and not gpu"

test-zoo: $(VENV)/.ready-dev
	$(IN_VENV) -m pytest -m "zoo or models"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: requirements.txt | $(VENV)/bin/python
	$(IN_VENV) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(IN_VENV) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf build $(VENV)
