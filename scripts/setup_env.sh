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
# A choice is remembered in .venv, so that the other scripts, which call this one, keep to it.
# A call that was interrupted is repaired by the next one.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"
VENV="$ROOT/.venv"
PY="$VENV/bin/python"
LOG="$VENV/setup.log"
HOROVOD=0.28.1
CONTAINER=nvcr.io/nvidia/mxnet:24.06-py3
export PIP_DISABLE_PIP_VERSION_CHECK=1
# They would let packages from outside the environment hide that something is missing in it.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_USER

say() { printf 'setup: %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# step <what> <command...>: runs it with its output in the log; shows the log's end on failure.
step() {
    local what=$1 start=$SECONDS
    shift
    say "$what"
    printf '\n== %s: %s\n' "$what" "$*" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1; then
        tail -n 25 "$LOG" >&2
        die "this failed: $what. The whole output is in $LOG"
    fi
    say "    $((SECONDS - start)) s"
}

# ---- what is asked for -------------------------------------------------------------------------

mxnet_choice() {
    local choice="${BORT_MXNET:-}"
    if [[ -z $choice && -f $VENV/mxnet-choice ]]; then
        choice=$(<"$VENV/mxnet-choice")
    fi
    case "${choice:-auto}" in
        auto | cpu | cu117 | cu101 | system) echo "${choice:-auto}" ;;
        *) die "BORT_MXNET=$choice is not one of cpu, cu117, cu101, system, auto" ;;
    esac
}

# Everything that asks for work when it changes. nvidia-smi is only looked up here, not run: with
# many GPUs it takes seconds.
fingerprint() {
    {
        echo "$ROOT $choice $(type -P nvidia-smi || true)"
        cat "$ROOT"/scripts/setup_env.sh "$ROOT"/requirements*.txt
    } | cksum
}

complete() {
    [[ -f $VENV/complete && "$(<"$VENV/complete")" == "$(fingerprint)" ]] &&
        serves_python "$PY" && has_packages mxnet gluonnlp horovod
}

has_packages() {
    "$PY" -c 'import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))' "$@" 2>/dev/null
}

# ---- Python ------------------------------------------------------------------------------------

# Prints "<minor version> <interpreter>" when $1 runs; the interpreter is the one behind a shim or
# an environment, which may be gone by the time it is needed.
probe_python() {
    "$1" -c 'import sys
if sys.version_info[0] == 3:
    print(sys.version_info[1], getattr(sys, "_base_executable", sys.executable))' 2>/dev/null
}

supported() { [[ $1 =~ ^[0-9]+$ ]] && ((9 <= $1 && $1 <= 12)); }

# True when the interpreter $1 runs, is supported, and is what PYTHON= asks for.
serves_python() {
    local have
    have=$(probe_python "$1") || return 1
    supported "${have%% *}" && [[ -z $asked || ${have%% *} == "${asked%% *}" ]]
}

# Prints what PYTHON= names, as probe_python does; nothing when it is not set.
asked_python() {
    local found
    [[ -n ${PYTHON:-} ]] || return 0
    found=$(probe_python "$PYTHON" || true)
    [[ -n $found ]] ||
        die "PYTHON=$PYTHON does not run as Python 3; give the path of a Python 3.9 to 3.12"
    supported "${found%% *}" ||
        die "PYTHON=$PYTHON is Python 3.${found%% *}; MXNet 1.9.1 needs 3.9 to 3.12"
    echo "$found"
}

# Every Python 3 on the PATH, newest first. Each is run: a shim of pyenv may point nowhere.
all_pythons() {
    local name path
    for name in python3.12 python3.11 python3.10 python3.9 python3 python; do
        while IFS= read -r path; do
            probe_python "$path" || true
        done < <(type -aP "$name")
    done | sort -k1,1nr -s
}

newest_python() {
    local found others=""
    while IFS= read -r found; do
        if supported "${found%% *}"; then
            echo "$found"
            return
        fi
        others="$others 3.${found%% *} (${found#* })"
    done < <(all_pythons)
    if command -v uv >/dev/null; then
        uv python install 3.12 >&2 && probe_python "$(uv python find 3.12)" && return
    fi
    die "found no Python 3.9 to 3.12${others:+, only$others, which MXNet 1.9.1 cannot use}." \
        "Install one (Debian, Ubuntu: apt-get install python3.12 python3.12-venv python3.12-dev," \
        "if it has them) or install uv (https://docs.astral.sh/uv/), which this script then asks" \
        "for one; or name one: PYTHON=/path/to/python3.12 $0"
}

check_python() {
    local version=$1 python=$2
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python has no venv module. Debian, Ubuntu: apt-get install python$version-venv"
    "$python" -c 'import sys, os, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        die "$python has no C headers, and GluonNLP is compiled here." \
            "Debian, Ubuntu: apt-get install python$version-dev." \
            "Fedora: dnf install python$version-devel"
}

