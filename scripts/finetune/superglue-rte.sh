#!/usr/bin/env bash
# SuperGLUERTE: does the first text entail the second? SuperGLUE's files, 2,490 rows to
# train on. Predicts AX-b and AX-g, too.
: "${EPOCHS:=100}" "${BATCH_SIZE:=8}" "${MAX_LEN:=256}"
source "${BASH_SOURCE[0]%/*}/common.sh"
finetune SuperGLUERTE
