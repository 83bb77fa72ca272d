#!/usr/bin/env bash
# ReCoRD: which entity fills the gap? 100,730 queries to train on.
: "${EPOCHS:=10}" "${BATCH_SIZE:=16}" "${MAX_LEN:=512}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune ReCoRD
