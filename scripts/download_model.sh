#!/usr/bin/env bash
# Fetches the released, pretrained Bort (some 300 MB) to model/bort.params.
#
#   ./scripts/download_model.sh
#
# With the AWS command line where it runs, else from the bucket's https address. A file that is
# there already is left alone. Where .venv is set up, card and tokenizer are laid beside it.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
S3=s3://alexa-saif-bort/bort.params
HTTPS=https://alexa-saif-bort.s3.amazonaws.com/bort.params
TARGET=model/bort.params

# Parameter files of MXNet begin with this number; the error page of a proxy does not.
is_parameter_file() {
    [[ "$(head -c 8 "$1" 2>/dev/null | od -An -tx1 | tr -d ' \n')" == 1201000000000000 ]]
}

with_aws() { aws s3 cp --no-sign-request --only-show-errors "$S3" "$1"; }
with_curl() { curl --fail --location --retry 3 --connect-timeout 30 --output "$1" "$HTTPS"; }
with_wget() { wget --tries 3 --timeout 30 --output-document "$1" "$HTTPS"; }

fetch() {
    local tool
    for tool in aws curl wget; do
        if command -v "$tool" >/dev/null; then
            echo "fetching $TARGET with $tool"
            if "with_$tool" "$1" && is_parameter_file "$1"; then
                return
            fi
            echo "$tool brought no parameter file" >&2
        fi
    done
    return 1
}

finish() {
    echo "$TARGET is in place"
    if [[ ! -x .venv/bin/python ]]; then
        echo "to predict with it, call this again after ./scripts/setup_env.sh: it lacks its card"
    elif [[ ! -f ${TARGET%.params}.json ]]; then
        .venv/bin/python scripts/describe_released.py
    fi
}

if is_parameter_file "$TARGET"; then
    finish
    exit
fi
mkdir -p model
# Beside the target, so that putting it in place is a rename: no half file ever has its name.
partial=$(mktemp "$TARGET.XXXXXX")
trap 'rm -f "$partial"' EXIT
if ! fetch "$partial"; then
    echo "error: could not fetch $S3 or $HTTPS. Fetch it where the network allows and put it in" \
        "$TARGET, or make your own by distillation: ./run_pretraining_distillation.sh" >&2
    exit 1
fi
chmod 644 "$partial"
mv "$partial" "$TARGET"
finish
