#!/usr/bin/env bash
# Build MinkowskiEngine 0.5.4 into .venv: the published sparse convolution, for --model.backend minkowski.
# For the CPU: its sources do not compile with CUDA 12 and later, which torch is built with. `--cuda` tries all the same,
# for those who have mended them. Four to nine minutes on two cores; does nothing if it is installed.
# Needs a C++ compiler, Python's headers, and OpenBLAS with headers; says which is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
python=.venv/bin/python
if "$python" -c 'import models.sparse.minkowski' 2>/dev/null; then
    echo "MinkowskiEngine is installed"
    exit 0
fi

missing() { echo "error: $1 missing: $2, then run this again" >&2; exit 2; }
command -v "${CXX:-g++}" >/dev/null || missing "a C++ compiler is" "install g++ (Debian, Ubuntu: apt-get install g++)"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$headers/Python.h" ] || missing "Python.h is" "install Python's headers (Debian, Ubuntu: apt-get install python3-dev)"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '#include <cblas.h>\nint main() { return cblas_sasum(0, nullptr, 1) != 0; }\n' >"$work/blas.cpp"
"${CXX:-g++}" "$work/blas.cpp" -o "$work/blas" -lopenblas 2>"$work/blas.log" || {
    cat "$work/blas.log" >&2
    missing "OpenBLAS or its headers are" "install them (Debian, Ubuntu: apt-get install libopenblas-dev)"
}

options=(--config-settings="--global-option=--blas=openblas")
if [ "${1:-}" = --cuda ]; then
    echo "building MinkowskiEngine with CUDA"
    options+=(--config-settings="--global-option=--force_cuda")
else
    echo "building MinkowskiEngine for the CPU (some minutes)"
    options+=(--config-settings="--global-option=--cpu_only")
fi
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null # a venv made by uv has no pip
if ! MAX_JOBS=${MAX_JOBS:-$(nproc)} "$python" -m pip install --disable-pip-version-check --use-pep517 \
    --no-build-isolation --no-deps "${options[@]}" MinkowskiEngine==0.5.4 >"$work/log" 2>&1; then
    tail -n 30 "$work/log" >&2
    echo "error: MinkowskiEngine did not build; the compiler's last lines stand above" >&2
    exit 2
fi
"$python" -c 'import models.sparse.minkowski'
echo "MinkowskiEngine is installed: use it with --model.backend minkowski"
