# Rayndom's tasks. `make` alone lists them.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.rayndom_setup
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)

# Settings, e.g. `make test ARGS="tests/numerics -x"`.
PYTHON ?=
EXTRAS ?=
ARGS ?=
CLUSTER ?= ray_cluster.yaml
# Tests use tiny tensors: several processes of one thread each are faster than threads.
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check docs bench lock clean cluster-code cluster-up

help: ## List these tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  PYTHON=3.12 chooses the Python of `make setup`; EXTRAS=server,dashboard adds optional packages to it;'
	@echo '  ARGS="..." goes on to the command behind demo, test, test-slow, bench, lock and cluster-up.'

setup: $(STAMP) ## Make .venv with the locked packages (about 7 GB, once); a no-op when nothing changed
ifneq ($(strip $(EXTRAS)),)
	$(UV) pip install --quiet --python $(PY) --constraint requirements.lock --editable '.[$(EXTRAS)]'
endif

demo: $(STAMP) ## Sweep, train, attack and report a defence on real images, in minutes, on any computer
	$(VENV)/bin/rayndom demo $(ARGS)

test: $(STAMP) ## Run the tests, without the long ones and those that need a GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not gpu" $(ARGS)

test-slow: $(STAMP) ## Run the long tests, and those that need a GPU where there is one
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "slow or gpu" $(ARGS)

check: $(STAMP) ## Check style, formatting, types and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

docs: $(STAMP) ## Build the documentation as a site, into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet $(ARGS)

bench: $(STAMP) ## Measure speed on this computer
	$(PY) -m benchmarks $(ARGS)

lock: | $(UV) ## Renew requirements.lock after a change of pyproject.toml (ARGS=--upgrade: newest versions)
	$(UV) pip compile pyproject.toml --universal --python-version 3.11 --group test --group docs --extra torchattacks --extra cmaes \
		--no-emit-index-url --no-header -q -o requirements.lock $(ARGS)
	@! grep -n '://' requirements.lock || { echo 'requirements.lock must not name a server (see above)' >&2; exit 1; }

# `ray up` reads every byte of what it mounts, on this computer and again on the head, and restarts nodes when one has changed. So it
# gets a copy without environments, data and results, but with the last commit (runs record it), renewed only when the code changed.
# The origin's address, which may hold a password, does not travel.
cluster-code: ## Copy the code as it is now to .cluster/code, for `ray up`
	@mkdir -p .cluster && echo '*' > .cluster/.gitignore
	@new='git -c core.quotePath=false ls-files --others --exclude-standard'; \
	state=$$({ git rev-parse HEAD; git diff --binary HEAD; $$new; $$new | git hash-object --stdin-paths; } | git hash-object --stdin); \
	if [ "$$state" = "$$(cat .cluster/state 2>/dev/null)" ]; then exit 0; fi; \
	rm -rf .cluster/code .cluster/state; \
	git clone --quiet --depth 1 "file://$(CURDIR)" .cluster/code && git -C .cluster/code remote remove origin || exit 1; \
	git diff --binary HEAD > .cluster/changes.patch; \
	if [ -s .cluster/changes.patch ]; then git -C .cluster/code apply --whitespace=nowarn ../changes.patch || exit 1; fi; \
	git ls-files -oz --exclude-standard | tar --null -T - -cf - | tar -xf - -C .cluster/code || exit 1; \
	echo "$$state" > .cluster/state; echo 'The code as it is now is in .cluster/code'

cluster-up: $(STAMP) cluster-code ## Start or renew a Ray cluster: CLUSTER=ray_cluster.yaml (docs/cluster.md)
	@$(VENV)/bin/ray get-auth-token --generate > /dev/null
	$(VENV)/bin/ray up $(CLUSTER) $(ARGS)

clean: ## Remove caches and build leftovers; .venv, data and results stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .cluster build dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.uv/*' -type d -prune -exec rm -rf {} +

# uv installs itself into .uv/ when it is missing: nothing outside this folder is touched.
.uv/bin/uv:
	@command -v python3 >/dev/null || { \
		echo 'python3 is missing. On Debian and Ubuntu: sudo apt-get install python3 python3-venv' >&2; exit 1; }
	@python3 -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'python3 cannot make virtual environments. On Debian and Ubuntu: sudo apt-get install python3-venv' >&2; \
		echo 'Or install uv yourself; then run this again.' >&2; exit 1; }
	@echo 'uv is not installed: getting it into .uv/'
	@python3 -m venv --clear .uv
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check uv

# An environment that is recent enough is kept; the lock decides what is in it.
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

$(STAMP): requirements.lock pyproject.toml | $(UV)
	@if [ -z '$(PYTHON)' ] && $(PY) -c '$(RECENT)' 2>/dev/null; then exit 0; fi; \
	wanted='$(PYTHON)'; \
	if [ -z "$$wanted" ]; then \
		if python3 -c '$(RECENT)' 2>/dev/null; then wanted=$$(python3 -c 'import sys; print(sys.executable)'); else \
			echo "Rayndom needs Python 3.11 or newer; python3 here is $$(python3 --version 2>&1 || true)."; \
			echo 'uv looks for another one, and downloads one if there is none (the system Python stays as it is).'; \
			wanted='>=3.11'; \
		fi; \
	fi; \
	found=$$($(UV) python find "$$wanted" 2>/dev/null) || \
		{ $(UV) python install "$$wanted" && found=$$($(UV) python find "$$wanted"); } || exit 1; \
	"$$found" -c '$(RECENT)' || { echo "Rayndom needs Python 3.11 or newer; PYTHON=$(PYTHON) is older." >&2; exit 1; }; \
	rm -rf $(VENV) && $(UV) venv --quiet --python "$$found" $(VENV)
	@echo 'Installing the locked packages (the first time about 7 GB: minutes)'
	@# Compiled once here: where Python may not write bytecode (many containers), each Ray worker would compile torch anew.
	$(UV) pip sync --compile-bytecode --python $(PY) requirements.lock
	$(UV) pip install --quiet --python $(PY) --no-deps --editable .
	@touch $@
