#!/usr/bin/env bash
# STS-B: how similar are two sentences, from 0 to 5? 5,749 training examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune STS-B --epochs 50 --batch_size 8 --max_len 128 "$@"
