#!/usr/bin/env bash
# Pretrains Bort by masked-LM distillation, on one or several workers of this machine.
#
#   ./run_pretraining_distillation.sh <num gpus> <training data> <testing data> \
#       [teacher checkpoint] [flags of run_pretraining_distillation.py]
#   ./run_pretraining_distillation.sh <num workers> TEST [flags]
#
# The data are folders of shards made by create_pretraining_data.py. Without a teacher checkpoint or
# --teacher_cache, the loss is masked language modelling only. On a machine without a GPU, the
# number is the number of CPU workers. TEST runs the whole pipeline on the text in test_data/: it
# makes shards, trains a small teacher and distils Bort from it; the flags go to the distillation.
#
# The defaults are the recipe of the released model, as far as it is known. Flags override them:
#   ./run_pretraining_distillation.sh 8 train test teacher.params --num_steps 500000 --resume
# Environment variables:
#   STUDENT_MODEL     model name of the student (default bort_4_8_768_1024)
#   TEACHER_MODEL     model name of the teacher (default roberta_24_1024_16)
#   BATCH_SIZE        tokens per batch, in training and evaluation (default 1024)
#   CKPT_DIR          folder of checkpoints, metrics and train.log (default runs/pretraining)
#   HOROVODRUN_FLAGS  flags of horovodrun, such as --timeline-filename or --fusion-threshold-mb
#
# The output goes to the screen and to train.log in the folder of the checkpoints. SIGTERM and
# Ctrl-C are passed on to the program; the script waits for it and exits with its status.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    echo "usage: $0 <num gpus> <training data> <testing data> [teacher checkpoint] [flags]" >&2
    echo "       $0 <num workers> TEST [flags]" >&2
    exit 2
}

source scripts/launch.sh

# append_to_log: a filter that copies its input to the screen and to $log.
append_to_log() { tee -a "$log"; }

# pretrain <workers> <training data> <testing data> [teacher checkpoint] [flags...]
pretrain() {
    local workers=$1 training=$2 testing=$3 teacher= folder log weight=1 teacher_flags=()
    shift 3
    if [[ $# -gt 0 && $1 != -* ]]; then
        teacher=$1
        shift
    fi
    teacher=${teacher:-$(flag_value --teacher_ckpt_dir "$@")}
    if [[ -n $teacher ]]; then
        teacher_flags=(--teacher_model "${TEACHER_MODEL:-roberta_24_1024_16}"
            --teacher_ckpt_dir "$teacher")
    fi
    if [[ -n $teacher || -n $(flag_value --teacher_cache "$@") ]]; then
        weight=0.1
        teacher_flags+=(--teacher_ce_weight 0.5 --distillation_temperature 2)
    elif [[ -n ${TEACHER_MODEL:-} ]]; then
        echo "error: TEACHER_MODEL=$TEACHER_MODEL: there is no teacher; give its checkpoint after" \
            "the testing data, or unset the variable" >&2
        exit 2
    fi
    folder=$(flag_value --ckpt_dir "$@")
    folder=${folder:-${CKPT_DIR:-runs/pretraining}}
    log=$folder/train.log
    mkdir -p "$folder"
    through append_to_log launch "$workers" \
        run_pretraining_distillation.py run_pretraining_distillation_hvd.py \
        --data "$training" --data_eval "$testing" "${teacher_flags[@]}" \
        --student_model "${STUDENT_MODEL:-bort_4_8_768_1024}" --mlm_weight "$weight" \
        --use_avg_len --batch_size "${BATCH_SIZE:-1024}" --batch_size_eval "${BATCH_SIZE:-1024}" \
        --accumulate 1 --num_buckets 20 --num_steps 2000000 --lr 1e-4 --warmup_ratio 0.01 --seed 0 \
        --ckpt_interval 1000 --eval_interval 1000 --log_interval 10 --ckpt_dir "$folder" "$@"
}

# split <text> <folder>: holds out every fifth document, or the last one if there are fewer.
split() {
    awk -v RS= -v ORS='\n\n' -v train="$2/train.txt" -v test="$2/test.txt" '
        { document[NR] = $0 }
        END {
            for (n = 1; n <= NR; n++)
                print document[n] > (n % 5 == 0 || (NR < 5 && n == NR) ? test : train)
        }' "$1"
}

# make_shards <text> <folder> <copies>: with the vocabulary in test_data/.
make_shards() {
    supervise command .venv/bin/python create_pretraining_data.py --input_file "$1" --output_dir "$2" \
        --dupe_factor "$3" --num_outputs 2 --max_seq_length 128 --num_workers 1
}

# run_pipeline <workers> [flags...]
run_pipeline() {
    local workers=$1 folder=runs/TEST start=$SECONDS TEACHER_MODEL= # its teacher has another shape
    shift
    start_folder "$folder"
    echo "== 1/3 make shards from text"
    split test_data/sample_text.txt "$folder"
    make_shards "$folder/train.txt" "$folder/train" 10
    make_shards "$folder/test.txt" "$folder/test" 2
    echo "== 2/3 train a small teacher by masked language modelling"
    pretrain 1 "$folder/train" "$folder/test" --student_model bort_2_4_512_256 --num_steps 200 \
        --lr 2e-4 --warmup_ratio 0.1 --num_buckets 4 --eval_interval 100 --log_interval 50 \
        --ckpt_dir "$folder/teacher"
    echo "== 3/3 distil Bort on $workers worker(s)"
    pretrain "$workers" "$folder/train" "$folder/test" "$folder/teacher" \
        --teacher_model bort_2_4_512_256 --num_steps 40 --lr 3e-4 --warmup_ratio 0.1 \
        --num_buckets 4 --batch_size 512 --batch_size_eval 512 --eval_interval 20 \
        --ckpt_dir "$folder/bort" "$@"
    echo "== finished in $((SECONDS - start)) s: the results are in $folder"
}

[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || usage
if [[ $2 == TEST ]]; then
    [[ ${3:--} == -* ]] || usage
else
    [[ $# -ge 3 && $2 != -* && $3 != -* ]] || usage
    [[ ${4:--} == -* || ${5:--} == -* ]] || usage
fi
refuse_variables NUM_STEPS ACCUMULATE NUM_BUCKETS LR WARMUP_RATIO MLM_WEIGHT TEACHER_CE_WEIGHT \
    TEMPERATURE CKPT_INTERVAL EVAL_INTERVAL LOG_INTERVAL SEED EXTRA_FLAGS
refuse_config "$@"
supervise group scripts/setup_env.sh
if [[ $2 == TEST ]]; then
    run_pipeline "$1" "${@:3}"
else
    pretrain "$@"
fi
