# Two commands do all set-up on a fresh machine (Python 3.10+, a C++ compiler):
#   make train   harvest activations, train a sparse autoencoder on them, report    -> runs/first/
#   make test    the whole test suite
# More:
#   make studies   pages about SAEs of a sentence encoder and of a small language model, and about toys    -> studies/
#   make sanitize  with a compiler alone: the C++ kernels under the address, undefined behaviour and thread sanitizers (-j2)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STORE ?= activations/minilm
LM_STORE ?= activations/docstrings-relu-0
RUN ?= runs/first
STUDIES ?= studies

# The tested release. pip takes a local build of it (2.13.0+cpu) where the machine offers one, else the registry's
# build, which on Linux is the one for CUDA. A torch that is already installed and sees a GPU is used as it is.
TORCH ?= torch==2.13.0
HAS_CUDA_TORCH := $(shell $(PYTHON) -c "import torch; print(torch.cuda.is_available())" 2>/dev/null)
ifeq ($(HAS_CUDA_TORCH),True)
SITE := --system-site-packages
TORCH :=
endif

SOURCES := pyproject.toml setup.py $(shell find csrc -type f -not -name '*.pyc')

.PHONY: train studies test lint bench bench-gpu clean sanitize sanitize-address sanitize-thread

train: $(VENV)/installed
	$(BIN)/sparsekern harvest $(STORE)
	$(BIN)/sparsekern train $(STORE) --output $(RUN) --overwrite \
	    --expansion 64 --k 32 --steps 400 --lr 1e-3 --eval-every 100 --checkpoint-every 200

# The SAEs of a store are trained by its first study, and shared.
studies: $(VENV)/installed
	$(BIN)/sparsekern harvest $(STORE)
	for study in canonical splitting completeness opposing geometry polytope plateaus; do \
	    $(BIN)/sparsekern study $$study $(STORE) --output $(STUDIES)/$$study --saes $(STUDIES)/saes --overwrite || exit 1; \
	done
	$(BIN)/sparsekern harvest $(LM_STORE) --model docstrings-relu-0
	for study in geometry polytope plateaus; do \
	    $(BIN)/sparsekern study $$study $(LM_STORE) --output $(STUDIES)/lm/$$study --saes $(STUDIES)/lm/saes --overwrite \
	        || exit 1; \
	done
	$(BIN)/sparsekern study toy --output $(STUDIES)/toy --overwrite

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: sanitize-address sanitize-thread

NATIVE_SOURCES := $(wildcard csrc/cpu/* tests/native/*.h tests/native/*.cpp)
# The CUDA kernels run on their emulator (csrc/cuda/emulator.h).
CUDA_SOURCES := $(filter-out csrc/cuda/bindings.cu,$(wildcard csrc/cuda/* tests/native/*.h tests/native/cuda/*))
# -O1 keeps the stack traces readable. GCC 12 takes the undefined vectors of its own AVX-512 header for uninitialized.
NATIVE_FLAGS := -std=c++17 -O1 -g -fno-omit-frame-pointer -fopenmp-simd -ffp-contract=fast -Wall -Wextra \
    -Wno-uninitialized -Wno-maybe-uninitialized -D_GLIBCXX_ASSERTIONS -Icsrc
CUDA_FLAGS := -ffp-contract=off -fno-strict-aliasing -Wno-unknown-pragmas -Wno-psabi -x c++
NATIVE_LIBS := -pthread $(if $(filter Linux,$(shell uname -s)),-ldl)
SANITIZERS_address := address,undefined
SANITIZERS_thread := thread
# ThreadSanitizer wants the addresses where older kernels put them ("unexpected memory mapping" otherwise).
NO_ASLR := $(shell setarch $$(uname -m) -R true 2>/dev/null && echo setarch $$(uname -m) -R)

sanitize-address sanitize-thread: sanitize-%: build/native/% build/native/cuda-%
	for driver in $^; do \
	    UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 $(NO_ASLR) $$driver || exit 1; \
	done

build/native/address build/native/thread: build/native/%: $(NATIVE_SOURCES) build/native/%.probe
	$(CXX) $(NATIVE_FLAGS) -fsanitize=$(SANITIZERS_$*) -fno-sanitize-recover=all \
	    $(filter %.cpp,$^) -o $@ $(NATIVE_LIBS)

build/native/cuda-address build/native/cuda-thread: build/native/cuda-%: $(CUDA_SOURCES) build/native/%.probe
	$(CXX) $(NATIVE_FLAGS) $(CUDA_FLAGS) -fsanitize=$(SANITIZERS_$*) -fno-sanitize-recover=all \
	    $(filter %.cpp %.cu,$^) -o $@ $(NATIVE_LIBS)

build/native/address.probe build/native/thread.probe: build/native/%.probe: Makefile
	@mkdir -p $(@D)
	@echo 'int main() {}' | $(CXX) -fsanitize=$(SANITIZERS_$*) -x c++ - -o $@ || { \
	    echo "make sanitize: $(CXX) cannot link with -fsanitize=$(SANITIZERS_$*). Install its sanitizer runtimes" \
	         "(libasan, libubsan, libtsan; compiler-rt for clang), or set CXX to a compiler that has them." >&2; exit 1; }

# Against the peers, on made data, and on STORE where there is one.
bench: $(VENV)/installed-bench
	$(BIN)/sparsekern bench $(if $(wildcard $(STORE)/manifest.json),--activations $(STORE))

# The whole of it on one CUDA GPU, in under ten minutes.
bench-gpu: $(VENV)/installed-bench
	$(BIN)/python -m sparsekern.bench.gpu

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

# dictionary-learning and overcomplete ask for torchvision, not needed here; a build that does not match torch breaks the peers.
$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e ".[cli,models,analysis,report,bench]"
	$(BIN)/python -m pip uninstall -q -y torchvision
	touch $@
