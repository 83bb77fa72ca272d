#!/usr/bin/env bash
# BoolQ: a yes/no question about a passage; 9,427 rows to train on.
: "${EPOCHS:=50}" "${BATCH_SIZE:=8}" "${MAX_LEN:=512}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune BoolQ
