#!/usr/bin/env bash
# Makes .venv in the project root, with all that the programs and the tests need.
#
#   ./scripts/setup_env.sh                     when all is in place, a call costs nothing
#   PYTHON=python3.10 ./scripts/setup_env.sh   another Python than the newest of 3.9-3.12 found
#   BORT_MXNET=cpu ./scripts/setup_env.sh      another MXNet than the one for this machine:
#       cpu     mxnet 1.9.1
#       cu117   mxnet-cu117 1.9.1 and CUDA 11.7 from pip: compute capability 5.0 to 8.9
#       cu101   mxnet-cu101 1.9.1, with CUDA 10.1 and cuDNN 7 of the machine
#       system  the MXNet and Horovod that come with the Python (NVIDIA's container)
#       auto    forget an earlier choice
#
# This file finds a Python; setup_env.py does the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# They would let packages from outside the environment hide that something is missing in it.
unset PYTHONPATH PYTHONHOME

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Prints the minor version when $1 runs as Python 3: a shim of pyenv may point nowhere.
minor_version() {
    "$1" -c 'import sys; sys.version_info[0] == 3 and print(sys.version_info[1])' 2>/dev/null || true
}

supported() { [[ $1 =~ ^[0-9]+$ ]] && ((9 <= $1 && $1 <= 12)); }

# Prints "<minor version> <path>" for every Python 3 on the PATH, newest first.
all_pythons() {
    local name path minor
    for name in python3.12 python3.11 python3.10 python3.9 python3 python; do
        while IFS= read -r path; do
            minor=$(minor_version "$path")
            [[ -z $minor ]] || echo "$minor $path"
        done < <(type -aP "$name")
    done | sort -k1,1nr -s
}

asked_python() {
    local minor
    minor=$(minor_version "$PYTHON")
    [[ -n $minor ]] ||
        die "PYTHON=$PYTHON does not run as Python 3; give the path of a Python 3.9 to 3.12"
    supported "$minor" || die "PYTHON=$PYTHON is Python 3.$minor; MXNet 1.9.1 needs 3.9 to 3.12"
    echo "$PYTHON"
}

newest_python() {
    local minor path others=""
    while read -r minor path; do
        if supported "$minor"; then
            echo "$path"
            return
        fi
        others="$others 3.$minor ($path)"
    done < <(all_pythons)
    if command -v uv >/dev/null; then
        uv python install 3.12 >&2 && uv python find 3.12 && return
    fi
    die "found no Python 3.9 to 3.12${others:+, only$others, which MXNet 1.9.1 cannot use}." \
        "Install one (Debian, Ubuntu: apt-get install python3.12 python3.12-venv python3.12-dev," \
        "if it has them) or install uv (https://docs.astral.sh/uv/), which this script then asks" \
        "for one; or name one: PYTHON=/path/to/python3.12 $0"
}

if [[ -n ${PYTHON:-} ]]; then
    python=$(asked_python)
elif supported "$(minor_version .venv/bin/python)"; then
    python=.venv/bin/python
else
    python=$(newest_python)
fi
# -I and -S: nothing of the environment that is about to change is loaded.
exec "$python" -I -S scripts/setup_env.py
