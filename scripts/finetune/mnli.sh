#!/usr/bin/env bash
# MNLI: does the premise entail the hypothesis? 392,702 rows to train on. Predicts AX, too.
: "${EPOCHS:=10}" "${BATCH_SIZE:=16}" "${MAX_LEN:=128}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune MNLI
