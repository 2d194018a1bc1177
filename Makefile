# Two commands do all set-up on a fresh machine (Python 3.10+, a C++ compiler):
#   make train   harvest activations, train a sparse autoencoder on them, report    -> runs/first/
#   make test    the whole test suite

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STORE ?= activations/minilm
RUN ?= runs/first

# The tested release. pip takes a local build of it (2.13.0+cpu) where the machine offers one, else the registry's
# build, which on Linux is the one for CUDA. A torch that is already installed and sees a GPU is used as it is.
TORCH ?= torch==2.13.0
HAS_CUDA_TORCH := $(shell $(PYTHON) -c "import torch; print(torch.cuda.is_available())" 2>/dev/null)
ifeq ($(HAS_CUDA_TORCH),True)
SITE := --system-site-packages
TORCH :=
endif

SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: train test lint bench clean

train: $(VENV)/installed
	$(BIN)/sparsekern harvest $(STORE)
	$(BIN)/sparsekern train $(STORE) --output $(RUN) --overwrite \
	    --expansion 64 --k 32 --steps 400 --lr 1e-3 --eval-every 100 --checkpoint-every 200

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Against the peers, on made data, and on STORE where there is one.
bench: $(VENV)/installed-bench
	$(BIN)/sparsekern bench $(if $(wildcard $(STORE)/manifest.json),--activations $(STORE))

clean:
	rm -rf build dist *.egg-info sparsekern/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/python-ok:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sparsekern needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(SITE) $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install "$(TORCH)")
	touch $@

$(VENV)/installed: $(VENV)/python-ok $(SOURCES)
	$(BIN)/python -m pip install -e ".[cli,models,analysis,report]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -e ".[cli,models,analysis,report,dev]"
	touch $@

# dictionary-learning asks for torchvision and does not use it; a build that does not match torch breaks the peers.
$(VENV)/installed-# Against the peers, on made data, and on STORE where there is one.
bench: $(VENV)/installed
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e ".[cli,models,analysis,report,bench]"
	$(BIN)/python -m pip uninstall -q -y torchvision
	touch $@
