#!/usr/bin/env bash
# CB: is the clause in the premise believed? 250 rows to train on.
: "${EPOCHS:=100}" "${BATCH_SIZE:=8}" "${MAX_LEN:=256}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune CB
