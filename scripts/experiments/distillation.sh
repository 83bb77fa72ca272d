#!/usr/bin/env bash
# Does distillation teach a small network more than masked language modelling alone?
#
#   TEXT=textbooks.txt,wikipedia.txt,books.txt DATA_DIR=glue ./scripts/experiments/distillation.sh
#
# The teacher is that of teacher.sh. The student is a BERT-tiny that is past the plateau of word
# frequencies, on every 20th of the teacher's documents: BERT-tiny's own weights, spoilt as a masked
# LM by a fine-tuning for search. START=random takes a random bort_2_4_512_128, which needs a
# thousand steps to leave that plateau, on every 5th. Each arm is run with the seeds 1, 2 and 3:
#   mlm            masked-LM loss alone
#   mlm-bfloat16   the same with products in bfloat16 (needs AVX512-BF16 or AMX)
#   mlm-kd         0.1 x masked-LM loss + 0.5 x T² KL, T = 2, from the cached teacher
#   kd             T² KL alone, from the cached teacher
#   mlm-kd-live    mlm-kd with the teacher run in each step; seed 1 alone
# The rates of mlm and of mlm-kd are those with the lower held-out masked-LM loss of RATES on seed
# 9; mlm-bfloat16 takes that of mlm, the others that of mlm-kd. The students, and their starts, are
# then fine-tuned on TASKS.
# Results, in $EXPERIMENTS/distillation/$START: runs, curves.png, and the tables on standard output.
# Besides the variables of common.sh and teacher.sh:
#   START           bert-tiny (default) or random
#   TEACHER_DTYPE   type of the teacher's products: float32 (default) or bfloat16
#   STEPS           updates of 8 sequences (default 240; 2000 from random weights)
#   RATES           peak learning rates to choose from (default "1.25e-4 2.5e-4 5e-4", from random
#                   weights "1e-3 2e-3")
#   ARMS            arms to run beside mlm, which the table compares with (default: all of them)
#   TASKS           tasks to fine-tune on (default "SST-2 MRPC STS-B CoLA RTE"; "": none)
#   ROWS            rows of each task to train on, for two epochs (default 1000)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need TEXT "files of English prose, separated by commas"
ARMS="mlm ${ARMS-mlm-bfloat16 mlm-kd kd mlm-kd-live}" START=${START:-bert-tiny}
TASKS=${TASKS-SST-2 MRPC STS-B CoLA RTE} TEACHER_DTYPE=${TEACHER_DTYPE:-float32}
one_of START bert-tiny random
one_of ARMS mlm mlm-bfloat16 mlm-kd kd mlm-kd-live
one_of TASKS SST-2 MRPC STS-B CoLA RTE QQP MNLI QNLI WNLI BoolQ CB COPA MultiRC ReCoRD \
    SuperGLUERTE WiC WSC RACE-M RACE-H
one_of TEACHER_DTYPE float32 bfloat16
number STEPS
rates RATES
number ROWS
[[ -z $TASKS ]] || need DATA_DIR "the folder of the official files of the tasks"
scripts/experiments/teacher.sh
start=$START teacher_dtype=$TEACHER_DTYPE
folder=$EXPERIMENTS/distillation/$start teacher=$EXPERIMENTS/teacher
teacher_flags=(--teacher_model bort_6_12_1536_384 --teacher_ckpt_dir "$teacher/model"
    --teacher_dtype "$teacher_dtype")
if [[ $start == random ]]; then
    pretrained all-MiniLM-L6-v2 # for its vocabulary
    student=(--student_model bort_2_4_512_128 --dropout 0)
    weights=(--model_name bort_2_4_512_128 --vocab_file "$saved/tokenizer/tokenizer.json")
    # With 200 steps of warmup to 2e-3 it stays on the plateau; with 800 it leaves it.
    steps=${STEPS:-2000} rates=${RATES:-1e-3 2e-3} every=5 warmup=0.4
else
    pretrained bert-tiny
    student=(--student_model bort_2_2_512_128 --student_parameters "$saved")
    weights=(--pretrained_parameters "$saved")
    steps=${STEPS:-240} rates=${RATES:-1.25e-4 2.5e-4 5e-4} every=20 warmup=0.1
fi

begun_with "$folder" "TEACHER_STEPS=${TEACHER_STEPS:-3000}" "TEACHER_DTYPE=$teacher_dtype" \
    "STEPS=$steps" "RATES=$rates" "ROWS=${ROWS:-1000}"
