#!/bin/sh
# check_ptx.sh: kernels.cu compiles without a warning, without spills and without arrays in local memory (which has the speed of
# device memory), for each architecture:    sh tests/check_ptx.sh [sm_80 …]
# Prints registers and bytes of every kernel that spills, and the most registers of those that decide the speed. Needs nvcc, no GPU.

cd "$(dirname "$0")/.." || exit 1
NVCC=${NVCC:-nvcc}
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
status=0
[ $# -gt 0 ] || set -- sm_80
for arch; do
    { "$NVCC" -O3 -Iinclude -arch="$arch" -Xptxas -v -c kernels.cu -o "$folder/$arch.o" >"$folder/$arch" 2>&1 || touch "$folder/$arch.failed"; } &
done
wait
for arch; do
    log=$folder/$arch
    if [ -f "$log.failed" ]; then cat "$log"; status=1; continue; fi
    if grep -i 'warning' "$log"; then echo "FAILED: $arch: warnings"; status=1; fi
    awk -v arch="$arch" '
        /Compiling entry function/ { name = $0; sub(/.*function .([_A-Za-z0-9]*).*/, "", name); split($0, a, "\047"); name = a[2]; kernels++ }
        /bytes spill stores/ { bytes = $1 + $5 }          # N bytes stack frame, N bytes spill stores
        /Used [0-9]+ registers/ {
            match($0, /Used [0-9]+/); used = substr($0, RSTART + 5, RLENGTH - 5)
            if (bytes + 0) { printf "%s: %s: %s bytes spilled or in local memory, %s registers\n", arch, name, bytes, used; bad++ }
            else if (name ~ /tile_kernel|matvec_kernel|flash_kernel|decode_kernel|column_kernel/ && used + 0 > most) { most = used + 0; which = name }
            bytes = 0
        }
        END { printf "%s: %d kernels, %d of them spill; most registers in a hot kernel: %d (%s)\n", arch, kernels, bad, most, which; exit bad > 0 || kernels == 0 }' "$log" || status=1
done
[ $status = 0 ] || echo "FAILED"
exit $status
