#!/usr/bin/env bash
# STS-B: how similar are two sentences, from 0 to 5? 5,749 rows to train on.
: "${EPOCHS:=50}" "${BATCH_SIZE:=8}" "${MAX_LEN:=128}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune STS-B
