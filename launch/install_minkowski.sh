#!/usr/bin/env bash
# Build MinkowskiEngine 0.5.4, the sparse convolution of the published code, into .venv for --model.backend minkowski.
# It is built for the CPU: its sources do not compile with CUDA 12 and later, which torch is built with. --cuda tries
# anyway, for patched sources. Takes four to nine minutes on two cores; does nothing if it is already installed.
# Needs a C++ compiler, Python headers, and OpenBLAS with headers. An error names what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
python=.venv/bin/python
if "$python" -c 'import models.sparse.minkowski' 2>/dev/null; then
    echo "MinkowskiEngine is already installed"
    exit 0
fi

missing() { echo "error: $1 missing: $2, then run this script again" >&2; exit 2; }
command -v "${CXX:-g++}" >/dev/null || missing "a C++ compiler is" "install g++ (Debian, Ubuntu: apt-get install g++)"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$headers/Python.h" ] || missing "Python.h is" "install the Python headers (Debian, Ubuntu: apt-get install python3-dev)"
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
    echo "building MinkowskiEngine for the CPU (takes several minutes)"
    options+=(--config-settings="--global-option=--cpu_only")
fi
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null # uv creates venvs without pip
if ! MAX_JOBS=${MAX_JOBS:-$(nproc)} "$python" -m pip install --disable-pip-version-check --use-pep517 \
    --no-build-isolation --no-deps "${options[@]}" MinkowskiEngine==0.5.4 >"$work/log" 2>&1; then
    tail -n 30 "$work/log" >&2
    echo "error: MinkowskiEngine did not build; see the compiler output above" >&2
    exit 2
fi
"$python" -c 'import models.sparse.minkowski'
echo "MinkowskiEngine is installed: use it with --model.backend minkowski"
