#!/usr/bin/env bash
# CB: does the premise commit its speaker to the hypothesis? 250 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune CB --epochs 100 --batch_size 8 --max_len 256 "$@"
