# vlm.c: `make help` says what there is. Needs a C compiler with OpenMP, make, and stb_image.h (Debian: libstb-dev).

CC     ?= cc
CFLAGS ?= -O3 -march=native
WARN   := -std=gnu11 -Wall -Wextra
STRICT := -ffp-contract=off
STB_DIR ?= $(firstword $(wildcard /usr/include/stb /usr/local/include/stb /opt/homebrew/include/stb /opt/homebrew/include))
ALL    := $(WARN) $(CFLAGS) -fopenmp -Iinclude -I$(or $(STB_DIR),/usr/include/stb)
HEADERS := $(wildcard include/*.h tests/*.h)
OBJ    := build/kernels.o build/policies.o build/tokenizer.o
TESTS  := $(patsubst tests/%.c,build/%,$(wildcard tests/test_*.c))

all: llava

llava: build/llava.o $(OBJ)
	$(CC) $(ALL) -o $@ $^ -lm

build/kernels.o: kernels.c $(HEADERS) | build
	$(CC) $(ALL) -c -o $@ $<
build/%.o: %.c $(HEADERS) | build
	$(CC) $(ALL) $(STRICT) -c -o $@ $<

build/test_%: tests/test_%.c $(OBJ) $(HEADERS) llava.c | build
	$(CC) $(ALL) $(STRICT) -o $@ $< $(OBJ) -lm
build:
	mkdir -p build

clean:
	rm -rf build llava
.PHONY: all clean
