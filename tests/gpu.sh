#!/bin/sh
# gpu.sh: everything that needs a GPU, in one call of under ten minutes:    sh tests/gpu.sh
# Builds here, runs the kernel tests on the card, compute-sanitizer on a few of them, the small model that ships on both
# back-ends for every policy and through the command line, then the speed of LLaVA-7B and 13B shapes with random weights, and
# PyTorch and transformers beside it where they are installed. Prints all of it and writes bench/DATE-CARD.md.
# Needs nvcc, a C compiler with OpenMP, make and a card of compute capability 8.0 or more; for what reads pictures (the small
# model's tests, not the speed) stb_image.h too, in STB_DIR or where the Makefile looks.
#
#     GPU_SH_QUICK=1 sh tests/gpu.sh     leaves the speed out
#     GPU_SH_DRY=1 sh tests/gpu.sh       without a card: the emulator in its place, toy sizes, the report in build/. Its numbers mean
#                                        nothing, but this script, which seldom meets its machine, is known to reach its end

cd "$(dirname "$0")/.." || exit 1
NVCC=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
PYTHON=${PYTHON:-python3}
ARCH=${ARCH:-native}
BUILD=${BUILD:-build/gpu}
dry=$GPU_SH_DRY
export OMP_WAIT_POLICY=passive
failed=0
begin=$(date +%s)
left() { echo $((580 - $(date +%s) + begin)); }          # seconds of the ten minutes
at_most() {                                              # at_most SECONDS COMMAND…: no longer than what is left either
    s=$1; shift
    [ -n "$dry" ] && s=$((10 * s)) || { [ "$(left)" -lt "$s" ] && s=$(left); }
    [ "$s" -lt 5 ] && { echo "(no time left)"; return 1; }
    timeout "$s" "$@"
}

if [ -n "$dry" ]; then
    card="no card"
    folder=$BUILD
    about="Dry run in the emulator"
else
    "$NVCC" --version >/dev/null 2>&1 || { echo "gpu.sh: no nvcc: install the CUDA toolkit, or set NVCC" >&2; exit 1; }
    card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
    [ -n "$card" ] || { echo "gpu.sh: no GPU: nvidia-smi names none (GPU_SH_DRY=1 runs without)" >&2; exit 1; }
    folder=bench
    about="$("$NVCC" --version | sed -n 's/^.*release \([0-9.]*\).*/CUDA \1/p'), driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
fi
mkdir -p "$BUILD" "$folder"
out=$folder/$(date +%Y-%m-%d)-$(echo "$card" | tr -c 'A-Za-z0-9\n' '-' | tr -s '-').md
say() { echo "$@" | tee -a "$out"; }
verdict() {                                              # verdict STATUS TEXT
    if [ "$1" = 0 ]; then say "- $2: ok"; else say "- $2: **FAILED** (status $1)"; failed=1; fi
}
echo "# $card, $(date +%Y-%m-%d)" > "$out"
say ""
say "Written by \`sh tests/gpu.sh\`; $about; commit $(git describe --always --dirty 2>/dev/null || echo unknown)."
say ""

# ----------------------------------------------------------------------------
# build, all at once

if [ -n "$dry" ]; then
    emulate="${CXX:-g++} -std=gnu++17 -O2 -Iinclude"
    $emulate tests/test_cuda.cpp -o "$BUILD/test_cuda" >"$BUILD/test_cuda.log" 2>&1 &
    test_pid=$!
    $emulate -include tests/cuda_on_cpu.h -x c++ tests/gpu_bench.cu -o "$BUILD/gpu_bench" >"$BUILD/gpu_bench.log" 2>&1 &
    bench_pid=$!
    make -k -j2 BUILD="$BUILD" CUDA=0 "$BUILD/gpu_model_emulated" "$BUILD/cuda_scenes" "$BUILD/llava_emulated" >"$BUILD/make.log" 2>&1 &
    make_pid=$!
    scenes="$BUILD/cuda_scenes full elastic" model=$BUILD/gpu_model_emulated llava=$BUILD/llava_emulated cases= sizes=dry
else
    "$NVCC" -O3 -Iinclude -arch=$ARCH -x cu tests/test_cuda.cpp -o "$BUILD/test_cuda" >"$BUILD/test_cuda.log" 2>&1 &
    test_pid=$!
    "$NVCC" -O3 -Iinclude -arch=$ARCH tests/gpu_bench.cu -o "$BUILD/gpu_bench" >"$BUILD/gpu_bench.log" 2>&1 &
    bench_pid=$!
    make -k -j4 BUILD="$BUILD" CUDA=1 NVCC="$NVCC" ARCH="$ARCH" \
        "$BUILD/gpu_model" "$BUILD/gpu_scenes" "$BUILD/llava" >"$BUILD/make.log" 2>&1 &
    make_pid=$!
    scenes=$BUILD/gpu_scenes model=$BUILD/gpu_model llava=$BUILD/llava cases=all sizes="7B 13B"
