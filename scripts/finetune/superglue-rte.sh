#!/usr/bin/env bash
# SuperGLUERTE: does the premise entail the hypothesis? SuperGLUE's files, 2,490 training examples.
# ax-b.sh and ax-g.sh use this model.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
finetune SuperGLUERTE --epochs 100 --batch_size 8 --max_len 256 "$@"
