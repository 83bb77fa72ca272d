#!/usr/bin/env bash
# WNLI: Winograd schemas as inference; 635 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune WNLI --epochs 100 --batch_size 8 --max_len 128 "$@"
