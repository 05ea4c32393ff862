#!/bin/sh
# run.sh [test|parity|long]: runs a list of test programs and adds their "N passed, M failed" lines up. A program that ends without
# such a line, or whose status does not agree with it, counts as one failure.
list=${1:-test} build=${BUILD:-build} python=.venv/bin/python
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}    # GNU's threads spin while they wait: beside another process that costs ten times the work
passed=0 failed=0
out=$(mktemp)
trap 'rm -f "$out"' EXIT

run() {
    echo "== $*"
    start=$(date +%s)
    "$@" >"$out" 2>&1
    status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$out" | tail -n 1)
    p=${line%% passed*} f=${line#*, } f=${f%% failed*}
    if [ -z "$line" ]; then p=0 f=1; echo "no result line, status $status:"; tail -n 30 "$out"
    elif [ "$status" != 0 ] && [ "$f" = 0 ]; then f=1; echo "status $status:"; tail -n 30 "$out"
    elif [ "$f" != 0 ]; then grep -v '^PASSED' "$out" | tail -n 40; fi
    echo "   $p passed, $f failed ($(( $(date +%s) - start )) s)"
    passed=$((passed + p)) failed=$((failed + f))
}

model=models/scenes-llava.bin
case $list in
test|quick)
    quick=; [ $list = quick ] && quick=quick
    for t in "$build"/test_*; do
        case $t in
        */test_cuda) run "$t" $quick ;;
        */test_policies) run "$t" ${quick:+300} ;;
        */test_scenes) [ $quick ] || run "$t" ;;                 # 90 s under sanitizers; test_cli runs every policy there too
        *) [ -x "$t" ] && [ -f "tests/$(basename "$t").c" ] && run "$t" ;;
        esac
    done
    if [ $quick ]; then run "$build/cuda_scenes" lookm; else run "$build/cuda_scenes" full h2o elastic; fi
    run "$build/replay" tests/*.gold
    run "$python" tests/test_export.py
    run "$python" tests/test_cli.py "$build/llava" $model
    [ $quick ] || run "$python" tests/test_show.py "$build/llava" $model
    [ $quick ] || run "$python" tests/test_readme.py "$build"
    ;;
parity)
    real=; [ -f ../shared/data/tokenizers/llama-tokenizer.model ] && real=../shared/data/tokenizers/llama-tokenizer.model
    run "$python" tests/tokenizer_parity.py $model $real
    run "$python" tests/image_parity.py
    run "$python" tests/parity.py
    ;;
long)
    run "$build/test_tokenizer" $model 20000
    run "$build/fuzz_image" 2000000 "$(date +%s)"
    run "$build/test_policies" 100000
    run "$build/cuda_scenes"
    run "$python" tests/test_cuda_cli.py "$build/llava_emulated" $model all
    ;;
esac
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" != 0 ]