check_compiler() {
    local tool package="Debian, Ubuntu: apt-get install build-essential."
    package="$package Fedora: dnf install gcc-c++ make"
    for tool in "${CC:-gcc}" "${CXX:-g++}" make; do
        command -v "${tool%% *}" >/dev/null ||
            die "found no ${tool%% *}, and GluonNLP and Horovod are compiled here. $package"
    done
    # shellcheck disable=SC2086  # CXX may carry options
    ${CXX:-g++} -std=c++17 -fsyntax-only -x c++ - <<<'#include <vector>' 2>/dev/null ||
        die "the C++ compiler ${CXX:-g++} cannot compile one line of C++17. $package"
}

# ---- MXNet -------------------------------------------------------------------------------------

# Prints "<name>, <compute capability>" per GPU; fails where no driver runs.
gpus() { nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader 2>/dev/null; }

# Names the GPUs for which mxnet-cu117 has no code, one per line: it holds machine code for 5.0 to
# 8.6 and no PTX that a driver could translate for newer ones. A driver too old to tell the
# capability belongs to a GPU that is not too new.
unserved_gpus() {
    local gpu
    { gpus || true; } | while IFS= read -r gpu; do
        if [[ $gpu =~ ^(.*),\ (([0-9]+)\.[0-9]+)$ ]] &&
            ((BASH_REMATCH[3] < 5 || BASH_REMATCH[3] > 8)); then
            echo "${BASH_REMATCH[1]} (compute capability ${BASH_REMATCH[2]})"
        fi
    done
}

# Prints the variant of MXNet to install; `auto` is decided by the driver and the GPUs.
mxnet_variant() {
    if [[ $choice != auto ]]; then
        echo "$choice"
    elif ! command -v nvidia-smi >/dev/null; then
        echo cpu
    elif ! nvidia-smi -L >/dev/null 2>&1; then
        say "nvidia-smi is here but finds no working driver: taking MXNet for the CPU" >&2
        echo cpu
    else
        refuse_unserved_gpus
        echo cu117
    fi
}

refuse_unserved_gpus() {
    local unserved
    unserved=$(unserved_gpus)
    if [[ -n $unserved && $(wc -l <<<"$unserved") == "$(gpus | wc -l)" ]]; then
        die "no MXNet 1.9.1 from pip runs on $(sort -u <<<"$unserved" | paste -s -d ';'):" \
            "mxnet-cu117 serves 5.0 to 8.9. Either use NVIDIA's container, docker run --gpus all" \
            "--ipc=host -it -v \"\$PWD\":/bort -w /bort $CONTAINER, and in it" \
            "BORT_MXNET=system ./scripts/setup_env.sh; or the CPU: BORT_MXNET=cpu" \
            "./scripts/setup_env.sh. (Below 5.0: CUDA 10.1 and BORT_MXNET=cu101.)"
    fi
}

warn_about_gpus() {
    local gpu
    [[ $variant == cu117 ]] || return 0
    unserved_gpus | while IFS= read -r gpu; do
        say "warning: mxnet-cu117 has no code for $gpu and fails there at its first kernel"
    done
}

requirements_file() {
    case "$variant" in
        cpu | cu117) echo "requirements-$variant.txt" ;;
        cu101) echo requirements.txt ;;
        system) echo requirements-common.txt ;;
    esac
}

# ---- the environment ---------------------------------------------------------------------------

# Keeps .venv when it was made here, for this MXNet and this Python, even if it is unfinished.
# Sets `kept`.
prepare_venv() {
    local found options=()
    kept=""
    if [[ -f $VENV/made-for && "$(<"$VENV/made-for")" == "$ROOT $variant" ]] &&
        serves_python "$PY" && "$PY" -m pip --version >/dev/null 2>&1; then
        drop_half_installed
        kept=yes
        return
    fi
    found=${asked:-$(newest_python)}
    check_python "3.${found%% *}" "${found#* }"
    if [[ $variant == cu* ]]; then
        "${found#* }" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null ||
            die "mxnet-$variant needs libcuda.so.1, which comes with the NVIDIA driver." \
                "Install the driver, or take MXNet for the CPU: BORT_MXNET=cpu $0"
    fi
    if [[ $variant == system ]]; then
        options=(--system-site-packages)
    fi
    clear_venv
    step "making .venv with Python 3.${found%% *} (${found#* })" \
        "${found#* }" -m venv ${options[@]+"${options[@]}"} "$VENV"
    echo "$ROOT $variant" >"$VENV/made-for"
}

# Removes all but the compiled wheels, which took the longest, and the remembered choice.
clear_venv() {
    mkdir -p "$VENV"
    find "$VENV/" -mindepth 1 -maxdepth 1 ! -name wheels ! -name mxnet-choice -exec rm -rf {} +
}

