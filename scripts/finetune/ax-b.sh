#!/usr/bin/env bash
# AX-b: the broad-coverage diagnostic set of SuperGLUE, predicted with the model of
# superglue-rte.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
predict AX-b SuperGLUERTE "$@"
