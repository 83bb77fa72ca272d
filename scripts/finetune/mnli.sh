#!/usr/bin/env bash
# MNLI: does the premise entail the hypothesis? 392,702 training examples. ax.sh uses this model.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune MNLI --epochs 10 --batch_size 16 --max_len 128 "$@"
