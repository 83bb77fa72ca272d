# Sourced by the experiments.
# Environment variables:
#   EXPERIMENTS  folder of their runs and tables (default runs/experiments)
#   WEIGHTS      folder that fetch_weights.sh fills (default model/pretrained)
#   DATA_DIR     folder of the official files of the tasks (needed by those that fine-tune)
#   TEXT         files of English prose, comma-separated (needed by those that pretrain)
# Every step is skipped when its result is there: the same command resumes an experiment.
# shellcheck shell=bash
set -euo pipefail
if (($#)); then # those of the experiment
    echo "usage: $0 (no arguments but variables; the top of the file describes them)" >&2
    exit 2
fi
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

# one_of <variable> <names...>: ends the experiment where the variable has another name.
one_of() {
    local name
    for name in ${!1}; do
        if [[ " ${*:2} " != *" $name "* ]]; then
            echo "error: $1: $name is none of ${*:2}" >&2
            exit 2
        fi
    done
}

# number <variable>: ends the experiment where the variable is set to no positive integer.
number() {
    if [[ ! ${!1:-1} =~ ^[1-9][0-9]{0,6}$ ]]; then
        echo "error: $1=${!1}: must be a number from 1 to 9999999" >&2
        exit 2
    fi
}

# rates <variable>: ends the experiment where the variable has anything but numbers.
rates() {
    local each
    for each in ${!1:-}; do
        if [[ ! $each =~ ^[0-9]*\.?[0-9]+(e-?[0-9]+)?$ ]]; then
            echo "error: $1: $each is no number; give numbers, separated by spaces" >&2
            exit 2
        fi
    done
}

# begun_with <folder> <variable=value...>: ends the experiment where its folder was begun with other
# values: what is there is skipped, so that its results would mix both.
begun_with() {
    local file=$1/variables.txt
    if [[ ! -e $file ]]; then
        mkdir -p "$1"
        printf '%s\n' "${@:2}" >"$file.part"
        mv "$file.part" "$file"
    elif [[ $(printf '%s\n' "${@:2}") != "$(<"$file")" ]]; then
        echo "error: $1: was begun with $(paste -s -d ' ' "$file"); set these," \
            "remove the folder, or set EXPERIMENTS to another" >&2
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

# keep <file> <command...>: prints what the command prints, and writes the file if it succeeds.
keep() {
    mkdir -p "${1%/*}"
    "${@:2}" >"$1.part"
    mv "$1.part" "$1"
    cat "$1"
}

# pretrained <name>: converts the weights of that name once, and sets `saved` to the saved model.
pretrained() {
    [[ -e $WEIGHTS/$1 ]] || scripts/experiments/fetch_weights.sh "$WEIGHTS"
    once "$EXPERIMENTS/pretrained/$1" "$python" scripts/convert_from_huggingface.py \
        "$WEIGHTS/$1" --output "$EXPERIMENTS/pretrained/$1"
    # shellcheck disable=SC2034  # for the experiment
    saved=$EXPERIMENTS/pretrained/$1
}

# shards <text> <folder>: makes shards of a text once, with the WordPiece of the model `saved`,
# which is the same for all of these.
shards() {
    once "$2/manifest.json" "$python" create_pretraining_data.py --input_file "$1" \
        --output_dir "$2" --vocab_file "$saved/tokenizer/tokenizer.json" \
        --max_seq_length 128 --num_outputs 2 --num_workers 2
}

# pretrain <run> <steps> <flags...>: trains up to a step, from the last checkpoint if there is one.
pretrain() {
    local end trained
    end=$1/$(printf 'step-%07d' "$2")
    for trained in "$1"/step-???????; do
        if [[ -e $trained && ${trained##*-} > ${end##*-} ]]; then
            echo "error: $1: has been trained for more than $2 steps; remove it, or set" \
                "EXPERIMENTS to another folder" >&2
            exit 2
        fi
    done
    once "$end" "$python" run_pretraining_distillation.py \
        --ckpt_dir "$1" --num_steps "$2" --batch_size 16 --batch_size_eval 16 \
        --keep_checkpoints 1 --log_interval 25 --resume "${@:3}"
}
