#!/usr/bin/env bash
# AX-g: Winogender as inference, answered with a model that superglue-rte.sh has made.
source "${BASH_SOURCE[0]%/*}/common.sh"
predict AX-g SuperGLUERTE
