#!/usr/bin/env bash
# RTE: does the first text entail the second? GLUE's files, 2,490 rows to train on.
: "${EPOCHS:=100}" "${BATCH_SIZE:=8}" "${MAX_LEN:=256}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune RTE
