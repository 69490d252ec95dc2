# Everything goes through .venv; `make setup` builds it once and does nothing when it is up to date.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
CONFIG ?=
TORCH = torch==2.13.0
TRITON = triton==3.7.1# what this torch brings along where there is a GPU

BIN = .venv/bin
STAMP = .venv/.complete
COMPILED = .venv/.compiled
CLIENTS = .venv-clients
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
# Two cores are the reference machine: tests keep numeric libraries to one thread each.
TEST_ENV = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup clients serve test test-slow test-gpu test-kernels check check-deploy fmt bench clean

setup: $(COMPILED)

$(STAMP): requirements.lock requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Libration needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(PIP) install '$(TORCH)' && \
		$(PIP) install --no-deps -r requirements.lock -r requirements-dev.lock && \
		$(PIP) install --no-deps --no-build-isolation --editable . || \
		{ echo "installation failed: is the package index reachable from here? (pip's own message is above)" >&2; exit 1; }
	@touch $@

# What decodes is compiled for this machine, so that the first start need not wait for it.
$(COMPILED): $(STAMP) $(wildcard model/native/*.py)
	@$(BIN)/python -m model.native
	@touch $@

# What other people's clients need is far more than we do, and only the slow suite needs it.
clients: $(CLIENTS)/.complete

$(CLIENTS)/.complete: requirements-clients.lock
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	@echo "installing clients into $(CLIENTS) (a few minutes the first time)"
	@$(CLIENTS)/bin/python -m pip --disable-pip-version-check --quiet install '$(TORCH)' && \
		$(CLIENTS)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r requirements-clients.lock
	@touch $@

serve: setup
	@$(BIN)/libration serve --host $(HOST) --port $(PORT) $(if $(CONFIG),--config $(CONFIG))

test: setup
	$(TEST_ENV) $(BIN)/python -m pytest -q

test-slow: setup clients
	$(TEST_ENV) $(BIN)/python -m pytest -q -m slow --timeout 3600

test-gpu: setup
	$(TEST_ENV) $(BIN)/python -m pytest -q -m gpu

# The GPU's kernels without one, in Triton's interpreter: 200 MB that nothing else needs.
test-kernels: setup
	@$(PIP) install --no-deps '$(TRITON)'
	TRITON_INTERPRET=1 $(TEST_ENV) $(BIN)/python -m pytest -q -m kernels tests/model/test_kernels.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# What needs promtool, which pip does not have (Debian: the package prometheus). All else of deploy/ is in `make test`.
check-deploy:
	promtool check config --syntax-only deploy/prometheus/prometheus.yml
	promtool check rules --lint=all --lint-fatal deploy/prometheus/alerts.yml
	promtool test rules deploy/prometheus/alerts_test.yml

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python bench/compare.py

clean:
	rm -rf .venv $(CLIENTS)
