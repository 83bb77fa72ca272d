#!/usr/bin/env bash
# AX-b: SuperGLUE's broad-coverage diagnostics, answered with a model of superglue-rte.sh.
source "${BASH_SOURCE[0]%/*}/common.sh"
predict AX-b SuperGLUERTE
