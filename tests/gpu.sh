#!/bin/sh
# gpu.sh: everything that needs a GPU, in one call of under ten minutes:    sh tests/gpu.sh
# Builds here, runs the kernel tests on the card, compute-sanitizer on a few of them, the small model that ships on both
# back-ends for every policy, then the benchmark, and PyTorch and transformers beside it where they are installed.
# Prints all of it and writes bench/DATE-CARD.md. Needs nvcc and a card of compute capability 8.0 or more; GPU_SH_QUICK=1
# leaves the benchmarks out.

cd "$(dirname "$0")/.." || exit 1
NVCC=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
PYTHON=${PYTHON:-python3}
BUILD=${BUILD:-build/gpu}
failed=0
begin=$(date +%s)
left() { echo $((570 - $(date +%s) + begin)); }          # seconds of the ten minutes
at_most() {                                              # at_most SECONDS COMMAND…: no longer than what is left either
    s=$1; shift
    [ "$(left)" -lt "$s" ] && s=$(left)
    [ "$s" -lt 5 ] && { echo "(no time left)"; return 1; }
    timeout "$s" "$@"
}

"$NVCC" --version >/dev/null 2>&1 || { echo "gpu.sh: no nvcc: install the CUDA toolkit, or set NVCC" >&2; exit 1; }
card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$card" ] || { echo "gpu.sh: no GPU: nvidia-smi names none" >&2; exit 1; }
mkdir -p "$BUILD" bench
out=bench/$(date +%Y-%m-%d)-$(echo "$card" | tr -c 'A-Za-z0-9\n' '-' | tr -s '-').md
say() { echo "$@" | tee -a "$out"; }
verdict() {                                              # verdict STATUS TEXT
    if [ "$1" = 0 ]; then say "- $2: ok"; else say "- $2: **FAILED** (status $1)"; failed=1; fi
}
echo "# $card, $(date +%Y-%m-%d)" > "$out"
say ""
say "Written by \`sh tests/gpu.sh\`; $("$NVCC" --version | grep release | sed 's/^.*release/CUDA/'), driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)."
say ""

# ----------------------------------------------------------------------------
# build, all at once

"$NVCC" -O3 -Iinclude -arch=native -x cu tests/test_cuda.cpp -o "$BUILD/test_cuda" >"$BUILD/test_cuda.log" 2>&1 &
test_pid=$!
"$NVCC" -O3 -Iinclude -arch=native tests/gpu_bench.cu -o "$BUILD/gpu_bench" >"$BUILD/gpu_bench.log" 2>&1 &
bench_pid=$!
make BUILD="$BUILD" CUDA=1 NVCC="$NVCC" ARCH=native CUDA_HOME="$(dirname "$(dirname "$NVCC")")" "$BUILD/cuda_scenes" >"$BUILD/scenes.log" 2>&1 &
scenes_pid=$!
say "## Tests"
say ""
wait $test_pid
status=$?
verdict $status "kernel tests build"
[ $status = 0 ] || cat "$BUILD/test_cuda.log"

# ----------------------------------------------------------------------------
# the kernel tests, and the sanitizer

at_most 240 "$BUILD/test_cuda" >"$BUILD/test.log" 2>&1
status=$?
verdict $status "every operation against its naive double-precision version ($(tail -n 1 "$BUILD/test.log"))"
[ $status = 0 ] || grep FAILED "$BUILD/test.log" | head -n 20
sanitizer=$(command -v compute-sanitizer || echo "$(dirname "$NVCC")/compute-sanitizer")
if [ -x "$sanitizer" ]; then
    for tool in memcheck racecheck; do
        for part in again graph; do
            at_most 60 "$sanitizer" --tool $tool --error-exitcode 9 "$BUILD/test_cuda" $part >"$BUILD/$tool-$part.log" 2>&1
            verdict $? "compute-sanitizer $tool, test \"$part\""
        done
    done
