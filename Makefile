# `make demo` and `make test` are all that a fresh machine with Python 3.11 or newer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint help clean

# sam2 is built from source and wants torch while it builds: with torch in place first, and without
# build isolation, torch is not fetched a second time. Its CUDA extension is not needed.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch torchvision setuptools wheel
	SAM2_BUILD_CUDA=0 $(PIP) install --quiet --constraint constraints.txt --no-build-isolation sam2
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps trackers trackeval
	touch $@

demo: $(VENV)/installed
	$(BIN)/grounded-sam preset=demo output=outputs/demo
	@echo "The pictures lie in outputs/demo/overlay"

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/pre-commit run --all-files

# `grounded-sam --help` prints this file, which the suite compares with what Hydra makes of conf.
help: $(VENV)/installed
	$(BIN)/grounded-sam --help input=null > grounded_sam/cli/help.part && mv grounded_sam/cli/help.part grounded_sam/cli/help.txt

clean:
	rm -rf $(VENV) build dist outputs multirun *.egg-info
