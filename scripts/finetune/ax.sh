#!/usr/bin/env bash
# AX: the diagnostic set of GLUE, predicted with the model of mnli.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
predict AX MNLI "$@"
