#!/bin/sh
# deps.sh demo|test|parity [0|1]: says what is missing for that, and installs it (1, apt, with sudo where not root) or says how (0).
# Nothing is asked of apt or pip when nothing is missing.
what=$1 install=${2:-1} missing=
need() { missing="$missing $1"; echo "missing: $2 (Debian: $1)"; }

probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
printf '#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n' > "$probe/omp.c"
command -v make >/dev/null || need make make
${CC:-cc} -fopenmp -o "$probe/omp" "$probe/omp.c" 2>/dev/null || need gcc "a C compiler with OpenMP"
printf '#include <math.h>\nint main(void) { return 0; }\n' > "$probe/libc.c"
[ -n "$missing" ] || ${CC:-cc} -o "$probe/libc" "$probe/libc.c" -lm 2>/dev/null || need libc6-dev "the C library's headers"
found=
for d in $STB_DIR /usr/include/stb /usr/local/include/stb /usr/include /usr/local/include; do [ -f "$d/stb_image.h" ] && found=1; done
[ -n "$found" ] || need libstb-dev "stb_image.h"
if [ "$what" != demo ]; then
    ${CXX:-g++} --version >/dev/null 2>&1 || need g++ "a C++ compiler, for kernels.cu on the CPU"
    command -v python3 >/dev/null || need python3 "Python 3, for the exporter's and the command line's tests"
fi
if [ -n "$missing" ]; then
    sudo=
    [ "$(id -u)" = 0 ] || sudo=sudo
    if [ "$install" = 0 ]; then
        echo "error: $what: something is missing and DEPS=0"
        echo "hint:  $sudo apt-get install$missing"
        exit 1
    fi
    echo "installing:$missing"
    $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing >"$probe/log" 2>&1 ||
        { cat "$probe/log"; echo "error: apt-get install$missing failed"; exit 1; }
fi

# Python packages go into .venv, never into the system's
packages() { # FILE MODULE…: the requirements, and what must import
    file=$1; shift
    for m in "$@"; do .venv/bin/python -c "import $m" 2>/dev/null || lacking="$lacking $m"; done
    [ -n "$lacking" ] || return 0
    echo "missing in .venv:$lacking ($file)"
    [ "$install" = 0 ] && { echo "hint:  python3 -m venv .venv && .venv/bin/pip install -r $file"; exit 1; }
    [ -x .venv/bin/pip ] || python3 -m venv .venv || { $sudo apt-get install -y -qq python3-venv >/dev/null && python3 -m venv .venv; } || exit 1
    .venv/bin/pip install -q --disable-pip-version-check -r "$file" || exit 1
    lacking=
}
[ "$what" = demo ] || packages export/requirements.txt numpy tqdm
[ "$what" != parity ] || packages tests/requirements-parity.txt torch transformers sentencepiece PIL
exit 0
