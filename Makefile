# `make demo` and `make test` work on a fresh clone with nothing before them. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
ORACLES := .oracles
# The interpreter that makes the environment: `make install PYTHON=python3.12`. Empty: the newest that fits.
PYTHON ?=
# Passed on to pytest: `make test ARGS="-k birkhoff"`.
ARGS ?=

.PHONY: help install demo test oracles test-oracles fuzz audit check format types imports compose docker-lint docker-walk constraints clean distclean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(STAMP) ## Make .venv with the package, its command `hypersam` and the development tools
	@:

# An environment that is already there is used as it is. The recipe is run again when what it reads changes.
$(STAMP): pyproject.toml constraints.txt
	@if [ -n "$(PYTHON)" ] && [ -x $(PY) ]; then \
		want=$$("$(PYTHON)" -c 'import sys; print(*sys.version_info[:2], sep=".")'); \
		have=$$($(PY) -c 'import sys; print(*sys.version_info[:2], sep=".")' || true); \
		[ "$$want" = "$$have" ] || { echo "$(VENV) was made with another Python ($$have): run 'make distclean' first" >&2; exit 1; }; \
	fi; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		found=; \
		for candidate in $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python); do \
			if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
			then found=$$candidate; break; fi; \
		done; \
		[ -n "$$found" ] || { echo "Python 3.11, 3.12 or 3.13 with its venv module is needed (Debian: apt-get install python3-venv); PYTHON=... names one" >&2; exit 1; }; \
		echo "making $(VENV) with $$("$$found" -V)"; \
		"$$found" -m venv --clear $(VENV); \
	fi
	@echo 'installing (the first time fetches several GB, PyTorch and its CUDA libraries)'
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install ## Start everything, compress the small SAM that comes with the project and segment with it
	$(PY) -m hypersam.demo

test: install ## Run the tests, two at a time (ARGS="-k name" narrows them)
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

# An environment of its own over .venv's, whose versions stay as they are.
oracles: install ## Make .oracles, where the official networks are that ours are held against
	$(PY) -m venv --clear --without-pip $(ORACLES)
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(ORACLES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth"
	$(PY) -m pip --python $(ORACLES)/bin/python install --quiet --disable-pip-version-check --no-deps -r tests/oracles/requirements.txt

test-oracles: ## Run the tests of tests/oracles in .oracles; there none is skipped for a missing package
	REQUIRE_ORACLES=1 $(ORACLES)/bin/python -m pytest tests/oracles $(ARGS)

fuzz: install ## Send 5,000 requests of every sort to a running service
	$(PY) -m tests.fuzz_api 5000

audit: install ## Compare the installed versions with known weaknesses (needs a network, and pipx or uvx)
	@if command -v uvx >/dev/null; then run=uvx; else run="pipx run"; fi; $$run pip-audit --path "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

check: install ## Lint, formatting, types, import rules, the Dockerfile, and the compose files where Compose is there
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint docker/Dockerfile
	@$(MAKE) --no-print-directory compose

# The plug-in, else the program of its own that it is as well; not Compose 1, which knows another form of the files.
compose:
	@if docker compose version >/dev/null 2>&1; then compose="docker compose"; \
	elif docker-compose version --short 2>/dev/null | grep -qE '^v?[2-9]'; then compose=docker-compose; \
	else echo "compose files: not checked, there is no 'docker compose' here"; exit 0; fi; \
	$$compose --profile metrics --profile objectstore -f docker-compose.yml config --quiet; \
	$$compose --env-file .env.example -f docker-compose.yml -f docker/compose.cpu.yml config --quiet; \
	echo "compose files: fine"

docker-lint: install ## Only the linter of the Dockerfile
	$(VENV)/bin/hadolint docker/Dockerfile

docker-walk: ## Build the image without an engine and run what is in it (root, buildah, debootstrap; 30 GB, minutes)
	docker/walk.sh "$$(mktemp -d)"

types: install ## Only the type check
	$(PY) -m mypy

imports: install ## Only the import rules
	$(VENV)/bin/lint-imports

format: install ## Format the code and apply the linter's safe fixes
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

# Keeps the versions that are there unless told otherwise: make constraints ARGS="--upgrade-package fastapi"
constraints: ## Resolve constraints.txt anew for Python 3.11 to 3.13 (needs uv)
	@head -n 5 constraints.txt > constraints.tmp
	uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url \
		$(ARGS) pyproject.toml -o constraints.txt
	@grep -v '^#' constraints.txt >> constraints.tmp && mv constraints.tmp constraints.txt

clean: ## Remove caches and build outputs (the environment stays)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove the environment too
	rm -rf $(VENV) $(ORACLES)
