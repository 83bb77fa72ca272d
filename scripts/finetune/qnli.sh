#!/usr/bin/env bash
# QNLI: does the sentence answer the question? 104,743 rows to train on.
: "${EPOCHS:=20}" "${BATCH_SIZE:=16}" "${MAX_LEN:=256}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune QNLI
