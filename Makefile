# make demo   create the environment, run the demo, print the comparison
# make test   the tests that you wait for: every gate, and the demo once; some 6 minutes on 2 cores
# make test-all   all tests: also kills at random instants, containers and Slurm where they are installed, many whole runs.
#             PYTEST_ARGS is passed to pytest. CI runs `make test`, and then make test-all PYTEST_ARGS='-m slow'
# make serve  start a server with the model of a run: RUN=demo CONFIG=mine.yaml
#             FORMAT=gguf-q8_0: with an export of it, by the engine that it is for
# make explain  say of each run which stages would run again, and why: CONFIG=mine.yaml
# make publish  upload the model of a run to the hub: RUN=demo REPO=name/model WHAT=adapter CONFIG=mine.yaml YES=1
#             PUBLIC=1. WHAT: merged, adapter, or of the exports gguf, fp8, w8a8, w4a16
# make lint   formatting and lint, as CI runs them
# make bench  measure training on this CPU beside TRL's defaults and a bare loop, and write the table into BENCHMARKS.md
# make pictures  make the screenshots of the README anew; it needs Chromium
# make schema update the files that are generated from config/schema.yaml and the libraries
# make image  build the image of the training stages for Apptainer; make docker-image: for Docker
#             make serve-image and make docker-serve-image: the image of the server
#             make benchmark-image: the image of the benchmarks, for Apptainer; make export-image: of the exports
# make benchmark-env  create .venv-benchmark, the environment of the benchmarks; make export-env: .venv-export, of the exports
#
# The environment is .venv, created with the interpreter PYTHON. BASE_IMAGE is another base for an image: an image in a registry,
# or for `make image` a .sif file or a folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A pipe fails with its first command.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
# snakefmt looks for shfmt there
export PATH := $(abspath $(BIN)):$(PATH)
REQUIREMENTS := envs/workflow.txt envs/train.txt
CORES ?= 1
# A process for each core; those that share something dear run in the same (tests/conftest.py).
PARALLEL := -n auto --maxprocesses 8 --dist loadgroup
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' scripts/moult/__init__.py)
DOCKER ?= docker
# Only a remote with a web address is useful to others.
LABELS = VERSION=$(VERSION) REVISION=$(or $(shell git describe --always --dirty 2>/dev/null),unknown) \
    SOURCE=$(or $(filter https://%,$(shell git config --get remote.origin.url)),unknown)
BASE = $(if $(BASE_IMAGE),BASE_IMAGE=$(BASE_IMAGE))
CONFIGFILE = $(if $(CONFIG),--configfile $(CONFIG))

.PHONY: demo test test-all serve explain publish lint bench pictures schema env image serve-image docker-image \
    docker-serve-image benchmark-image benchmark-env export-image export-env
.DELETE_ON_ERROR:

demo: $(VENV)/workflow.stamp
	$(BIN)/snakemake --cores $(CORES) results/demo/metrics.json

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

serve: $(VENV)/workflow.stamp
	@$(BIN)/python scripts/tools/serve.py --run $(or $(RUN),$(error which run? make serve RUN=<run>)) \
	    $(addprefix --format ,$(FORMAT)) $(CONFIGFILE)

explain: $(VENV)/workflow.stamp
	@$(BIN)/python scripts/tools/explain.py $(CONFIGFILE)

publish: $(VENV)/workflow.stamp
	@$(BIN)/python scripts/tools/publish.py --run $(or $(RUN),$(error which run? make publish RUN=<run> REPO=<name/model>)) \
	  --repo $(or $(REPO),$(error to where? make publish RUN=<run> REPO=<name/model>)) \
	  $(addprefix --what ,$(WHAT)) $(if $(PUBLIC),--public) $(if $(YES),--yes) $(CONFIGFILE)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mypy
	$(BIN)/snakemake --lint

bench: $(VENV)/workflow.stamp
	$(BIN)/python tests/benchmark_training.py --write BENCHMARKS.md

pictures: $(VENV)/dev.stamp
	$(BIN)/python tests/pictures.py

schema: $(VENV)/workflow.stamp
	$(BIN)/python scripts/tools/config_docs.py

env: $(VENV)/workflow.stamp

image: containers/moult-train-$(VERSION).sif

serve-image: containers/moult-serve-$(VERSION).sif

benchmark-image: containers/moult-benchmark-$(VERSION).sif

export-image: containers/moult-export-$(VERSION).sif

benchmark-env: .venv-benchmark/stamp

export-env: .venv-export/stamp

.venv-benchmark/stamp .venv-export/stamp: .venv-%/stamp: envs/%.txt envs/%-constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $< -c envs/$*-constraints.txt
	@touch $@

containers/moult-%-$(VERSION).sif: containers/%.def containers/install.sh $(wildcard envs/*.txt)
	@command -v apptainer >/dev/null || \
	  { echo "apptainer is not installed: see https://apptainer.org/docs/admin/main/installation.html"; exit 1; }
	@rm -f $@.part
	apptainer build $(addprefix --build-arg ,$(LABELS) $(BASE) $(if $(wildcard $(BASE_IMAGE)),BOOTSTRAP=localimage)) $@.part $<
	mv $@.part $@

docker-image: DOCKERFILE := Dockerfile
docker-image: TAG := moult-train:$(VERSION)
docker-serve-image: DOCKERFILE := Dockerfile.serve
docker-serve-image: TAG := moult-serve:$(VERSION)
docker-image docker-serve-image:
	@command -v $(DOCKER) >/dev/null || { echo "$(DOCKER) is not installed: see https://docs.docker.com/engine/install/"; exit 1; }
	$(DOCKER) build $(addprefix --build-arg ,$(LABELS) $(BASE)) --file containers/$(DOCKERFILE) --tag $(TAG) .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Moult needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing (Debian: apt install python3-venv)"; exit 1; }

# pip says hundreds of lines: on a terminal they take turns in one, and from the first error on all are shown.
define pip
	@test -t 1 && tty=1; $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --log $(VENV)/pip.log \
	  -c envs/constraints.txt $(1) 2>&1 | \
	  awk -v tty="$$tty" '/^ERROR/ {failed = 1} failed {print; next} tty {printf "\r\033[K%.78s", $$0; fflush()} \
	    END {if (tty) printf "\r\033[K"}'
endef

$(VENV)/workflow.stamp: $(REQUIREMENTS) envs/constraints.txt | $(BIN)/python
	@echo "Installing the packages of envs/ into $(VENV): a few minutes, some GB (log: $(VENV)/pip.log)"
	$(call pip,--upgrade pip)
	$(call pip,$(addprefix -r ,$(REQUIREMENTS)))
	@touch $@

$(VENV)/dev.stamp: envs/dev.txt $(VENV)/workflow.stamp
	@echo "Installing the test tools of envs/dev.txt into $(VENV)"
	$(call pip,-r envs/dev.txt)
	@touch $@