mkdir -p "$folder/times"
documents() {
    awk -v every=$every 'BEGIN { RS = ""; ORS = "\n\n" } NR % every == 0' "$teacher/train.txt" \
        >"$folder/train.part"
    mv "$folder/train.part" "$folder/train.txt"
}
once "$folder/train.txt" documents
shards "$folder/train.txt" "$folder/train"
build_cache() {
    "$python" scripts/build_teacher_cache.py --data "$folder/train,$teacher/test" \
        --output_dir "$folder/cache" "${teacher_flags[@]}"
    touch "$folder/cache-is-complete"
}
once "$folder/cache-is-complete" build_cache

held_out=(--data_eval "$teacher/test")
# student <arm> <rate> <seed> <run> [flags...]
student() {
    local flags=()
    case $1 in
        mlm) flags=(--mlm_weight 1) ;;
        mlm-bfloat16) flags=(--mlm_weight 1 --dtype bfloat16) ;;
        mlm-kd) flags=(--teacher_cache "$folder/cache" --mlm_weight 0.1 --teacher_ce_weight 0.5) ;;
        kd) flags=(--teacher_cache "$folder/cache" --mlm_weight 0 --teacher_ce_weight 1) ;;
        mlm-kd-live) flags=("${teacher_flags[@]}" --mlm_weight 0.1 --teacher_ce_weight 0.5) ;;
    esac
    pretrain "$4" "$steps" --data "$folder/train" "${held_out[@]}" "${student[@]}" \
        --batch_size 8 --lr "$2" --warmup_ratio $warmup --seed "$3" --eval_interval $(((steps + 3) / 4)) \
        --ckpt_interval "$steps" "${flags[@]}" "${@:5}"
}

# measure <arm> <rate>: writes the processor seconds, user and system, of 20 steps and of 80.
measure() {
    local TIMEFORMAT='%U %S' held_out=() count # no evaluation is timed
    rm -rf "$folder/timed"
    for count in 20 80; do
        time student "$1" "$2" 1 "$folder/timed/$count" --num_steps $count \
            >"$folder/timed.log" 2>&1 || {
            cat "$folder/timed.log" # not to stderr, which has the times
            exit 1
        }
    done 2>"$folder/timed-$1"
    mv "$folder/timed-$1" "$folder/times/$1"
}

# best_rate <arm>: sets `rate` to the best one for the arm on seed 9, or to the only one.
best_rate() {
    local tried=() best
    rate=$rates
    if [[ $rates != *" "* ]]; then return; fi
    for rate in $rates; do
        student "$1" "$rate" 9 "$folder/rates/$1/$rate"
        tried+=("$folder/rates/$1/$rate")
    done
    best=$("$python" scripts/experiments/distillation.py --best "${tried[@]}")
    rate=${best##*/}
}

# finetune <arm> <seed> <task> <flags of the weights...>
finetune() {
    once "$folder/tasks/$1/$2/$3/metrics.json" "$python" finetune_classifier.py --task_name "$3" \
        --data_dir "$DATA_DIR" --train_rows "${ROWS:-1000}" --epochs 2 --batch_size 16 --lr 5e-4 \
        --max_len 64 --seed "$2" --cache_dir "$folder/encoded" --output_dir "$folder/tasks/$1/$2" \
        --resume "${@:4}"
}

for arms in "mlm mlm-bfloat16" "mlm-kd kd mlm-kd-live"; do
    rate=
    for arm in $arms; do
        if [[ " $ARMS " != *" $arm "* ]]; then continue; fi
        if [[ -z $rate ]]; then best_rate "${arms%% *}"; fi
        for seed in 1 2 3; do
            if [[ $arm != mlm-kd-live || $seed == 1 ]]; then
                student "$arm" "$rate" $seed "$folder/runs/$arm/$seed"
            fi
        done
        once "$folder/times/$arm" measure "$arm" "$rate"
    done
done
for seed in 1 2 3; do
    for task in $TASKS; do
        for arm in mlm mlm-kd kd; do
            if [[ " $ARMS " != *" $arm "* ]]; then continue; fi
            finetune $arm $seed "$task" --pretrained_parameters "$folder/runs/$arm/$seed"
        done
        finetune start $seed "$task" "${weights[@]}"
    done
done
"$python" scripts/experiments/distillation.py "$folder"
