#!/usr/bin/env bash
# MultiRC: which answers to a question about a paragraph are right? 27,243 inputs to train on.
: "${EPOCHS:=20}" "${BATCH_SIZE:=16}" "${MAX_LEN:=512}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune MultiRC
