#!/usr/bin/env bash
# MRPC: do two sentences from the news say the same? 3,668 rows to train on.
: "${EPOCHS:=50}" "${BATCH_SIZE:=8}" "${MAX_LEN:=128}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune MRPC
