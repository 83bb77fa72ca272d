#!/usr/bin/env bash
# RACE-M: questions for middle schools; 25,421 to train on, four inputs each.
: "${EPOCHS:=20}" "${BATCH_SIZE:=8}" "${MAX_LEN:=512}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune RACE-M
