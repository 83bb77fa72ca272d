#!/usr/bin/env bash
# ReCoRD: which entity fills the gap in the sentence? 100,730 training queries.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune ReCoRD --epochs 10 --batch_size 16 --max_len 512 "$@"
