#!/usr/bin/env bash
# QQP: do two questions have the same meaning? 363,846 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune QQP --epochs 10 --batch_size 16 --max_len 128 "$@"
