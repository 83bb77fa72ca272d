#!/usr/bin/env bash
# MRPC: do two sentences from the news have the same meaning? 3,668 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune MRPC --epochs 50 --batch_size 8 --max_len 128 "$@"
