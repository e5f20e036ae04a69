# make demo    set up a venv in the tree and run the quickstart on embedded guests
# make test    set up everything and run all tests, real guests included
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

PROTOS := $(wildcard proto/hintfleet/v1/*.proto)

.PHONY: demo test system image bench lint proto clean help

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST))

$(VENV)/base: pyproject.toml constraints.txt
	@echo "setting up $(VENV) ..." >&2
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable '.[embedded,orchestrator]'
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) install --constraint constraints.txt --editable '.[embedded,orchestrator,report,dev]'
	@touch $@

demo: $(VENV)/base
	@$(BIN)/hintfleet run quickstart

# What only root can install: QEMU, libvirt and the builder of the guest image.
system:
	@deploy/system/install

image: $(VENV)/base
	$(BIN)/python deploy/image/build.py

test: system $(VENV)/dev
	@tests/run

bench: $(VENV)/dev
	$(BIN)/python -m tests.bench

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# --mypy_out writes what a type checker needs beside what protoc generates.
proto: $(VENV)/dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto \
		--grpc_python_out=proto --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto $(PROTOS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
