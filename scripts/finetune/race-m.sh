#!/usr/bin/env bash
# RACE-M: middle-school reading comprehension; 25,421 training examples, four inputs each.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune RACE-M --epochs 20 --batch_size 8 --max_len 512 "$@"
