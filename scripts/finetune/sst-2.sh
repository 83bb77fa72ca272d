#!/usr/bin/env bash
# SST-2: is the film review positive? 67,349 rows to train on, most of them short phrases.
: "${EPOCHS:=20}" "${BATCH_SIZE:=16}" "${MAX_LEN:=128}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune SST-2
