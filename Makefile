# vlm.c: `make help` says what there is.
# `make` needs a C compiler with OpenMP, make and stb_image.h (Debian: libstb-dev, or any copy by STB_DIR=) and installs nothing.

CC      ?= cc
CXX     ?= g++
CFLAGS  ?= -O3 -march=native
BUILD   ?= build
DEPS    ?= 1
STB_DIR ?= $(or $(patsubst %/stb_image.h,%,$(firstword $(wildcard $(addsuffix /stb_image.h,/usr/include/stb /usr/local/include/stb /usr/include /usr/local/include)))),/usr/include/stb)
NVCC    ?= $(shell command -v nvcc 2>/dev/null)
CUDA    ?= $(if $(NVCC),1,0)
ARCH    ?= $(if $(shell nvidia-smi -L 2>/dev/null),native,sm_80)

C       := $(CC) -std=gnu11 -D_GNU_SOURCE -Wall -Wextra $(CFLAGS) -fopenmp -Iinclude -I$(STB_DIR)
STRICT  := -ffp-contract=off
# budgets are counted in doubles: contraction would miscount them; the kernels alone may fuse
HEADERS := $(wildcard include/*.h tests/*.h)
OBJ     := $(addprefix $(BUILD)/,kernels.o policies.o tokenizer.o)
TESTS   := $(patsubst tests/%.c,$(BUILD)/%,$(wildcard tests/test_*.c))
GOLDEN  ?= $(wildcard ../shared/golden/*.gold)
PYTHON  ?= python3

ifeq ($(CUDA),1)
OBJ     += $(BUILD)/kernels_cuda.o
C       += -DHAVE_CUDA
CUDA_HOME ?= $(firstword $(patsubst %/lib64/libcudart.so,%,$(wildcard $(addsuffix /lib64/libcudart.so,$(abspath $(dir $(realpath $(NVCC)))..) /usr/local/cuda))) /usr/local/cuda)
CUDALIB := -L$(CUDA_HOME)/lib64 -lcudart -lstdc++
endif

all: llava                                  ## ./llava (CUDA=0|1 forces the CUDA back-end off or on)

llava: $(BUILD)/llava
	cp $< $@
$(BUILD)/llava: $(BUILD)/llava.o $(OBJ)
	$(C) -o $@ $^ $(CUDALIB) -lm

$(BUILD)/kernels.o: kernels.c $(HEADERS) Makefile | $(BUILD)
	$(C) -c -o $@ $<
$(BUILD)/kernels_cuda.o: kernels.cu $(HEADERS) Makefile | $(BUILD)
	$(NVCC) -O3 -Iinclude -arch=$(ARCH) -DHAVE_CUDA -c -o $@ $<
$(BUILD)/%.o: %.c $(HEADERS) Makefile | $(BUILD)
	$(C) $(STRICT) -c -o $@ $<
$(BUILD)/%: tests/%.c $(OBJ) $(HEADERS) llava.c Makefile | $(BUILD)
	$(C) $(STRICT) -o $@ $< $(OBJ) $(CUDALIB) -lm
$(BUILD):
	mkdir -p $@

# kernels.cu on the CPU (tests/cuda_on_cpu.h): its kernels against the naive versions, and the shipped model on both back-ends
EMULATE := $(CXX) -std=gnu++17 -Wall -Wextra $(if $(findstring sanitize,$(CFLAGS)),$(CFLAGS),-O2) -Iinclude
$(BUILD)/test_cuda: tests/test_cuda.cpp kernels.cu $(HEADERS) Makefile | $(BUILD)
	$(EMULATE) -o $@ $<
$(BUILD)/kernels_emulated.o: kernels.cu $(HEADERS) Makefile | $(BUILD)
	$(EMULATE) -Dcuda=cuda_on_cpu -include tests/cuda_on_cpu.h -x c++ -c -o $@ $<
$(BUILD)/cuda_scenes: tests/cuda_scenes.c $(BUILD)/kernels_emulated.o $(OBJ) $(HEADERS) llava.c Makefile
	$(C) $(STRICT) -DEMULATED -o $@ $< $(BUILD)/kernels_emulated.o $(filter-out %_cuda.o,$(OBJ)) -lstdc++ -lm
$(BUILD)/llava_emulated: llava.c $(BUILD)/kernels_emulated.o $(OBJ) $(HEADERS) Makefile
	$(C) $(STRICT) -DHAVE_CUDA -Dcuda=cuda_on_cpu -o $@ $< $(BUILD)/kernels_emulated.o $(filter-out %_cuda.o,$(OBJ)) -lstdc++ -lm
$(BUILD)/gpu_model_emulated: tests/gpu_model.c $(BUILD)/kernels_emulated.o $(OBJ) $(HEADERS) llava.c Makefile
	$(C) $(STRICT) -DEMULATED -o $@ $< $(BUILD)/kernels_emulated.o $(filter-out %_cuda.o,$(OBJ)) -lstdc++ -lm
$(BUILD)/gpu_scenes: tests/cuda_scenes.c $(OBJ) $(HEADERS) llava.c Makefile
	$(C) $(STRICT) -o $@ $< $(OBJ) $(CUDALIB) -lm

demo:                                       ## build, then describe a picture with the small model that ships
	@sh tests/deps.sh demo $(DEPS)
	@$(MAKE) --no-print-directory llava
	./llava models/scenes-llava.bin models/scenes/1001.png

test:                                       ## build and run every test: no downloads, no GPU, under 3 minutes
	@sh tests/deps.sh test $(DEPS)
	@$(MAKE) --no-print-directory -j2 CUDA=0 BUILD=$(BUILD)/test tests
	@BUILD=$(BUILD)/test sh tests/run.sh $(LIST)
tests: $(BUILD)/llava $(TESTS) $(BUILD)/replay $(BUILD)/test_cuda $(BUILD)/cuda_scenes

replay: $(BUILD)/replay                     ## replay golden files: tests/replay FILE…
	cp $< tests/replay
golden: replay
	tests/replay $(GOLDEN)

bench: $(BUILD)/bench $(BUILD)/bench_policies ## speed of this machine's roofs, kernels and policies
	$(BUILD)/bench
	$(BUILD)/bench_policies

parity:                                     ## against Hugging Face, sentencepiece and Pillow (installs PyTorch into .venv)
	@sh tests/deps.sh parity $(DEPS)
	@$(MAKE) --no-print-directory llava $(BUILD)/tokenizer_cli $(BUILD)/image_cli
	@BUILD=$(BUILD) sh tests/run.sh parity

long: llava $(TESTS) $(BUILD)/fuzz_image $(BUILD)/cuda_scenes $(BUILD)/llava_emulated ## what takes too long for CI: fuzzing, long random runs
	@BUILD=$(BUILD) sh tests/run.sh long
$(BUILD)/fuzz_image: tests/fuzz_image.c $(HEADERS) | $(BUILD)
	$(C) $(STRICT) -O1 -g -fsanitize=address,undefined -fno-sanitize=shift,signed-integer-overflow -o $@ $< -lm

debug:                                      ## every test under AddressSanitizer and UBSan, in build/debug
	@$(MAKE) --no-print-directory test LIST=quick BUILD=$(BUILD)/debug \
	    CFLAGS="-O1 -g -march=native -fsanitize=address,undefined,bounds -fno-sanitize-recover=all -fno-omit-frame-pointer"

deps:                                       ## install what building and testing need (apt; sudo where not root)
	@sh tests/deps.sh test 1

help:                                       ## this text
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 10

clean:                                      ## remove what was built
	rm -rf build llava tests/replay

.PHONY: all demo test tests replay golden bench parity long debug deps help clean
