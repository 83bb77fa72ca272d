#!/usr/bin/env bash
# Pretrains Bort by masked-LM distillation, on one or several workers of this machine.
#
#   ./run_pretraining_distillation.sh <num gpus> <training data> <testing data> [teacher checkpoint]
#   ./run_pretraining_distillation.sh 2 TEST
#
# The data are folders of shards (create_pretraining_data.py); without a teacher checkpoint the loss
# is masked language modelling only. On a machine without a GPU the number is that of CPU workers.
# TEST goes the whole road on the text embedded in test_data/: shards, a small teacher, Bort.
#
# Settings, by environment variables (the recipe of the released model where it is known):
#   STUDENT_MODEL, TEACHER_MODEL, NUM_STEPS, BATCH_SIZE, ACCUMULATE, NUM_BUCKETS, LR, WARMUP_RATIO,
#   MLM_WEIGHT, TEACHER_CE_WEIGHT, TEMPERATURE, CKPT_DIR, CKPT_INTERVAL, EVAL_INTERVAL,
#   LOG_INTERVAL, SEED, and EXTRA_FLAGS for any other flag of run_pretraining_distillation.py;
#   HOROVODRUN_FLAGS for flags of horovodrun, such as --timeline-filename or --fusion-threshold-mb.
# What is printed goes to the screen and to $CKPT_DIR/train.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    echo "usage: $0 <num gpus> <training data> <testing data> [teacher checkpoint]" >&2
    echo "       $0 <num workers> TEST" >&2
    exit 2
}

source scripts/launch.sh

pretrain() {
    launch "$1" run_pretraining_distillation.py run_pretraining_distillation_hvd.py "${@:2}"
}

run() {
    local workers=$1 training=$2 testing=$3 teacher=${4:-}
    local folder=${CKPT_DIR:-runs/pretraining} teacher_flags=()
    local weight=${MLM_WEIGHT:-1}
    if [[ -n $teacher ]]; then
        weight=${MLM_WEIGHT:-0.1}
        teacher_flags=(--teacher_model "${TEACHER_MODEL:-roberta_24_1024_16}"
            --teacher_ckpt_dir "$teacher" --teacher_ce_weight "${TEACHER_CE_WEIGHT:-0.5}"
            --distillation_temperature "${TEMPERATURE:-2}")
    fi
    mkdir -p "$folder"
    # shellcheck disable=SC2086  # EXTRA_FLAGS holds several words
    pretrain "$workers" --data "$training" --data_eval "$testing" "${teacher_flags[@]}" \
        --student_model "${STUDENT_MODEL:-bort_4_8_768_1024}" --mlm_weight "$weight" \
        --use_avg_len --batch_size "${BATCH_SIZE:-1024}" --batch_size_eval "${BATCH_SIZE:-1024}" \
        --accumulate "${ACCUMULATE:-1}" --num_buckets "${NUM_BUCKETS:-20}" \
        --num_steps "${NUM_STEPS:-2000000}" --lr "${LR:-1e-4}" \
        --warmup_ratio "${WARMUP_RATIO:-0.01}" --seed "${SEED:-0}" --ckpt_dir "$folder" \
        --ckpt_interval "${CKPT_INTERVAL:-1000}" --eval_interval "${EVAL_INTERVAL:-1000}" \
        --log_interval "${LOG_INTERVAL:-10}" ${EXTRA_FLAGS:-} 2>&1 | tee -a "$folder/train.log"
}

# split <text> <folder>: every fifth document, or the last of fewer, is held out.
split() {
    awk -v RS= -v ORS='\n\n' -v folder="$2" '
        { document[NR] = $0 }
        END {
            for (n = 1; n <= NR; n++)
                print document[n] > (n % 5 == 0 || (NR < 5 && n == NR) ? folder "/test.txt" : folder "/train.txt")
        }' "$1"
}

# shards <text> <folder> <copies>: the vocabulary is the one embedded in test_data/.
shards() {
    .venv/bin/python create_pretraining_data.py --input_file "$1" --output_dir "$2" \
        --dupe_factor "$3" --num_outputs 2 --max_seq_length 128 --num_workers 1
}

embedded_run() {
    local workers=$1 folder=runs/TEST start=$SECONDS
    rm -rf "$folder"
    mkdir -p "$folder"
    echo "== 1/3 text to shards"
    split test_data/sample_text.txt "$folder"
    shards "$folder/train.txt" "$folder/train" 10
    shards "$folder/test.txt" "$folder/test" 2
    echo "== 2/3 a small teacher, by masked language modelling"
    STUDENT_MODEL=bort_2_4_512_256 NUM_STEPS=200 LR=2e-4 WARMUP_RATIO=0.1 NUM_BUCKETS=4 \
        EVAL_INTERVAL=100 LOG_INTERVAL=50 CKPT_DIR=$folder/teacher \
        run 1 "$folder/train" "$folder/test"
    echo "== 3/3 Bort, distilled on $workers worker(s)"
    TEACHER_MODEL=bort_2_4_512_256 NUM_STEPS=40 LR=3e-4 WARMUP_RATIO=0.1 NUM_BUCKETS=4 \
        BATCH_SIZE=512 EVAL_INTERVAL=20 LOG_INTERVAL=10 CKPT_DIR=$folder/bort \
        run "$workers" "$folder/train" "$folder/test" "$folder/teacher"
    echo "== done in $((SECONDS - start)) s: everything is in $folder"
}

[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || usage
scripts/setup_env.sh
if [[ $2 == TEST ]]; then
    embedded_run "$1"
elif [[ $# -ge 3 ]]; then
    run "$@"
else
    usage
fi
