# make demo    trains a small model on real text and shows what happened
# make test    builds everything that the compilers here can, and runs all tests
# The rest is listed by `make help`.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
TAG = $(shell $(BIN)/python -c "import sys; print(f'cp{sys.version_info.major}{sys.version_info.minor}')")
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Byte code is made of what is imported, when it is: of all of torch it takes longer than installing it.
PIP_INSTALL := $(PIP) install --no-compile
CPP_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')
# What the shared libraries are made of.
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml \
           python/attnres_ext/version.py

# Two programs that use all cores at once (say a build) must not wait for each other in busy loops.
export OMP_WAIT_POLICY ?= passive
export PATH := $(BIN):$(PATH)

.PHONY: help demo demo-ready test test-ready test-processors test-oldest wheel lint format kernels bench results gpu-check clean
.DELETE_ON_ERROR:

help:
	@echo "make demo     train a small model on real text, generate, benchmark; results in runs/demo"
	@echo "make test     build everything and run all tests and lints"
	@echo "make test-processors  tests of what computes, as processors with narrower vectors would run them"
	@echo "make test-oldest  tests of what computes, with the oldest Python, torch and transformers (OLDEST_PYTHON, default python3.10)"
	@echo "make wheel    build a wheel into dist/"
	@echo "make bench    benchmark the operators on the CPU; results in runs/bench"
	@echo "make gpu-check  everything on an NVIDIA GPU, in nine minutes; a record in benchmarks/results"
	@echo "make results    measure everything that documents show, on a quiet machine (some 40 minutes); into benchmarks/results"
	@echo "make kernels  registers, memory and instructions of each CUDA kernel"
	@echo "make lint     ruff and clang-format, without changing anything"
	@echo "make format   ruff and clang-format, in place"
	@echo "make clean    remove the build, keeping the environment"
	@echo "Knobs: PYTHON (default python3), GPU_PYTHON (with a CUDA torch, for gpu-check), GPU_CHECK_ARGS,"
	@echo "       ATTNRES_CUDA=ON|OFF|AUTO, ATTNRES_CUDA_ARCHS, ATTNRES_CPU_SETS=all|native, MAX_JOBS"

$(VENV)/build.stamp: requirements/build.txt
	@echo "Creating $(VENV) and installing what compiling needs: PyTorch and CMake (half a minute, and their download)"
	@$(PYTHON) -c 'import sys; sys.exit("attnres-ext needs Python 3.10 or later, this is " + sys.version.split()[0] + "; set PYTHON" if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -r requirements/build.txt
	@touch $@

$(VENV)/run.stamp: $(VENV)/build.stamp requirements/run.txt
	@echo "Installing what running needs (seconds)"
	@$(PIP_INSTALL) -r requirements/run.txt
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp requirements/test.txt
	@echo "Installing what testing needs (half a minute)"
	@$(PIP_INSTALL) -r requirements/test.txt
	@touch $@

$(VENV)/cuda.stamp: $(VENV)/build.stamp requirements/cuda.txt
	@$(PIP_INSTALL) --no-deps -r requirements/cuda.txt
	@touch $@

# Editable, so that Python sources need no build. `--no-build-isolation`: against the torch that will run it.
INSTALL = $(PIP_INSTALL) --no-build-isolation --no-deps --editable .

# What no device here can run is left out, unless a full build has been made already: CUDA kernels without a GPU, and CPU kernels
# for other processors than this one.
build/demo.stamp: $(VENV)/build.stamp $(SOURCES)
	@echo "Compiling the operators for this machine alone (a minute; make test and make wheel compile them for every one)"
	@ATTNRES_CPU_SETS=$${ATTNRES_CPU_SETS:-native} ATTNRES_CUDA=$${ATTNRES_CUDA:-$(if $(shell command -v nvidia-smi),AUTO,OFF)} $(INSTALL)
	@mkdir -p build && touch $@

build/test.stamp: $(VENV)/build.stamp $(VENV)/cuda.stamp $(SOURCES)
	@echo "Compiling the operators for every processor and device that the compilers here know (some minutes)"
	@$(INSTALL)
	@mkdir -p build && touch $@ build/demo.stamp

# What compiling does not need is installed meanwhile.
SUBMAKE = $(MAKE) --no-print-directory --silent
demo-ready: $(VENV)/build.stamp
	@built=build/demo.stamp; $(SUBMAKE) --question build/test.stamp 2>/dev/null && built=; \
	  $(SUBMAKE) --jobs 2 $$built $(VENV)/run.stamp
test-ready: $(VENV)/build.stamp
	@$(SUBMAKE) --jobs 2 build/test.stamp $(VENV)/test.stamp

