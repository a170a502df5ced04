#!/usr/bin/env bash
# Build MinkowskiEngine 0.5.4 into .venv: the published sparse convolution, for --model.backend minkowski.
# With CUDA where torch sees a GPU and nvcc is there, else for the CPU. Four minutes on two cores. Nothing else needs it.
# Needs a C++ compiler, Python's headers and a BLAS with headers; says which is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
python=.venv/bin/python
if "$python" -c 'import models.sparse.minkowski' 2>/dev/null; then
    echo "MinkowskiEngine is installed"
    exit 0
fi

missing() { echo "error: $1 is missing: $2, then run this again" >&2; exit 2; }
command -v "${CXX:-g++}" >/dev/null || missing "a C++ compiler" "install g++ (Debian, Ubuntu: apt-get install g++)"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$headers/Python.h" ] || missing "Python.h" "install Python's headers (Debian, Ubuntu: apt-get install python3-dev)"
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
printf '#include <cblas.h>\nint main() { return cblas_sasum(0, nullptr, 1) != 0; }\n' >"$probe/blas.cpp"
"${CXX:-g++}" "$probe/blas.cpp" -o "$probe/blas" -lopenblas 2>/dev/null ||
    missing "OpenBLAS" "install it with its headers (Debian, Ubuntu: apt-get install libopenblas-dev)"

options=(--config-settings="--global-option=--blas=openblas")
if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' && command -v nvcc >/dev/null; then
    echo "building MinkowskiEngine with CUDA"
    options+=(--config-settings="--global-option=--force_cuda")
else
    echo "building MinkowskiEngine for the CPU"
    options+=(--config-settings="--global-option=--cpu_only")
fi
if ! MAX_JOBS=${MAX_JOBS:-$(nproc)} "$python" -m pip install --quiet --no-build-isolation --no-deps "${options[@]}" \
    MinkowskiEngine==0.5.4 >"$probe/log" 2>&1; then
    tail -n 30 "$probe/log" >&2
    echo "error: the build failed; its last lines stand above" >&2
    exit 2
fi
"$python" -c 'import models.sparse.minkowski'
echo "MinkowskiEngine is installed; use it with --model.backend minkowski"
