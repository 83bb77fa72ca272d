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
if (($#)); then
    echo "usage: [PYTHON=...] [BORT_MXNET=...] $0 (no arguments; the top of the file describes it)" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# They would let packages from outside the environment hide that something is missing in it.
unset PYTHONPATH PYTHONHOME

# is_python <path> <regular expression of minor versions>: a shim of pyenv may not lead to a Python.
is_python() {
    [[ $("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) =~ ^3\.($2)$ ]]
}

newest_python() {
    local minor name path
    for minor in 12 11 10 9; do
        for name in "python3.$minor" python3 python; do
            while IFS= read -r path; do
                if is_python "$path" "$minor"; then
                    echo "$path"
                    return
                fi
            done < <(type -aP "$name")
        done
    done
    command -v uv >/dev/null && uv python install 3.12 >&2 && uv python find 3.12
}

if [[ -n ${PYTHON:-} ]]; then
    if ! is_python "$PYTHON" "9|10|11|12"; then
        echo "error: PYTHON=$PYTHON does not run as Python 3.9 to 3.12, which MXNet 1.9.1 needs" >&2
        exit 1
    fi
    python=$PYTHON
elif is_python .venv/bin/python "9|10|11|12"; then
    python=.venv/bin/python
elif ! python=$(newest_python); then
    echo "error: found no Python 3.9 to 3.12, which MXNet 1.9.1 needs ($(python3 --version 2>&1))." \
        "Install one (Debian, Ubuntu: apt-get install python3.12 python3.12-venv python3.12-dev," \
        "if it has them) or install uv (https://docs.astral.sh/uv/), which this script then asks" \
        "for one; or name one: PYTHON=/path/to/python3.12 $0" >&2
    exit 1
fi
# -I and -S: nothing of the environment that is about to change is loaded.
exec "$python" -I -S scripts/setup_env.py