# pip takes a package for installed once its metadata is there; RECORD is the last file it writes.
drop_half_installed() {
    local info
    for info in "$(site_packages)"/*.dist-info; do
        [[ -f $info/RECORD ]] || rm -rf "$info"
    done
}

site_packages() { "$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

install_packages() {
    local size=""
    [[ $variant != cu117 ]] || size=" (2 GB to download)"
    step "installing the build tools" "$PY" -m pip install -r requirements-build.txt
    # Without isolation GluonNLP is compiled by the Cython just installed.
    step "installing $(requirements_file)$size" "$PY" -m pip install --no-build-isolation \
        -r "$(requirements_file)" -r requirements-dev.txt
}

# Puts the project on the path of this environment and prepares MXNet's import in every Python
# that starts here; horovodrun imports MXNet before any code of ours could.
write_path_file() {
    local packages
    packages=$(site_packages)
    cat >"$packages/bort.pth" <<PTH
$ROOT
import importlib.util as u; u.find_spec("bort") and __import__("bort")
PTH
}

check_mxnet() {
    local output
    output=$("$PY" -c 'import mxnet, gluonnlp' 2>&1) && return
    printf '%s\n' "$output" >>"$LOG"
    if [[ -n $kept ]]; then
        say "what an earlier set-up left does not load; making .venv anew"
        rm "$VENV/made-for"
        fill_venv
        return
    fi
    case "$variant" in
        cu101) die "mxnet-cu101 does not load: ${output##*$'\n'}. It needs CUDA 10.1, cuDNN 7 and" \
            "NCCL 2 on LD_LIBRARY_PATH; with a newer driver use BORT_MXNET=cu117" ;;
        system) die "this Python brings no MXNet that loads: ${output##*$'\n'}. BORT_MXNET=system" \
            "is for $CONTAINER" ;;
        *) die "MXNet does not load: ${output##*$'\n'}. The whole output is in $LOG" ;;
    esac
}

# Horovod opens libcuda.so by this name, which some drivers' packages leave out; MXNet's folder is
# where its run path leads.
link_driver_library() {
    [[ $variant == cu* ]] || return 0
    "$PY" - "$(site_packages)/mxnet/libcuda.so" <<'PYTHON'
import ctypes, os, re, sys

try:
    ctypes.CDLL("libcuda.so")
except OSError:
    ctypes.CDLL("libcuda.so.1")
    with open("/proc/self/maps") as maps:
        library = re.search(r"/\S*libcuda\.so\S*", maps.read()).group()
    if os.path.lexists(sys.argv[1]):
        os.remove(sys.argv[1])
    os.symlink(library, sys.argv[1])
PYTHON
}

# ---- Horovod -----------------------------------------------------------------------------------

horovod_works() { "$PY" -c 'import horovod.mxnet as hvd; assert hvd.gloo_built()' >/dev/null 2>&1; }

install_horovod() {
    local operations folder wheel
    ! horovod_works || return 0
    [[ $variant != system ]] || die "this Python brings no Horovod for MXNet; use $CONTAINER"
    operations=$(horovod_operations)
    # The wheel knows the path of the MXNet it was linked to.
    folder="$VENV/wheels/$variant-$operations-$(cksum <<<"$ROOT" | cut -d' ' -f1)"
    wheel=$(horovod_wheel "$folder") || {
        compile_horovod "$operations" "$folder"
        wheel=$(horovod_wheel "$folder")
    }
    step "installing Horovod" "$PY" -m pip install --no-deps --force-reinstall "$wheel"
    horovod_works ||
        die "Horovod was compiled but does not load; try: rm -rf '$VENV/wheels' and call again." \
            "$("$PY" -c 'import horovod.mxnet' 2>&1 | tail -n 1)"
}

# Prints the wheel in folder $1 that fits this Python.
horovod_wheel() {
    local tag
    tag=$("$PY" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    compgen -G "$1/horovod-$HOROVOD-$tag-*.whl"
}

# Prints the folder of an nvcc that has its toolkit beside it. One on the PATH may be a script that
# calls another; CMake would then look for the headers in the wrong place.
nvcc_folder() {
    local folder top=""
    folder=$(dirname "$(type -P nvcc || true)")
    if [[ $folder != . ]]; then
        top=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
    fi
    for folder in "$folder" "$top/bin" "${CUDA_HOME:-/usr/local/cuda}/bin"; do
        if [[ -x $folder/nvcc && -f $folder/../include/cuda_runtime.h ]]; then
            echo "$folder"
            return
        fi
    done
}

horovod_operations() {
    if [[ $variant == cu* ]] && [[ -n $(nvcc_folder) ]]; then echo nccl; else echo gloo; fi
}

# The environment variables of Horovod's build, one per line.
horovod_settings() {
    local packages
    packages=$(site_packages)
    printf '%s\n' HOROVOD_WITH_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 \
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 "MAKEFLAGS=-j$(nproc)"
    if [[ -d $packages/nvidia ]]; then
        # MXNet's headers include cuBLAS's and others, which a toolkit may come without.
        echo "CPLUS_INCLUDE_PATH=$(compgen -G "$packages/nvidia/*/include" | paste -s -d ':')"
    fi
    if [[ $1 == nccl ]]; then
        printf '%s\n' HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
        { gpus || true; } | sed -n 's/.*, \([0-9]*\)\.\([0-9]\)$/\1\2/p' | sort -u |
            paste -s -d ',' | sed -n 's/^./HOROVOD_BUILD_CUDA_CC_LIST=&/p'
        [[ ! -d $packages/nvidia/nccl ]] || echo "HOROVOD_NCCL_HOME=$VENV/nccl"
    fi
}

