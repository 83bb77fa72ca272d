#!/usr/bin/env bash
# Kills one training run at random moments, resumes it each time, and compares where it ends with an
# undisturbed run: weights and optimiser state have to be the same bits.
#
#   ./scripts/kill_test.sh [kills] [seed]      20 kills unless told; the seed repeats the moments
#
# Trains on the text embedded in test_data/, on the CPU; takes about five minutes for 20 kills.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -gt 2 || ! ${1:-20} =~ ^[1-9][0-9]*$ || ! ${2:-0} =~ ^[0-9]+$ ]]; then
    echo "usage: $0 [kills] [seed]" >&2
    exit 2
fi
scripts/setup_env.sh

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
.venv/bin/python create_pretraining_data.py --input_file test_data/sample_text.txt \
    --output_dir "$folder/shards" --dupe_factor 4 --num_outputs 2 --max_seq_length 64 \
    --num_workers 1 >/dev/null
.venv/bin/python scripts/kill_test.py --data "$folder/shards" --work_dir "$folder" \
    --kills "${1:-20}" --seed "${2:-$RANDOM}"
