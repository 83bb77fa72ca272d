#!/usr/bin/env bash
# BoolQ: yes/no questions about a passage; 9,427 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune BoolQ --epochs 50 --batch_size 8 --max_len 512 "$@"
