#!/usr/bin/env bash
# WSC: does the pronoun mean the noun? 554 rows to train on.
: "${EPOCHS:=100}" "${BATCH_SIZE:=8}" "${MAX_LEN:=128}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune WSC
