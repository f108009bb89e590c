# make demo    train cross-entropy and NONL on real digits, write runs/demo/report.html (about a minute)
# make test    lint, types and the test suite; make test-all adds the tests that take minutes
# make check   lint and types alone
# make docs    the site, in site/: open site/index.html
# make bench   speed, memory and error of the losses on this machine, with pictures (about 2 minutes)
# make gpu-check   correctness, sanitizer, large indices and speed of the kernels on a GPU
#
# The environment lives in .venv with the pinned versions of constraints.txt. To use a Python that already has torch and
# the packages of the extras, name it: make test PYTHON=/path/to/python

VENV := .venv
ifeq ($(origin PYTHON),undefined)
  RUN := $(VENV)/bin/python
  READY := $(VENV)/ready
  EXAMPLES := $(VENV)/examples
else
  RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
  READY :=
  EXAMPLES :=
endif
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test test-all check docs bench gpu-check clean

setup: $(READY)

$(VENV)/packages: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): about 5 GB and a few minutes, once"
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hypercontrast needs Python 3.10 or newer, got " + sys.version.split()[0])'
	@python3 -m venv $(VENV)
	@$(PIP) --editable '.[train,demo,test,docs]' 'setuptools>=64,<82' ninja
	@touch $@

# The extension is optional: where it cannot be built, its Python twin runs.
$(VENV)/ready: $(VENV)/packages setup.py $(wildcard csrc/*)
	@echo "Building the C++ extension: about a minute, once"
	@$(VENV)/bin/python setup.py build_ext --inplace >$(VENV)/extension.log 2>&1 || echo "It did not build, see $(VENV)/extension.log: its Python twin will run"
	@grep '^hypercontrast:' $(VENV)/extension.log || true
	@touch $@

# What the examples and the comparisons with other packages need; their tests skip where it cannot be installed.
$(VENV)/examples: $(VENV)/ready
	@echo "Setting up the examples: half a minute, once"
	@$(PIP) --editable '.[examples]' || echo "The examples could not be set up: their tests will skip"
	@touch $@

demo: $(READY)
	@$(RUN) -m hypercontrast.demo

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: check $(EXAMPLES)
	$(RUN) -m pytest -n 2 --dist loadgroup

test-all: check $(EXAMPLES)
	$(RUN) -m pytest -n 2 --dist loadgroup -m ""

# Strict: a link or an anchor that leads nowhere is an error (but not under --quiet). The notice that is silenced is of
# the future of mkdocs.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "site/index.html"

bench: $(READY)
	$(RUN) -m bench --quick

gpu-check: $(READY)
	$(RUN) -m bench.gpu_check

clean:
	rm -rf $(VENV) build dist site hypercontrast/_C*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
