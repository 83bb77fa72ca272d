#!/usr/bin/env bash
# QQP: are two questions the same? 363,846 rows to train on.
: "${EPOCHS:=10}" "${BATCH_SIZE:=16}" "${MAX_LEN:=128}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune QQP
