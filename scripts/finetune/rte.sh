#!/usr/bin/env bash
# RTE: does the premise entail the hypothesis? GLUE's files, 2,490 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune RTE --epochs 100 --batch_size 8 --max_len 256 "$@"
