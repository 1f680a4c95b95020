# `make demo` and `make test` need only python3 (3.10 or newer): they set up .venv and fetch the model.

PYTHON ?= python3
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct
SELECTED :=

.PHONY: demo test quick check kernels fetch referee fuzz clean

# Calibrating on 4,096 tokens takes most of the time; the default of 16,384 is better.
demo: fetch
	@mkdir -p build
	$(BIN)/tritgguf convert $(MODEL) build/smollm2-135m-d3-calibrated.gguf --depth 3 --encoder calibrated --tokens 4096 --overwrite
	$(BIN)/tritgguf convert $(MODEL) build/smollm2-135m-d2-calibrated.gguf --depth 2 --encoder calibrated --tokens 4096 --overwrite
	$(BIN)/python -m tools.quality.demo $(MODEL) build/smollm2-135m-d3-calibrated.gguf build/smollm2-135m-d2-calibrated.gguf

# `quick` leaves out the tests that are marked slow; it is no replacement for `test`.
quick: SELECTED := -m "not slow"

# The kernels are compiled while mypy, which has one thread, checks the types.
test quick: .venv/stamp
	$(MAKE) --no-print-directory -j 3 check kernels fetch
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(SELECTED)

check: .venv/stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

kernels: .venv/stamp
	@$(BIN)/python tests/support/compile_kernels.py

fetch: .venv/stamp
	$(BIN)/python -m tools.models.fetch_model smollm2

# Builds the llama.cpp library that tests/referee/test_against_llama_cpp.py needs; without it, those tests are skipped.
referee: .venv/stamp
	$(BIN)/python -m tools.llama_cpp.referee

# Fuzzes for half a minute with each of two fixed seeds (docs/safety.md).
fuzz: .venv/stamp
	$(MAKE) --no-print-directory -j 2 fuzz-seed-1 fuzz-seed-2

fuzz-seed-%:
	$(BIN)/python -m tools.fuzz.fuzzer --seconds 30 --seed $*

# Removes everything that can be made again, except the models in models/.
clean:
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find tritgguf cpu_kernels tests tools -name __pycache__ -prune -exec rm -rf {} +

# Python compiles what is imported; compiling all of torch and transformers takes longer.
.venv/stamp: pyproject.toml constraints.txt
	@echo 'setting up .venv (torch and transformers included, for verify and the tests)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[all,dev,judges]'
	@touch $@
