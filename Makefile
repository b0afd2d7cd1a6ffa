# make demo                            the whole path on the demo's own small SSD; pictures in build/demo/results
# make demo MODEL=path IMAGES=path     the same on your model (LABELS=file for its class names, ANNOTATIONS=file for its AP)
# make test                            lint, format and tests; make test-zoo: the large models of ../shared
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= build/demo
MODEL ?= demo/ssd_mobilenet_v1_shapes
IMAGES ?= demo/images
LABELS ?= $(if $(filter demo/%,$(MODEL)),demo/ssd_mobilenet_v1_shapes/labels.txt)
ANNOTATIONS ?= $(if $(filter demo/%,$(IMAGES)),demo/instances_shapes.json)
WITH_LABELS = $(if $(LABELS),--labels $(LABELS))
IN_VENV = $(VENV)/bin/python

.PHONY: demo test test-zoo readme-table lint clean

demo: $(VENV)/.ready
	@mkdir -p $(OUTPUT)
	$(IN_VENV) create_onnx.py --saved_model $(MODEL) --onnx $(OUTPUT)/model.onnx
	$(IN_VENV) infer.py --engine $(OUTPUT)/model.onnx --input $(IMAGES) --output $(OUTPUT)/results $(WITH_LABELS)
	$(if $(ANNOTATIONS),$(IN_VENV) eval_coco.py --engine $(OUTPUT)/model.onnx --input $(IMAGES) --annotations $(ANNOTATIONS) --output $(OUTPUT)/evaluation)
	$(IN_VENV) compare_tf.py --engine $(OUTPUT)/model.onnx --saved_model $(MODEL) --input $(IMAGES) --output $(OUTPUT)/comparison $(WITH_LABELS) $(if $(ANNOTATIONS),--annotations $(ANNOTATIONS))
	@echo "Pictures: $(OUTPUT)/results. Reports: $(if $(ANNOTATIONS),$(OUTPUT)/evaluation/report.html and )$(OUTPUT)/comparison/report.html"

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: lint
	$(IN_VENV) -m pytest -m "not zoo and not gpu"

test-zoo: $(VENV)/.ready-dev
	$(IN_VENV) -m pytest -m "zoo or models"

readme-table: $(VENV)/.ready-dev
	$(IN_VENV) -m pytest -m models -k same_tensor --update-readme

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
