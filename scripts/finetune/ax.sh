#!/usr/bin/env bash
# AX: GLUE's diagnostic set, answered with a model that mnli.sh has made.
source "${BASH_SOURCE[0]%/*}/common.sh"
predict AX MNLI
