#!/usr/bin/env bash
# CoLA: is the sentence acceptable English? 8,551 rows to train on. --extra_layer, through
# EXTRA_FLAGS, puts one more dense layer before the head.
: "${EPOCHS:=50}" "${BATCH_SIZE:=8}" "${MAX_LEN:=64}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune CoLA
