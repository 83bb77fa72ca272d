#!/usr/bin/env bash
# Kills a training run at random moments, resumes it each time, and compares the result with an
# uninterrupted run: weights and optimizer state must be bit-identical.
#
#   ./scripts/kill_test.sh [kills] [seed]
#
# The default is 20 kills, which take about five minutes. The seed makes the moments repeatable. The
# run trains on the text in test_data/, on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -gt 2 || ! ${1:-20} =~ ^[1-9][0-9]*$ || ! ${2:-0} =~ ^[0-9]+$ ]]; then
    echo "usage: $0 [kills] [seed]" >&2
    exit 2
fi
source scripts/launch.sh
supervise group scripts/setup_env.sh

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
supervise command .venv/bin/python create_pretraining_data.py \
    --input_file test_data/sample_text.txt --output_dir "$folder/shards" --dupe_factor 4 \
    --num_outputs 2 --max_seq_length 64 --num_workers 1 >/dev/null
# A signal stops the training run, too.
supervise group .venv/bin/python scripts/kill_test.py --data "$folder/shards" --work_dir "$folder" \
    --kills "${1:-20}" --seed "${2:-$RANDOM}"
