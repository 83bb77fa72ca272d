#!/usr/bin/env bash
# QNLI: does the sentence contain the answer to the question? 104,743 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune QNLI --epochs 20 --batch_size 16 --max_len 256 "$@"
