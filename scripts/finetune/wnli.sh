#!/usr/bin/env bash
# WNLI: Winograd schemas as inference; 635 rows to train on.
: "${EPOCHS:=100}" "${BATCH_SIZE:=8}" "${MAX_LEN:=128}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune WNLI
