#!/usr/bin/env bash
# RACE-H: high-school reading comprehension; 62,445 training examples, four inputs each.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune RACE-H --epochs 20 --batch_size 8 --max_len 512 "$@"
