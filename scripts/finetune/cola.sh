#!/usr/bin/env bash
# CoLA: is the sentence acceptable English? 8,551 training examples. The flag --extra_layer adds a
# dense layer before the classification head.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune CoLA --epochs 50 --batch_size 8 --max_len 64 "$@"
