#!/usr/bin/env bash
# SST-2: is the film review positive? 67,349 training examples, most of them short phrases.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune SST-2 --epochs 20 --batch_size 16 --max_len 128 "$@"