# 80 steps show what more of them do: how the losses of the two residuals part, and where each site reads.
demo: demo-ready
	@echo "Training two small models side by side, with and without Attention Residuals (two minutes)"
	attnres train --preset demo --residual standard,block --steps 80 --validate-every 20 --validation-batches 4 \
	  --out runs/demo --overwrite
	@echo "The first pictures are there: runs/demo/loss.png, runs/demo/depth_attention.png"
	@echo "Writing Python with the model (seconds)"
	attnres generate --checkpoint runs/demo --prompt "def " --max-new-tokens 200 --temperature 0.6
	@echo "Timing the operators against plain PyTorch and torch.compile (a minute at most)"
	attnres bench --device cpu --suite quick --seconds 40 --out runs/demo/bench
	attnres bench report runs/demo/bench
	@echo "Everything is in runs/demo: loss.png, depth_attention.png, metrics.jsonl, bench/report.html"

test: test-ready lint
	@cmake -S . -B build/$(TAG) -DATTNRES_TESTS=ON > build/ctest.log && cmake --build build/$(TAG) >> build/ctest.log
	ctest --test-dir build/$(TAG) --output-on-failure
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# One machine stands for several: our kernels, PyTorch's and those of its libraries held to narrower
# vectors. What is right on one processor by luck alone is seen.
COMPUTING = tests/ops tests/module tests/models tests/integrations
SSE = ATTNRES_CPU=baseline ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
AVX2 = ATTNRES_CPU=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2
test-processors: test-ready
	OMP_NUM_THREADS=1 $(SSE) python -m pytest -n 2 --dist worksteal $(COMPUTING) $(PYTEST_ARGS)
	@if ! grep -qs avx512f /proc/cpuinfo; then exit; fi; set -x; \
	  OMP_NUM_THREADS=1 $(AVX2) python -m pytest -n 2 --dist worksteal $(COMPUTING) $(PYTEST_ARGS)

# The oldest Python, torch, transformers and tools that the package says it works with. torch of
# that age brings its CUDA libraries where PyPI has it from: some 7 GB.
OLDEST_PYTHON ?= python3.10
OLDEST := .venv-oldest
$(OLDEST)/test.stamp: requirements/oldest.txt
	@echo "Creating $(OLDEST) and installing the oldest of everything"
	@$(OLDEST_PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check --quiet install -r requirements/oldest.txt
	@touch $@

test-oldest: $(OLDEST)/test.stamp
	PATH=$(CURDIR)/$(OLDEST)/bin:$$PATH ATTNRES_CUDA=OFF python -m pip --disable-pip-version-check --quiet install \
	  --no-build-isolation --no-deps .
	PATH=$(CURDIR)/$(OLDEST)/bin:$$PATH OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal $(COMPUTING) tests/compat \
	  tests/packaging/test_torch_names.py $(PYTEST_ARGS)

wheel: $(VENV)/build.stamp
	$(BIN)/python -m pip --disable-pip-version-check wheel --no-build-isolation --no-deps --wheel-dir dist .

lint: $(VENV)/test.stamp
	ruff check .
	ruff format --check .
	@clang-format --dry-run -Werror $(CPP_FILES) && echo "clang-format: all files as they should be"

format: $(VENV)/test.stamp
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_FILES)

kernels: test-ready
	python tools/kernels.py

bench: demo-ready
	attnres bench --device cpu --suite ops --out runs/bench
	attnres bench report runs/bench

# Needs no environment of ours: it takes the first Python whose torch sees a GPU, and the built _ops.so.
gpu-check:
	@$(PYTHON) -m tools.gpu_check $(if $(GPU_PYTHON),--python $(GPU_PYTHON)) $(GPU_CHECK_ARGS)

# What the documents show and `attnres bench report` draws, measured again. Each part leaves a stamp for this commit,
# so that the next call goes on where one was interrupted; the benchmark goes on within its part.
MEASURED = build/results-$(shell git rev-parse --short HEAD 2>/dev/null)
# All cores, whatever the shell says.
ALL_CORES = env -u OMP_NUM_THREADS -u MKL_NUM_THREADS
results: test-ready
	@$(MAKE) --no-print-directory $(foreach part,build bench plain training,$(MEASURED)/$(part))
	python tools/figures.py --add-training runs/demo
	attnres bench report benchmarks/results
	@rm -r $(MEASURED)

$(MEASURED)/%:
	@mkdir -p $(@D) && echo "results: $*, about $(MINUTES_$*) min; load average $$(cut -d' ' -f1 /proc/loadavg)"
	$(ALL_CORES) $(MEASURE_$*)
	@touch $@

MINUTES_build = 8
MEASURE_build = python tools/time_build.py
MINUTES_bench = 25
MEASURE_bench = attnres bench --device cpu --suite all --out benchmarks/results --resume
MINUTES_plain = 1
MEASURE_plain = attnres bench --device cpu --allocator system --out benchmarks/results --resume
MINUTES_training = 5
MEASURE_training = attnres train --preset demo --residual standard,block --steps 160 --out runs/demo --overwrite

clean:
	rm -rf build dist python/attnres_ext/_ops.so python/attnres_ext/_C*.so python/*.egg-info
