# make demo and make test do all the set-up: they need Python 3.11 and the package index, nothing else
PYTHON ?= python3
BIN = .venv/bin
PY = $(BIN)/python
export OMP_WAIT_POLICY ?= PASSIVE
TESTS = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2

.PHONY: demo test check slow clean

demo: .venv/runtime
	rm -rf runs/demo
	$(PY) train_tokenizer.py --quantizer fsq --out runs/demo
	$(PY) sample.py weights/tiny/prompt.wav --out continuation.wav

test: .venv/dev
	$(TESTS)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TESTS)

slow: .venv/dev
	$(PY) -m pytest -q -m slow

.venv/runtime: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/runtime
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache runs continuation.wav
