#!/usr/bin/env bash
# WiC: does a word mean the same in two sentences? 5,428 rows to train on.
: "${EPOCHS:=50}" "${BATCH_SIZE:=8}" "${MAX_LEN:=128}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune WiC
