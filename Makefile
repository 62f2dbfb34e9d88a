# make demo   environment, data, a sparse training run on this machine, a text sample, two plots
# make test   lint and the fast tests, which are not marked `slow`: four minutes on two cores
# make test-all  make test, then the slow tests (long grids, real processes, torchrun, torch.compile), then make test-ptx
# make test-ptx  the kernels' tests on the PTX that Triton compiles for sm_90a (PTX=80: sm_80), in an interpreter; no GPU
# make gpu    the tests that need a CUDA GPU
# make lint   ruff only
# make faults kill and stop training at many points, and write results/faults.json (about 40 minutes)
# Packages are installed into .venv. `make PYTHON=python3.12 ...` makes it with another Python.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PTX ?= 90
PTX_TESTS := tests/test_kernels.py tests/ptx
PTX_FIRST := fused or weight_pack or mvue_pack

.PHONY: demo test test-slow test-ptx test-all gpu lint faults

# Two pytest processes in parallel, because a test uses one core. The report of the first is printed at the end.
define side_by_side
@$(PY) -m pytest -q $(1) > .pytest_half.log 2>&1 & first=$$!; \
$(PY) -m pytest -q $(2); second=$$?; \
wait $$first; first=$$?; cat .pytest_half.log; rm -f .pytest_half.log; \
test $$first -eq 0 -a $$second -eq 0
endef
# All tests with the options $(1), in two halves: the paths $(2), and everything else in tests/.
two_halves = $(call side_by_side,$(1) $(2),$(1) tests $(2:%=--ignore=%))
FOLDERS := $(sort $(dir $(wildcard tests/*/test_*.py)))
TRAIN := $(wildcard tests/test_train*.py)

# One thread is enough, because the demo's tensors are tiny. On a busy machine OpenMP threads wait for each other.
demo: .venv/installed
	@test -f data/pystdlib_char/train.bin || $(PY) data/pystdlib_char/prepare.py
	OMP_NUM_THREADS=1 $(PY) train.py config/demo.py
	$(PY) sample.py --out_dir=out-demo --start="def " --num_samples=1 --max_new_tokens=400
	$(PY) -m runtime.plot out-demo

test: lint
	$(call two_halves,-m "not slow",$(FOLDERS) $(TRAIN))

test-slow: .venv/installed-dev
	$(call two_halves,-m slow,$(wildcard tests/runtime tests/methods tests/tools) $(TRAIN))

# Most of the time is compilation by Triton. Later runs use its cache (~/.triton/cache).
test-ptx: export NANO24_PTX = $(PTX)
test-ptx: .venv/installed-dev
	$(call side_by_side,$(PTX_TESTS) -k "$(PTX_FIRST)",$(PTX_TESTS) -k "not ($(PTX_FIRST))")

# One after another, because each uses two cores.
test-all: test
	$(MAKE) test-slow
	$(MAKE) test-ptx

gpu:
	$(PYTHON) -m pytest -m gpu

lint: .venv/installed-dev
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --quiet --check .

faults: .venv/installed-dev
	$(PY) tests/faults.py --kills 20 --out results/faults.json

.venv/installed: requirements.txt
	@echo "installing requirements.txt into .venv (some minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nano24 needs Python 3.10 or newer; try make PYTHON=...")'
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt
	@touch $@

# torch's CUDA build depends on a certain triton. Install triton from requirements-dev.txt only if there is none.
.venv/installed-dev: requirements-dev.txt .venv/installed
	@echo "installing requirements-dev.txt into .venv"
	@if $(PY) -c 'import triton' 2>/dev/null; then grep -v '^triton' requirements-dev.txt; else cat requirements-dev.txt; fi \
		> .venv/requirements-dev.txt
	@$(PIP) -r .venv/requirements-dev.txt
	@touch $@
