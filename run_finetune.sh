#!/usr/bin/env bash
# Fine-tunes Bort on a task of GLUE or SuperGLUE or on RACE, or predicts one of the diagnostic sets.
#
#   ./run_finetune.sh <task>           by the task's script in scripts/finetune/, with its settings
#   ./run_finetune.sh TEST1|TEST2      one task of GLUE, one of SuperGLUE, on the rows in test_data/
#
# Settings, by environment variables: see scripts/finetune/common.sh. HOROVODRUN_FLAGS holds flags
# of horovodrun.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# As in --task_name: case, dots, dashes and underscores do not matter.
plain() { tr -cd '[:alnum:]' <<<"${1,,}"; }

script_of() {
    local wanted script name
    wanted=$(plain "$1")
    for script in scripts/finetune/*.sh; do
        name=$(basename "$script" .sh)
        if [[ $name != common && $(plain "$name") == "$wanted" ]]; then
            echo "$script"
        fi
    done
}

# embedded_run <task> <suite>: a small shape, from random weights.
embedded_run() {
    export DATA_DIR=test_data/$2 OUTPUT_DIR=runs/$name PRETRAINED_PARAMETERS=none
    export MODEL_NAME=bort_2_4_128_64 EPOCHS=5
    rm -rf "${OUTPUT_DIR:?}"
    "scripts/finetune/$1.sh"
}

name=${1:-}
case ${name^^} in
    TEST1) embedded_run mrpc glue ;;
    TEST2) embedded_run cb superglue ;;
    SST) scripts/finetune/sst-2.sh ;;
    DIAGNOSTIC) scripts/finetune/ax.sh ;;
    *)
        script=$(script_of "$name")
        if [[ $# -ne 1 || -z $script ]]; then
            echo "usage: $0 <task>, TEST1 or TEST2; the tasks are" \
                "$(cd scripts/finetune && ls -- *.sh | sed '/common/d; s/\.sh$//' | paste -s -d ' ')" >&2
            exit 2
        fi
        "$script"
        ;;
esac
