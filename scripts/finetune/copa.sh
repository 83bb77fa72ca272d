#!/usr/bin/env bash
# COPA: which of two sentences is the cause or the effect? 400 training examples, two inputs each.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune COPA --epochs 100 --batch_size 8 --max_len 64 "$@"
