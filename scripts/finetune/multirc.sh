#!/usr/bin/env bash
# MultiRC: which answers to a question about a paragraph are correct? 27,243 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune MultiRC --epochs 20 --batch_size 16 --max_len 512 "$@"
