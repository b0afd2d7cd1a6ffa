PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= build/demo
MODEL ?= demo/ssd_mobilenet_v1_shapes
IMAGES ?= demo/images
FUZZ ?= 20
ifeq ($(IMAGES),demo/images)
ANNOTATIONS ?= demo/instances_shapes.json
endif
WITH_LABELS = $(if $(LABELS),--labels '$(LABELS)')
IN_VENV = $(VENV)/bin/python
COCO = --annotations '$(ANNOTATIONS)'

.PHONY: help demo test test-zoo fuzz models-table lint clean

help:
	@echo "make demo       installs into $(VENV), then converts, runs, evaluates and compares the small model in demo/"
	@echo "                MODEL=export IMAGES=photos: the same on your own (LABELS=file: its class names, ANNOTATIONS=file: its AP)"
	@echo "make test       lint, format and tests"
	@echo "make test-zoo   the large models of ../shared against TensorFlow"
	@echo "make fuzz       damaged inputs and faults in the middle, FUZZ=20 times as many as in make test"
	@echo "make clean      removes build/ and $(VENV)"
	@echo "Each script has --help: $(IN_VENV) create_onnx.py --help"

demo: $(VENV)/.ready
	@mkdir -p '$(OUTPUT)'
	$(IN_VENV) create_onnx.py --saved_model '$(MODEL)' --onnx '$(OUTPUT)/model.onnx' $(WITH_LABELS)
	$(IN_VENV) infer.py --engine '$(OUTPUT)/model.onnx' --input '$(IMAGES)' --output '$(OUTPUT)/results'
	$(if $(ANNOTATIONS),$(IN_VENV) eval_coco.py --engine '$(OUTPUT)/model.onnx' --input '$(IMAGES)' $(COCO) --output '$(OUTPUT)/evaluation')
	$(IN_VENV) compare_tf.py --engine '$(OUTPUT)/model.onnx' --saved_model '$(MODEL)' --input '$(IMAGES)' --output '$(OUTPUT)/comparison' $(if $(ANNOTATIONS),$(COCO))
	@echo "Pictures: $(OUTPUT)/results. Reports: $(if $(ANNOTATIONS),$(OUTPUT)/evaluation/report.html and )$(OUTPUT)/comparison/report.html"

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test:
	@$(MAKE) --no-print-directory --jobs 2 lint build/servers/.ready
	$(IN_VENV) -m pytest -m "not zoo and not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-zoo: $(VENV)/.ready-dev
	$(IN_VENV) -m pytest -m "zoo or models"

fuzz: $(VENV)/.ready-dev
	FUZZ=$(FUZZ) $(IN_VENV) -m pytest -m fuzz

models-table: $(VENV)/.ready-dev
	$(IN_VENV) -m pytest -m models -k same_tensor --update-models

$(VENV)/bin/python:
	@echo "Making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: requirements.txt requirements-runtime.txt | $(VENV)/bin/python
	@echo "Installing TensorFlow, ONNX Runtime and the rest into $(VENV): 1.8 GB, some minutes the first time"
	@$(IN_VENV) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt requirements-video.txt requirements-openvino.txt requirements-scale.txt $(VENV)/.ready
	@echo "Installing what the tests need"
	@$(IN_VENV) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# Servers that the tests start; they need packages of other versions than the project.
build/servers/.ready: requirements-servers.txt | $(VENV)/bin/python
	@echo "Installing the servers that the tests start into build/servers: 0.6 GB"
	@$(IN_VENV) -m venv --without-pip build/servers
	@$(IN_VENV) -m pip --python build/servers/bin/python install --quiet --disable-pip-version-check --no-compile -r requirements-servers.txt
	@touch $@

clean:
	rm -rf build $(VENV)
