#!/usr/bin/env bash
# Runs what only a machine with a GPU can show: the tests marked `gpu`, then a benchmark of about two
# minutes that prints tokens/s and the share of the peak of the GPU. Has not been run on a GPU yet.
#
#   scripts/gpu_check.sh [gpu number] [peak TFLOP/s of the GPU in float32]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpu=${1:-0} peak=${2:-}
[[ $gpu =~ ^[0-9]+$ ]] || { echo "usage: $0 [gpu number] [peak TFLOP/s]" >&2; exit 2; }
# Tests and benchmark see this GPU alone, as number 0; where a scheduler has chosen GPUs, the numbers
# are those of its list.
IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-}"
export CUDA_VISIBLE_DEVICES=${visible[gpu]:-$gpu}
scripts/setup_env.sh

echo "== tests"
.venv/bin/python -m pytest -m gpu -rs tests
echo "== benchmark"
.venv/bin/python scripts/benchmark.py gpu --gpus 0 ${peak:+--peak_tflops "$peak"}
