# make help says what there is.
VENV := .venv
PYTHON := $(VENV)/bin/python
OUTPUT_DIR := demo_output
STAMP := $(VENV)/.installed
STAND_IN := tests/standin
WORKERS := --numprocesses auto --dist loadfile --no-loadscope-reorder
# Together under a minute: no model beyond the tiny one, no server, hardly a process.
FAST := $(addprefix tests/,chains method images files commands datasets \
  $(addprefix bridge/test_,preflight.py register.py samples.py train_args.py) \
  $(addprefix jobs/test_,damaged_progress.py job_key.py replay_log.py) annotate/test_conversations.py annotate/test_rules.py \
  $(addprefix hostile/test_,chain_files.py git_clones.py images.py names.py) results/test_versions.py sweeps/test_paired.py \
  test_imports.py test_no_timing_asserts.py test_plot_styles.py test_terminal.py)

# Those of them that read the sources stay out of the wheel's.
ON_THE_WHEEL := $(filter-out tests/test_imports.py tests/test_no_timing_asserts.py tests/test_plot_styles.py,$(FAST))

# What exports and records go into: datasets, TRL, PEFT and the experiment trackers.
INTEGRATIONS := tests/hub tests/tracking tests/annotate/test_conversations.py

.PHONY: help setup demo test test-fast test-slow test-cuda test-wheel test-integrations lint docs bench real-size compat fuzz

help:
	@echo "make setup   .venv with this package and its tools, and DomainBed into the user's cache folder"
	@echo "make demo    train jobs from ERM to RD-MLDG, and DomainBed's tables (8 to 12 minutes on 2 cores)"
	@echo "             TARGETS=2 one target domain | DATASET=ShapesReasoning | DATASET=PACSReasoning DATA_DIR=... real images"
	@echo "             CHAINS=... their chain file | MODEL=... a folder or hub id | STEPS=... | OUTPUT_DIR=$(OUTPUT_DIR)"
	@echo "make test    all tests but the slow ones (under 20 minutes on 2 cores) | PYTEST='tests/chains -x' some of them"
	@echo "make test-fast  no model but the tiny one, no server, hardly a process (under a minute on 2 cores)"
	@echo "make test-slow  the slow ones"
	@echo "make test-cuda  those of tests/cuda, on a GPU (3 minutes on an H100); all others run on the CPU"
	@echo "make test-wheel  the fast ones and a training job on the built wheel, in a fresh environment and a clone of DomainBed"
	@echo "make test-integrations  exports in datasets, TRL and PEFT, and the experiment trackers (installs them)"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the documentation as a website in site/ | SERVE=1 at http://127.0.0.1:8000, rebuilt on changes"
	@echo "make bench   ratios against peers on one core, and their limits (about 10 minutes) | PARTS='class_scores whole_job'"
	@echo "make real-size  checkpoints of published sizes with random weights, up to 11 GB of memory | NAMES='InternVL3-1B'"
	@echo "make compat  the tests that touch the libraries, with the oldest and newest of them | ROWS=oldest"
	@echo "make fuzz    10 minutes of coverage-guided fuzzing of chain parser and store (Python 3.11 to 3.13)"

# Not on PyPI: DomainBed is cloned. Where that fails, demo and tests use the stand-in and say so.
setup: $(STAMP)
	@$(VENV)/bin/domainbed-reasoning get-domainbed || \
	  echo "WITHOUT UPSTREAM DOMAINBED: demo and tests use the stand-in in $(STAND_IN)."

$(STAMP): setup.cfg setup.py pyproject.toml
	@python=; for candidate in $(VENV)/bin/python python3.11 python3.12 python3.13 python3.14 python3 python; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "No Python 3.11 or newer is on PATH: install one and call make again." >&2; exit 1; fi; \
	test -x $(PYTHON) || $$python -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --progress-bar off -e ".[dev]"
	@touch $@

demo: setup
	@$(PYTHON) -m domainbed_reasoning.sweeps.demo --output_dir "$(OUTPUT_DIR)" --stand_in $(STAND_IN) \
	  $(if $(TARGETS),--targets "$(TARGETS)") $(if $(DATASET),--dataset "$(DATASET)") \
	  $(if $(DATA_DIR),--data_dir "$(DATA_DIR)") $(if $(MODEL),--model "$(MODEL)") \
	  $(if $(STEPS),--steps "$(STEPS)") $(if $(CHAINS),--chains "$(CHAINS)")

test: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(or $(PYTEST),-m "not slow" $(WORKERS))

test-fast: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not slow and not upstream" $(WORKERS) $(FAST)

test-slow: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m slow $(WORKERS)

test-cuda: setup
	$(PYTHON) -m pytest -m cuda tests/cuda

test-wheel: setup
	$(PYTHON) tests/compat/wheel.py $(if $(FOLDER),--folder "$(FOLDER)") $(ON_THE_WHEEL)

test-integrations: setup
	$(PYTHON) -m pip install --quiet --progress-bar off -e ".[integrations]"
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not slow" $(WORKERS) $(INTEGRATIONS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(STAMP)
	$(PYTHON) -m pip install --quiet --progress-bar off -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs $(if $(SERVE),serve,build --quiet) --strict
	@$(if $(SERVE),:,echo "Open site/index.html in a browser. Search needs a server: make docs SERVE=1.")

bench: setup
	$(PYTHON) -m pip install --quiet --progress-bar off -e ".[bench]"
	OMP_NUM_THREADS=1 $(PYTHON) -m benchmarks.bench $(PARTS)

real-size: setup
	$(PYTHON) -m benchmarks.real_size $(NAMES)

# 5 to 7 GB an environment while it is there.
compat: $(STAMP)
	$(PYTHON) tests/compat/versions.py $(ROWS)

fuzz: $(STAMP)
	$(PYTHON) -m pip install --quiet --progress-bar off atheris
	$(PYTHON) tests/fuzz/fuzz.py parser --seconds $(or $(SECONDS_EACH),300)
	$(PYTHON) tests/fuzz/fuzz.py store --seconds $(or $(SECONDS_EACH),300)
