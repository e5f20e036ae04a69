# make demo    set up a venv in the tree and run the quickstart on embedded guests
# make check   after every edit: format, lint, types, unit and model tests; no root, two to three minutes
# make test    run all tests, real guests included; as root it installs what they need (VM=no: it does without)
# make image [VARIANT=compiler]    build the image of real guests; with g++ in it: for `hintfleet run footprint`
# make lowest  unit and model tests with the lowest versions that pyproject.toml allows; minutes, and the network
# make bench [SUITE...]    compare with bare loops, bare clients and the peers; measure what hintfleet costs
# make torture [SECONDS_TO_RUN=60] [DRIVER=embedded|libvirt|attached] [SEED=N]    inject faults while guests work
# make fuzz [SECONDS_TO_RUN=60]       send random inputs to all that reads input from outside; check with oracles
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

PROTOS := $(wildcard proto/hintfleet/v1/*.proto)

.PHONY: demo check test lowest system image bench torture fuzz proto clean help

help:
	@sed -n 's/^# \(make \)/\1/p' $(firstword $(MAKEFILE_LIST))

$(VENV)/base: pyproject.toml constraints.txt hatch_build.py host_agent/memory/punch.c
	@echo "setting up $(VENV) ..." >&2
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable '.[embedded,orchestrator]'
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) install --constraint constraints.txt --editable '.[embedded,orchestrator,report,dev]'
	@touch $@

demo: $(VENV)/base
	@$(BIN)/hintfleet run quickstart

# Only root can install these: QEMU, libvirt and the builder of the guest image.
system:
	@deploy/system/install

image: $(VENV)/base
	$(BIN)/python deploy/image/build.py $(if $(VARIANT),--variant $(VARIANT))

# tests/unit/test_house.py runs ruff and mypy. The longest tests come first, and a worker that has
# done its share takes from the others.
check: $(VENV)/dev
	@$(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 4 --dist worksteal \
		tests/model tests/unit/test_house.py tests/unit

# VM=no: run without real guests, and install nothing for them.
test: $(if $(filter no,$(VM)),,system) $(VENV)/dev
	@VM=$(VM) tests/run

lowest:
	@PYTHON=$(PYTHON) tests/lowest

SECONDS_TO_RUN ?= 60
DRIVER ?= embedded
TORTURE := --seconds $(SECONDS_TO_RUN) --driver $(DRIVER) $(if $(SEED),--seed $(SEED))

# Real guests need libvirt-python, which has no wheel, and the packages of `make system`.
torture: $(VENV)/dev $(if $(filter embedded,$(DRIVER)),,system)
	@[ $(DRIVER) = embedded ] || $(PIP) install --constraint constraints.txt --editable '.[host]'
	@$(BIN)/python -m tests.torture $(TORTURE) $(if $(filter libvirt,$(DRIVER)),--stress)

# `make bench flood`: words after `bench` are suites. They become empty targets here, for make
# takes each word as a target.
ifeq ($(firstword $(MAKECMDGOALS)),bench)
SUITES := $(wordlist 2,$(words $(MAKECMDGOALS)),$(MAKECMDGOALS))
.PHONY: $(SUITES)
$(SUITES): ;@:
endif

bench: $(VENV)/dev
	$(BIN)/python -m tests.bench $(SUITES)

fuzz: $(VENV)/dev
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS_TO_RUN)

# --mypy_out writes type stubs beside the modules that protoc generates.
proto: $(VENV)/dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto \
		--grpc_python_out=proto --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto $(PROTOS)

clean:
	rm -rf $(VENV) build dist host_agent/memory/libpunch.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
