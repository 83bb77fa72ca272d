#!/usr/bin/env bash
# WiC: does a word have the same meaning in two sentences? 5,428 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune WiC --epochs 50 --batch_size 8 --max_len 128 "$@"