compile_horovod() {
    local operations=$1 folder=$2 work="$VENV/wheels/unfinished" settings=() compiler=""
    rm -rf "$work"
    mkdir -p "$work" "$folder"
    if ! usable_cmake; then
        step "installing CMake" "$PY" -m pip install 'cmake>=3.13,<4' # 4 refuses Gloo's lists
    fi
    [[ $operations != nccl ]] || link_nccl
    if [[ $variant == cu* ]]; then
        compiler=$(nvcc_folder)
        [[ -n $compiler ]] || install_nvcc "$work/nvcc"
        compiler=":${compiler:-$work/nvcc/nvidia/cu13/bin}"
    fi
    mapfile -t settings < <(horovod_settings "$operations")
    # No cache: pip's does not know which MXNet a wheel was compiled for.
    step "compiling Horovod $HOROVOD for $variant with $operations (1 to 3 minutes)" \
        env "PATH=$VENV/bin$compiler:$PATH" "${settings[@]}" "$PY" -m pip wheel -v --no-deps \
        --no-build-isolation --no-cache-dir --no-binary horovod --wheel-dir "$work" \
        "horovod==$HOROVOD"
    mv "$work"/horovod-*.whl "$folder"
    rm -rf "$work"
}

usable_cmake() {
    [[ $(cmake --version 2>/dev/null) =~ version\ 3\.([0-9]+) ]] && ((BASH_REMATCH[1] >= 13))
}

# NCCL's wheel has no libnccl.so, the name a linker looks for.
link_nccl() {
    local nccl
    nccl="$(site_packages)/nvidia/nccl"
    [[ -d $nccl ]] || return 0
    mkdir -p "$VENV/nccl/lib"
    ln -sfn "$nccl/include" "$VENV/nccl/include"
    ln -sf "$nccl/lib/libnccl.so.2" "$VENV/nccl/lib/libnccl.so.2"
    ln -sf libnccl.so.2 "$VENV/nccl/lib/libnccl.so"
}

# Horovod for an MXNet with CUDA cannot be compiled without nvcc, not even for Gloo alone, which
# calls nothing of CUDA itself: MXNet copies the arrays. So the compiler's version does not matter;
# 13 is the first that pip has complete.
install_nvcc() {
    local folder=$1
    [[ $variant == cu117 ]] ||
        die "found no nvcc; Horovod for mxnet-$variant needs the CUDA toolkit of that version"
    step "fetching nvcc, for the compilation only" \
        "$PY" -m pip install --no-deps --target "$folder" \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 \
        nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.85
    ln -s lib "$folder/nvidia/cu13/lib64"
    ln -s libcudart.so.13 "$folder/nvidia/cu13/lib/libcudart.so"
}

# ---- all of it ---------------------------------------------------------------------------------

# One set-up at a time; the lock ends with the process, so a killed one leaves none behind.
lock() {
    command -v flock >/dev/null || return 0
    exec 9<"$ROOT"
    if ! flock -n 9; then
        say "another set-up is at work here; waiting for it"
        flock 9
    fi
}

remember_choice() {
    case "${BORT_MXNET:-}" in
        "") ;;
        auto) rm -f "$VENV/mxnet-choice" ;;
        *) echo "$BORT_MXNET" >"$VENV/mxnet-choice" ;;
    esac
}

fill_venv() {
    prepare_venv
    remember_choice
    install_packages
    write_path_file
    check_mxnet
}

set_up() {
    local variant kept
    variant=$(mxnet_variant)
    warn_about_gpus
    check_compiler
    fill_venv
    link_driver_library
    install_horovod
    fingerprint >"$VENV/complete"
}

main() {
    local choice asked
    choice=$(mxnet_choice)
    asked=$(asked_python)
    if ! complete; then
        lock
        complete || set_up
    fi
    say "ready: .venv, $("$PY" --version), MXNet for $(cut -d' ' -f2 "$VENV/made-for")"
}

main
