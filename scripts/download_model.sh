#!/usr/bin/env bash
# Downloads the released, pretrained Bort (about 300 MB) to model/bort.params.
#
#   ./scripts/download_model.sh
#
# Uses the AWS command line if it is installed, or else the bucket's HTTPS address with curl or
# wget. An existing parameter file is kept. If .venv is set up, the script also writes the model
# config and the tokenizer beside the parameters.
set -euo pipefail

if (($#)); then
    echo "usage: $0 (no arguments; the top of the file describes it)" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
S3=s3://alexa-saif-bort/bort.params
HTTPS=https://alexa-saif-bort.s3.amazonaws.com/bort.params
TARGET=model/bort.params
SUMS=model/SHA256SUMS

# MXNet's parameter files begin with this number; the error page of a proxy does not.
is_parameter_file() {
    [[ "$(head -c 8 "$1" 2>/dev/null | od -An -tx1 | tr -d ' \n')" == 1201000000000000 ]]
}

# No hash of the released file is published: that of the first download is kept, and every later one
# must have it, as must the file whenever it is loaded.
require_known_sum() {
    local sum known
    sum=$(sha256sum "$1" | cut -d ' ' -f 1)
    known=$(grep -s '  bort\.params$' "$SUMS" | cut -d ' ' -f 1 || true)
    if [[ -z "$known" ]]; then
        echo "$sum  bort.params" >>"$SUMS"
    elif [[ "$sum" != "$known" ]]; then
        echo "error: $1: its SHA-256 is $sum, that of the first download was $known ($SUMS);" \
            "download it again, or delete that line to accept it" >&2
        exit 1
    fi
}

with_aws() { aws s3 cp --no-sign-request --only-show-errors "$S3" "$1"; }
with_curl() {
    curl --fail --location --proto =https --proto-redir =https --retry 3 --connect-timeout 30 \
        --output "$1" "$HTTPS"
}
with_wget() { wget --max-redirect 0 --tries 3 --timeout 30 --output-document "$1" "$HTTPS"; }

fetch() {
    local tool
    for tool in aws curl wget; do
        if command -v "$tool" >/dev/null; then
            echo "downloading $TARGET with $tool"
            if "with_$tool" "$1" && is_parameter_file "$1"; then
                return
            fi
            echo "$tool did not download a parameter file" >&2
        fi
    done
    return 1
}

finish() {
    echo "$TARGET is in place"
    if [[ ! -x .venv/bin/python ]]; then
        echo "it has no model config: to predict with it, run this again after ./scripts/setup_env.sh"
    elif [[ ! -f ${TARGET%.params}.json ]]; then
        .venv/bin/python scripts/describe_released.py
    fi
}

if is_parameter_file "$TARGET"; then
    require_known_sum "$TARGET"
    finish
    exit
fi
mkdir -p model
# The download is renamed to the target only when it is complete: no partial file has that name.
partial=$(mktemp "$TARGET.XXXXXX")
trap 'rm -f "$partial"' EXIT
if ! fetch "$partial"; then
    echo "error: could not download $S3 or $HTTPS. Download it on a machine with access and copy" \
        "it to $TARGET, or distil your own: ./run_pretraining_distillation.sh" >&2
    exit 1
fi
require_known_sum "$partial"
chmod 644 "$partial"
mv "$partial" "$TARGET"
finish
