#!/usr/bin/env bash
# Shows on a machine without a GPU that requirements-cu117.txt is a complete set: every library
# and symbol that libmxnet.so asks for is there, but for the driver's libcuda.so.1, in whose place
# a stub stands that answers "no device".
#
#   ./scripts/check_cuda_set.sh [python]       2 GB to download, 4 GB of disk in $TMPDIR meanwhile
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
PYTHON="${1:-$ROOT/.venv/bin/python}"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
PY="$WORK/venv/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    printf 'FAILED: %s\n' "$*" >&2
    exit 1
}

install_set() {
    "$PYTHON" -m venv "$WORK/venv"
    "$PY" -m pip install -qq -r "$ROOT/requirements-build.txt"
    (cd "$ROOT" && "$PY" -m pip install -qq --no-cache-dir --no-build-isolation \
        -r requirements-cu117.txt)
    "$PY" -m pip list --format=freeze | grep -E '^(mxnet|nvidia|numpy|gluonnlp)'
}

# The functions of the driver that libmxnet.so calls: cu and a capital; cuBLAS and its like continue
# in small letters.
driver_functions() { nm -D --undefined-only "$1" | grep -oE '\bcu[A-Z][A-Za-z0-9]*' | sort -u; }

# Compiles a libcuda.so.1 of which every function answers CUDA_ERROR_NO_DEVICE.
compile_stub() {
    mkdir "$WORK/stub"
    driver_functions "$1" | sed 's/.*/int &(void) { return 100; }/' >"$WORK/stub/libcuda.c"
    cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$WORK/stub/libcuda.so.1" "$WORK/stub/libcuda.c"
    echo "stub of libcuda.so.1 with: $(driver_functions "$1" | paste -s -d ' ')"
}

# Checks that nothing but the driver is missing, and with the stub not one symbol.
check_links() {
    local libmxnet=$1 libraries missing unresolved
    libraries="$(compgen -G "$(dirname "$libmxnet")/../nvidia/*/lib" | paste -s -d ':')"
    missing=$(LD_LIBRARY_PATH="$libraries" ldd "$libmxnet" | grep 'not found' | sort -u || true)
    echo "libraries not found without the stub: $(xargs <<<"$missing")"
    [[ "$(xargs <<<"$missing")" == "libcuda.so.1 => not found" ]] ||
        fail "more than the driver's library is missing"
    unresolved=$(LD_LIBRARY_PATH="$libraries:$WORK/stub" ldd -r "$libmxnet" 2>&1 |
        grep -E 'not found|undefined symbol' || true)
    echo "unresolved with the stub: ${unresolved:-nothing}"
    [[ -z $unresolved ]] || fail "symbols of libmxnet.so are unresolved"
}

# Imports MXNet the way the programs do, with bort/mxnet_setup.py loading the libraries.
check_import() {
    echo "import with every symbol bound at once:"
    LD_BIND_NOW=1 LD_LIBRARY_PATH="$WORK/stub" PYTHONPATH="$ROOT" "$PY" - <<'PYTHON'
import bort.mxnet_setup

bort.mxnet_setup.install()
import gluonnlp
import mxnet as mx

features = mx.runtime.Features()
built_with = [name for name in ("CUDA", "CUDNN", "NCCL", "MKLDNN") if features.is_enabled(name)]
print(f"  mxnet {mx.__version__} built with {' '.join(built_with)}")
print(f"  gluonnlp {gluonnlp.__version__}")
print(f"  {mx.context.num_gpus()} GPUs; on the CPU 3 * (1 1) = {(mx.nd.ones(2) * 3).asnumpy()}")
assert {"CUDA", "CUDNN", "NCCL"} <= set(built_with), "this is no build for GPUs"
PYTHON
}

"$PYTHON" --version
install_set
libmxnet="$(compgen -G "$WORK/venv/lib/python3*/site-packages/mxnet/libmxnet.so")"
compile_stub "$libmxnet"
check_links "$libmxnet"
check_import
echo "OK: requirements-cu117.txt is complete"
