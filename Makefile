# The Llama Book: `make` alone lists what there is. Every command sets up what it needs in .venv first.
#   PYTHON=python3.12 make test      another Python (3.10 or newer)
#   make run CPU=1                   torch for CPUs only: saves several GB on Linux
#   make run TORCH_INDEX=URL         torch from another package index
#   VENV=.venv-312 JOBS=4 make test  another environment, more processes

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ifdef CPU
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
CHAPTERS := $(sort $(wildcard ch[0-9][0-9]_*))
NOTEBOOKS := $(filter-out %_exercises.ipynb,$(sort $(wildcard ch[0-9][0-9]_*/*.ipynb)))
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 300
unexport PYTHONPATH
unexport PYTHONHOME

.PHONY: help run test lab export student notebooks check-long clean distclean same-python
.DEFAULT_GOAL := help

help:
	@echo "make run         a Llama built in this book tells a story (ARGS=\"...\" goes to llamabook run)"
	@echo "make test        prove everything: package, exercises and every cell of the notebooks"
	@echo "make lab         open the book in JupyterLab (ARGS=\"--no-browser\" and the like go to jupyter lab)"
	@echo "make export      write the package from the notebooks you have edited"
	@echo "make student     write the student notebooks from their solutions"
	@echo "make notebooks   execute all notebooks in place"
	@echo "make check-long  the slow, exhaustive checks"
	@echo "make clean       remove what builds and tests leave behind; make distclean: and $(VENV)"

run: $(VENV)/.installed-run
	@$(PY) -m llamabook run $(ARGS)

lab: $(VENV)/.installed-lab
	$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/$(firstword $(NOTEBOOKS)) $(ARGS)

# One thread a process, since JOBS processes share the cores; nothing of the user's settings, no network.
test check-long notebooks: export MPLCONFIGDIR = $(abspath $(VENV))/matplotlib
test check-long notebooks: export IPYTHONDIR = $(abspath $(VENV))/ipython
test check-long notebooks: export HF_HUB_OFFLINE = 1
test check-long notebooks: export TOKENIZERS_PARALLELISM = false
test check-long notebooks: export PYDEVD_DISABLE_FILE_VALIDATION = 1
test check-long: export OMP_NUM_THREADS = 1

test: $(VENV)/.installed-test
	@test -n "$(NOTEBOOKS)" || { echo "make test: there is no notebook to run" >&2; exit 1; }
	$(PY) tools/export.py --check
	$(PY) tools/make_student.py --check
	$(PY) -m pytest -n $(JOBS) --dist loadfile --durations 8 $(NBVAL) tests $(NOTEBOOKS)

check-long: $(VENV)/.installed-test
	$(PY) -m pytest -m long --durations 0 tests

export:
	$(PYTHON) tools/export.py

student:
	$(PYTHON) tools/make_student.py

notebooks: $(VENV)/.installed-test
	$(PY) tools/run_notebooks.py $(NOTEBOOKS)

clean:
	rm -rf build dist pkg/build pkg/dist pkg/*.egg-info .pytest_cache .hypothesis
	find . -path './$(VENV)' -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf

distclean: clean
	rm -rf "$(VENV)"

# ---- setting up: a stamp is written only after a whole installation, so an interrupted one starts again.

set_run = -e ./pkg
set_lab = -e "./pkg[book]"
set_test = -r requirements.txt -e ./pkg
also_test = $(VENV)/.installed-run $(VENV)/.installed-lab
fonts_lab = $(PY) -c "import matplotlib.font_manager"
fonts_test = $(fonts_lab)

$(VENV)/.installed-run $(VENV)/.installed-lab $(VENV)/.installed-test: \
$(VENV)/.installed-%: requirements.txt pkg/pyproject.toml $(VENV)/.created | same-python
	@rm -f $@
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) "$$(grep '^torch==' requirements.txt | cut -d ' ' -f 1)")
	$(PIP) -c requirements.txt $(set_$*)
	@$(fonts_$*)
	@touch $@ $(also_$*)

$(VENV)/.created: | same-python
	$(PYTHON) -m venv "$(VENV)"
	@touch $@

# The Python asked for must be new enough, and the one that the environment was made with.
same-python:
	@test -f $(VENV)/.created -a "$(origin PYTHON)" = file \
	|| $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "make: $(PYTHON) is missing or older than Python 3.10; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test ! -x $(PY) -o "$(origin PYTHON)" = file \
	|| test "$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])')" = \
	        "$$($(PY) -c 'import sys; print(sys.version_info[:2])')" \
	|| { echo "make: $(VENV) was made with another Python; add VENV=.venv-other, or run make distclean" >&2; exit 1; }
