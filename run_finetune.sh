#!/usr/bin/env bash
# Fine-tunes Bort on a task of GLUE or SuperGLUE or on RACE, or predicts a diagnostic set.
#
#   ./run_finetune.sh <task> [flags of finetune_classifier.py]
#   ./run_finetune.sh TEST1|TEST2 [flags]
#
# The first form runs the script of the task in scripts/finetune/, which has the defaults of the
# task. Flags override them:
#   ./run_finetune.sh CoLA --lr 1e-5 --seed 3 --extra_layer
# TEST1 trains on a GLUE task and TEST2 on a SuperGLUE task, on the rows in test_data/.
# Environment variables: see scripts/finetune/common.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/launch.sh

# Task names are compared as --task_name does: without case, dots, dashes and underscores.
normalise() { tr -cd '[:alnum:]' <<<"${1,,}"; }

script_of() {
    local wanted script name
    wanted=$(normalise "$1")
    for script in scripts/finetune/*.sh; do
        name=$(basename "$script" .sh)
        if [[ $name != common && $(normalise "$name") == "$wanted" ]]; then
            echo "$script"
        fi
    done
}

# run_test <test> <task> <suite> [flags...]: a small network, from random weights.
run_test() {
    export DATA_DIR=test_data/$3 OUTPUT_DIR=runs/$1 PRETRAINED_PARAMETERS=none
    start_folder "$OUTPUT_DIR"
    exec "scripts/finetune/$2.sh" --model_name bort_2_4_128_64 --epochs 5 "${@:4}"
}

usage() {
    echo "usage: $0 <task> [flags], TEST1 or TEST2; the tasks are" \
        "$(cd scripts/finetune && ls -- *.sh | sed '/common/d; s/\.sh$//' | paste -s -d ' ')" >&2
    exit 2
}

[[ ${2:--} == -* ]] || usage
name=${1:-}
case ${name^^} in
    TEST1) run_test "$name" mrpc glue "${@:2}" ;;
    TEST2) run_test "$name" cb superglue "${@:2}" ;;
    SST) script=scripts/finetune/sst-2.sh ;;
    DIAGNOSTIC) script=scripts/finetune/ax.sh ;;
    *) script=$(script_of "$name") ;;
esac
[[ -n $script ]] || usage
exec "$script" "${@:2}"