fi
say "## Tests"
say ""
wait $test_pid
status=$?
verdict $status "kernel tests build"
[ $status = 0 ] || tail -n 20 "$BUILD/test_cuda.log"

# ----------------------------------------------------------------------------
# the kernel tests

at_most 150 "$BUILD/test_cuda" ${dry:+quick} >"$BUILD/test.log" 2>&1
status=$?
verdict $status "every operation against its naive double-precision version ($(tail -n 1 "$BUILD/test.log"))"
[ $status = 0 ] || grep FAILED "$BUILD/test.log" | head -n 20

# ----------------------------------------------------------------------------
# the model that ships, on both back-ends: logits and kept slots for every policy; then the program itself, greedy

wait $make_pid
status=$?
verdict $status "the programs build"
[ $status = 0 ] || tail -n 20 "$BUILD/make.log"
at_most 60 $scenes >"$BUILD/scenes.txt" 2>&1
verdict $? "the small model on the CPU and on the card, every policy"
at_most 90 "$PYTHON" tests/test_cuda_cli.py "$llava" models/scenes-llava.bin $cases >"$BUILD/cli.txt" 2>&1
status=$?
verdict $status "./llava -b cuda says what ./llava -b cpu says: every policy and option ($(tail -n 1 "$BUILD/cli.txt"))"
[ $status = 0 ] || grep FAILED "$BUILD/cli.txt" | head -n 20
say ""
sed 's/^/    /' "$BUILD/scenes.txt" | tee -a "$out"
say ""
[ "$GPU_SH_QUICK" = 1 ] && { echo "wrote $out"; exit $failed; }

# ----------------------------------------------------------------------------
# speed

say "## Speed"
say ""
wait $bench_pid || { verdict 1 "the benchmark builds"; tail -n 20 "$BUILD/gpu_bench.log"; }
rate=dry
[ -n "$dry" ] || rate=$(at_most 60 "$PYTHON" tests/gpu_peer.py matmul 2>/dev/null || echo 0)
report() {                                               # report SECONDS WHAT COMMAND…: its tables, and whether it ended
    s=$1; what=$2; shift 2
    at_most "$s" "$@" >"$BUILD/part.md" 2>"$BUILD/part.err"
    status=$?
    tee -a "$out" <"$BUILD/part.md"
    verdict $status "$what ran to its end"
    [ $status = 0 ] || tail -n 5 "$BUILD/part.err"
    say ""
}
report 60 "card and matrix products" "$BUILD/gpu_bench" "$BUILD/rates" "$rate"
if [ -n "$dry" ]; then
    report 60 "toy model" "$model" dry
else
    read -r copy matrix <"$BUILD/rates"
    report 200 "7B" "$model" 7B "$copy" "$matrix"
    report 90 "13B" "$model" 13B "$copy" "$matrix"
fi

# ----------------------------------------------------------------------------
# the sanitizer, and PyTorch: last, so that they take what time is left

say "## Sanitizer"
say ""
sanitizer=$(command -v compute-sanitizer || echo "$(dirname "$NVCC")/compute-sanitizer")
if [ -x "$sanitizer" ] && [ -z "$dry" ]; then
    for tool in memcheck racecheck; do
        for part in again graph; do
            at_most 30 "$sanitizer" --tool $tool --error-exitcode 9 "$BUILD/test_cuda" $part >"$BUILD/$tool-$part.log" 2>&1
            status=$?
            if grep -q "Device not supported" "$BUILD/$tool-$part.log"; then say "- compute-sanitizer $tool: cannot be run on this machine"; break; fi
            verdict $status "compute-sanitizer $tool, test \"$part\""
            [ $status = 0 ] || tail -n 15 "$BUILD/$tool-$part.log"
        done
    done
else
    say "- compute-sanitizer: not installed"
fi
say ""
say "## PyTorch"
say ""
if "$PYTHON" -c "import torch, transformers" 2>/dev/null; then
    for size in $sizes; do report 90 "transformers, $size" "$PYTHON" tests/gpu_peer.py "$size"; done
else
    say "- transformers: not run (PyTorch or transformers is not installed)"
fi
say ""
echo "wrote $out ($(($(date +%s) - begin)) s)"
exit $failed
