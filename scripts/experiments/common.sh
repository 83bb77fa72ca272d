# Sourced by the experiments.
# Environment variables:
#   EXPERIMENTS  folder of their runs and tables (default runs/experiments)
#   WEIGHTS      folder that fetch_weights.sh fills (default model/pretrained)
#   DATA_DIR     folder of the official files of the tasks (needed by those that fine-tune)
#   TEXT         files of English prose, comma-separated (needed by those that pretrain)
# Every step is skipped when its result is there: the same command resumes an experiment.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export EXPERIMENTS=${EXPERIMENTS:-runs/experiments} WEIGHTS=${WEIGHTS:-model/pretrained}
python=.venv/bin/python

# need <variable> <what it is>: ends the experiment where the variable is not set.
need() {
    if [[ -z ${!1:-} ]]; then
        echo "error: $1 is not set; set it to $2" >&2
        exit 2
    fi
}

# once <result> <command...>: runs the command unless its result is there.
once() {
    if [[ ! -e $1 ]]; then
        printf '== %s\n' "${*:2}" >&2
        "${@:2}"
    fi
}

# pretrained <name>: converts the weights of that name once, and sets `saved` to the saved model.
pretrained() {
    [[ -e $WEIGHTS/$1 ]] || scripts/experiments/fetch_weights.sh "$WEIGHTS"
    once "$EXPERIMENTS/pretrained/$1" "$python" scripts/convert_from_huggingface.py \
        "$WEIGHTS/$1" --output "$EXPERIMENTS/pretrained/$1"
    # shellcheck disable=SC2034  # for the experiment
    saved=$EXPERIMENTS/pretrained/$1
}
