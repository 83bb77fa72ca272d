# Sourced by the scripts of the tasks, which set what differs between them. Settings, by environment
# variables; the defaults are one point of the search space that Bort's authors recommend:
#   PRETRAINED_PARAMETERS, DATASET_NAME, MODEL_NAME, DATA_DIR, OUTPUT_DIR, EPOCHS, RAMP_UP_EPOCHS,
#   EARLY_STOP, BATCH_SIZE, ACCUMULATE, MAX_LEN, LR, WEIGHT_DECAY, WARMUP_RATIO, SEED, WORKERS,
#   MODEL_PARAMETERS for the tasks that are only predicted, and EXTRA_FLAGS for any other flag of
#   finetune_classifier.py, such as --resume.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/launch.sh

# classify <task> <flags...>: set up, then one process, or horovodrun with several.
classify() {
    scripts/setup_env.sh
    # shellcheck disable=SC2086  # EXTRA_FLAGS holds several words
    launch "${WORKERS:-1}" finetune_classifier.py finetune_classifier.py --task_name "$1" \
        ${DATA_DIR:+--data_dir "$DATA_DIR"} --output_dir "${OUTPUT_DIR:-runs/finetuning}" \
        "${@:2}" ${EXTRA_FLAGS:-}
}

# finetune <task>: trains from the released model, from PRETRAINED_PARAMETERS, or from none.
finetune() {
    local weights=${PRETRAINED_PARAMETERS:-model/bort.params} flags=()
    if [[ $weights == model/bort.params ]]; then
        # The released file is the only one that brings no vocabulary along.
        DATASET_NAME=${DATASET_NAME:-openwebtext_ccnews_stories_books_cased}
        if [[ ! -e $weights ]]; then
            echo "error: $weights: not found; scripts/download_model.sh fetches it," \
                "PRETRAINED_PARAMETERS names others, or none to start from random weights" >&2
            exit 1
        fi
    fi
    [[ $weights == none ]] || flags=(--pretrained_parameters "$weights")
    classify "$1" "${flags[@]}" ${DATASET_NAME:+--dataset_name "$DATASET_NAME"} \
        ${MODEL_NAME:+--model_name "$MODEL_NAME"} --max_len "${MAX_LEN:-512}" \
        --epochs "${EPOCHS:-50}" ${RAMP_UP_EPOCHS:+--ramp_up_epochs "$RAMP_UP_EPOCHS"} \
        ${EARLY_STOP:+--early_stop "$EARLY_STOP"} --batch_size "${BATCH_SIZE:-8}" \
        --accumulate "${ACCUMULATE:-1}" --lr "${LR:-1e-4}" --weight_decay "${WEIGHT_DECAY:-10}" \
        --warmup_ratio "${WARMUP_RATIO:-0.35}" --seed "${SEED:-0}"
}

# predict <task> <model task>: answers with a model that `finetune <model task>` has made.
predict() {
    local model=${MODEL_PARAMETERS:-${OUTPUT_DIR:-runs/finetuning}/$2}
    classify "$1" --only_inference --model_parameters "$model"
}
