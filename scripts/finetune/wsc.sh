#!/usr/bin/env bash
# WSC: does the pronoun refer to the noun? 554 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune WSC --epochs 100 --batch_size 8 --max_len 128 "$@"
