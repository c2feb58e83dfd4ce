# Everything starts from a fresh clone with Python 3.11 to 3.13 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test faults lint format image-test install clean

quickstart: install
	$(BIN)/swa-dist quickstart

test: install  # files side by side, since much of what they do is waiting; but not two Rays
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/service
	$(BIN)/pytest tests/service

faults: install
	$(BIN)/python -m tests.faults.table

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

image-test: # as root, with buildah and debootstrap: builds docker/Dockerfile and runs it
	docker/image-test

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	    "swa_dist must have Python 3.11 to 3.13, but $(PYTHON) is %d.%d. Try: make PYTHON=python3.12" % v)'
	@echo "installing into $(VENV): about 7 GB and 3 minutes, once"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs mlruns mlflow.db
