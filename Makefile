# `make demo` and `make test` set up .venv themselves, and reuse it while it is current.
PYTHON ?= python3
# The release that the tests run on; TORCH="torch torchvision" takes the newest.
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin

.PHONY: demo test lint benchmark clean

demo: .venv/.current
	$(BIN)/python demo/run.py

test: .venv/.current
	$(BIN)/python -m pytest

lint: .venv/.current
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmark: .venv/.current
	$(BIN)/python benchmarks/inference.py

clean:
	rm -rf .venv build dist demo-output *.egg-info

.venv/.current: pyproject.toml setup.py vitadapter_zoo/build_op.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	VITADAPTER_ZOO_BUILD_OP=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable ".[dev]"
	touch $@
