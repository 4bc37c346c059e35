# Two commands: `make demo` and `make test`. Each installs what it needs into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Most of the 27,000 modules that all extras bring are never imported: Python compiles those that are.
INSTALL := $(PIP) install --no-compile -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test lint install help

help:
	@echo "make demo   install bevel and run recipes/digits.yaml"
	@echo "make test   install every extra, run linters and tests"

# A finished run is not repeated: bevel prints its table again.
demo: install
	$(BIN)/bevel run recipes/digits.yaml

# One thread in each of the test processes: more of them than processors wait for each other, and
# what takes 7 s alone then took 491 s. Each begins with its own half of the modules (worksteal), so
# that what a module's tests share is made once, but where the other takes over at the end.
test: $(VENV)/.installed-all $(VENV)/sshd lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $${TEST_WORKERS:-2} --dist worksteal --durations=20

lint: $(VENV)/.installed-all
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# A real OpenSSH server for the tests of the device `ssh`, unpacked and not installed.
$(VENV)/sshd: | $(VENV)/.created
	tests/devices/fetch_sshd.sh $@

install: $(VENV)/.installed

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "bevel needs Python 3.11 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# An editable install, so that a pulled change runs without installing again.
$(VENV)/.installed: $(INPUTS) | $(VENV)/.created
	@echo "Installing bevel into $(VENV): a few minutes, once."
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-all: $(INPUTS) | $(VENV)/.created
	@echo "Installing bevel with every extra into $(VENV): a few minutes, once."
	$(INSTALL) -e '.[all]'
	@touch $@ $(VENV)/.installed
