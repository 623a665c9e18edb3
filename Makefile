# `make demo` and `make test` work on a new machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-label-studio test-ray cases fuzz lint help docs pictures notebooks clean

# sam2 is built from source, which needs torch. Installing torch first and building without isolation avoids downloading
# it twice. The CUDA extension of sam2 is not needed.
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
	@echo "The images are in outputs/demo/overlay"

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not label_studio and not ray'

# Starts a Label Studio: the command GROUNDED_SAM_LABEL_STUDIO, or label-studio on the path; needs chromium, too.
test-label-studio: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m label_studio tests/test_label_studio_live.py

# Starts Ray on this machine, with two workers.
test-ray: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m ray tests/test_ray.py

# Checks and inputs that are kept outside of the repository; they take a quarter of an hour. See the README there.
CASES ?= ../shared/cases
cases: $(VENV)/installed-dev
	cd $(CASES)/images && $(abspath $(BIN))/python run_cases.py $(abspath $(BIN))/grounded-sam
	cd $(CASES)/video && GROUNDED_SAM=$(abspath $(BIN))/grounded-sam $(abspath $(BIN))/python repro.py

# Damaged and hostile files for every reader, odd names for every writer: FUZZ_MINUTES minutes, 10 by default.
fuzz: $(VENV)/installed-dev
	PYTHONPATH=tests $(BIN)/python -m pytest -s tests/fuzz/fuzz_inputs.py

lint: $(VENV)/installed-dev
	$(BIN)/pre-commit run --all-files

# `grounded-sam --help` prints this file; a test compares it with the help that Hydra composes from conf/.
help: $(VENV)/installed
	$(BIN)/grounded-sam --help input=null > grounded_sam/cli/help.part && mv grounded_sam/cli/help.part grounded_sam/cli/help.txt

docs: $(VENV)/installed-dev
	$(BIN)/python -m mkdocs build --strict
	@echo "Open site/index.html"

# Screenshots need chromium.
pictures: $(VENV)/installed-dev
	$(BIN)/python docs/pictures.py

# Runs the notebooks and stores their outputs in them.
notebooks: $(VENV)/installed-dev
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) build dist outputs multirun site *.egg-info
