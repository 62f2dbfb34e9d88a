# make demo   environment, data, a sparse training run on this machine, a text sample, two plots
# make test   lint and the fast tests (not marked `slow`): four minutes on two cores; skipped and deselected ones are counted
# make test-all  make test, then the slow tests (long grids, real processes, torchrun, torch.compile), then make test-ptx
# make test-ptx  the kernels' tests on what Triton compiles for sm_90a (PTX=80: sm_80), interpreted; needs no GPU
# make gpu    the tests that need a CUDA GPU
# make lint   ruff alone
# make faults kill and stop training at many points, write results/faults.json (about 40 minutes)
# Everything is installed into .venv. `make PYTHON=python3.12 ...` picks another Python for it.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PTX ?= 90
PTX_TESTS := tests/test_kernels.py tests/ptx
PTX_FIRST := fused or weight_pack or mvue_pack

.PHONY: demo test test-slow test-ptx test-all gpu lint faults

# Two runs of pytest side by side, since a test uses one core; the first one's report is printed when the second has ended.
define side_by_side
@$(PY) -m pytest -q $(1) > .pytest_half.log 2>&1 & first=$$!; \
$(PY) -m pytest -q $(2); second=$$?; \
wait $$first; first=$$?; cat .pytest_half.log; rm -f .pytest_half.log; \
test $$first -eq 0 -a $$second -eq 0
endef
# All tests, with the options $(1): the first half is the paths $(2) of tests/, the second half is all else in tests/.
two_halves = $(call side_by_side,$(1) $(2),$(1) tests $(2:%=--ignore=%))
FOLDERS := $(sort $(dir $(wildcard tests/*/test_*.py)))
TRAIN := $(wildcard tests/test_train*.py)

# One thread: the demo's tensors are tiny, and on a busy machine OpenMP's threads spend their time waiting for each other.
demo: .venv/installed
	@test -f data/pystdlib_char/train.bin || $(PY) data/pystdlib_char/prepare.py
	OMP_NUM_THREADS=1 $(PY) train.py config/demo.py
	$(PY) sample.py --out_dir=out-demo --start="def " --num_samples=1 --max_new_tokens=400
	$(PY) -m runtime.plot out-demo

test: lint
	$(call two_halves,-m "not slow",$(FOLDERS) $(TRAIN))

test-slow: .venv/installed-dev
	$(call two_halves,-m slow,$(wildcard tests/runtime tests/methods tests/tools) $(TRAIN))

# Most of the time goes to Triton's compiler, whose cache (~/.triton/cache) makes later runs short.
test-ptx: export NANO24_PTX = $(PTX)
test-ptx: .venv/installed-dev
	$(call side_by_side,$(PTX_TESTS) -k "$(PTX_FIRST)",$(PTX_TESTS) -k "not ($(PTX_FIRST))")

# One after the other, since each of them takes two cores.
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

# torch's CUDA build pins a triton of its own; only where there is none, the one of requirements-dev.txt is installed.
.venv/installed-dev: requirements-dev.txt .venv/installed
	@echo "installing requirements-dev.txt into .venv"
	@if $(PY) -c 'import triton' 2>/dev/null; then grep -v '^triton' requirements-dev.txt; else cat requirements-dev.txt; fi \
		> .venv/requirements-dev.txt
	@$(PIP) -r .venv/requirements-dev.txt
	@touch $@
