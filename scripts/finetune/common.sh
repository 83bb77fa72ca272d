# Sourced by the scripts of the tasks, which give the defaults of their task as flags. The other
# defaults are one point of the search space that Bort's authors recommend. Flags of
# finetune_classifier.py at the end of the command override all of them.
# Environment variables:
#   PRETRAINED_PARAMETERS  weights to start from (default model/bort.params; none: random weights)
#   DATA_DIR               folder of the tasks' data (default: that of finetune_classifier.py)
#   OUTPUT_DIR             folder of the runs (default runs/finetuning)
#   WORKERS                number of workers (default 1)
#   HOROVODRUN_FLAGS       flags of horovodrun, such as --timeline-filename
# SIGTERM and Ctrl-C are passed on to the program; the script waits for it and exits with its
# status.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/launch.sh

# classify <task> <flags...>: runs set-up, then one process, or horovodrun with several.
classify() {
    refuse_variables DATASET_NAME MODEL_NAME EPOCHS RAMP_UP_EPOCHS EARLY_STOP BATCH_SIZE \
        ACCUMULATE MAX_LEN LR WEIGHT_DECAY WARMUP_RATIO SEED MODEL_PARAMETERS EXTRA_FLAGS
    refuse_config "$@"
    if [[ ! ${WORKERS:-1} =~ ^[1-9][0-9]*$ ]]; then
        echo "error: WORKERS=$WORKERS: must be a number of workers, at least 1" >&2
        exit 2
    fi
    supervise group scripts/setup_env.sh
    launch "${WORKERS:-1}" finetune_classifier.py finetune_classifier.py --task_name "$1" \
        ${DATA_DIR:+--data_dir "$DATA_DIR"} --output_dir "${OUTPUT_DIR:-runs/finetuning}" "${@:2}"
}

# finetune <task> <flags...>: trains from the released model or from PRETRAINED_PARAMETERS; with
# --model_parameters from a fine-tuned model, which contains a body.
finetune() {
    local weights flag flags=()
    weights=$(flag_value --pretrained_parameters "$@")
    weights=${weights:-${PRETRAINED_PARAMETERS:-model/bort.params}}
    [[ -z $(flag_value --model_parameters "$@") ]] || weights=none
    for flag; do
        [[ $flag != -h && $flag != --help ]] || weights=none # needs none
    done
    if [[ $weights == model/bort.params ]]; then
        # Only the released weights come without a vocabulary.
        flags=(--dataset_name openwebtext_ccnews_stories_books_cased)
        if [[ ! -e $weights ]]; then
            echo "error: $weights: not found; run scripts/download_model.sh, or set" \
                "PRETRAINED_PARAMETERS to other weights, or to none for random weights" >&2
            exit 1
        fi
    fi
    [[ $weights == none ]] || flags+=(--pretrained_parameters "$weights")
    classify "$1" "${flags[@]}" --lr 1e-4 --weight_decay 10 --warmup_ratio 0.35 --seed 0 "${@:2}"
}

# predict <task> <task of the model> <flags...>: predicts with a model that `finetune` trained.
predict() {
    classify "$1" --only_inference \
        --model_parameters "${OUTPUT_DIR:-runs/finetuning}/$2" "${@:3}"
}
