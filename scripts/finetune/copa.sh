#!/usr/bin/env bash
# COPA: which is the cause or the effect? 400 rows to train on, two inputs each.
: "${EPOCHS:=100}" "${BATCH_SIZE:=8}" "${MAX_LEN:=64}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune COPA