else
    say "- compute-sanitizer: not installed"
fi

# ----------------------------------------------------------------------------
# the model that ships, on both back-ends: logits and kept slots, for every policy

wait $scenes_pid || { verdict $? "the small model's test builds"; tail -n 20 "$BUILD/scenes.log"; }
if [ -x "$BUILD/cuda_scenes" ] && [ -f models/scenes-llava.bin ]; then
    at_most 90 "$BUILD/cuda_scenes" >"$BUILD/scenes.txt" 2>&1
    verdict $? "the small model on the CPU and on the card"
    say ""
    sed 's/^/    /' "$BUILD/scenes.txt" | tee -a "$out"
else
    say "- the small model: not run (no $BUILD/cuda_scenes or no models/scenes-llava.bin)"
fi
say ""
[ "$GPU_SH_QUICK" = 1 ] && { echo "wrote $out"; exit $failed; }

# ----------------------------------------------------------------------------
# speed

rate=$(at_most 60 "$PYTHON" - <<'PY' 2>/dev/null
import torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
times = []
for i in range(23):
    s, e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    s.record(); a @ b; e.record(); e.synchronize()
    times.append(s.elapsed_time(e))
print(round(2 * 8192**3 / sorted(times[3:])[10] / 1e9))
PY
)
say "## Speed"
say ""
wait $bench_pid || { verdict $? "the benchmark builds"; cat "$BUILD/gpu_bench.log"; }
at_most 300 "$BUILD/gpu_bench" "${rate:-0}" >"$BUILD/bench.md" 2>"$BUILD/bench.err"
status=$?
tee -a "$out" <"$BUILD/bench.md"
cat "$BUILD/bench.err" >&2
verdict $status "the benchmark ran to its end"
say ""

# transformers at the shape of 7B, random weights
at_most 180 "$PYTHON" - >"$BUILD/torch.md" 2>"$BUILD/torch.err" <<'PY'
import time, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_default_dtype(torch.float16)
print("| PyTorch %s, transformers %s, 7B f16 | prompt 620, ms | prompt 2048, ms | decode at 650, tokens/s: batch 1 | batch 8 | batch 16 |" % (torch.__version__, transformers.__version__))
print("|---|---|---|---|---|---|")
def median(f, n):
    times = []
    for i in range(n + 1):
        torch.cuda.synchronize(); t = time.perf_counter(); f(); torch.cuda.synchronize(); times.append(time.perf_counter() - t)
    return sorted(times[1:])[n // 2] * 1e3
for kind in ("eager", "sdpa"):
    with torch.device("cuda"), torch.no_grad():
        m = LlamaForCausalLM._from_config(LlamaConfig(), attn_implementation=kind).eval()
        row = []
        for T in (620, 2048):
            ids = torch.randint(0, 32000, (1, T))
            row.append("%.1f" % median(lambda: m(ids, use_cache=True, output_attentions=kind == "eager", logits_to_keep=1), 5))
        for B in (1, 8, 16):
            past = m(torch.randint(0, 32000, (B, 650)), use_cache=True, logits_to_keep=1).past_key_values
            one = torch.randint(0, 32000, (B, 1))
            row.append("%.1f" % (B * 1e3 / median(lambda: m(one, past_key_values=past, use_cache=True), 20)))
        print("| %s%s | %s |" % (kind, " with attentions" if kind == "eager" else "", " | ".join(row)), flush=True)
        del m, past
    torch.cuda.empty_cache()
PY
status=$?
if [ -s "$BUILD/torch.md" ]; then tee -a "$out" <"$BUILD/torch.md"; else say "- transformers: not run ($(tail -n 1 "$BUILD/torch.err"))"; fi
[ $status = 0 ] || tail -n 3 "$BUILD/torch.err" >&2
say ""
echo "wrote $out ($(($(date +%s) - begin)) s)"
exit $failed
