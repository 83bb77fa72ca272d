#!/usr/bin/env bash
# Does Agora help when the labeller is competent and data are scarce?
#
#   TEXT=textbooks.txt,wikipedia.txt,books.txt DATA_DIR=glue ./scripts/experiments/agora.sh
#
# Socrates is BERT-tiny, or another, on 100, 200 and 500 rows of SST-2, and on 500 of MRPC, RTE and
# STS-B, five draws of each. Timaeus is MiniLM-L6, fine-tuned on rows that no draw contains. Methods,
# some of them on SST-2 only, or on SST-2 and STS-B:
#   mistakes   Agora: two augmented examples per mistake, by the four cheap tau-functions
#   random     the same number of examples from random rows of dev
#   infill     tau is the masked LM of teacher.sh, which needs TEXT
#   eight      eight augmented examples per mistake
#   replay     each round is done again once on its augmented data (--replay 1)
#   real       the grid on as many real rows as `mistakes` has augmented ones, labelled by Timaeus
#   longer     the grid on the scarce rows, with as many updates as the last fits of `mistakes`
#   plain      one fine-tuning run
# Results, in $EXPERIMENTS/agora/TASK: the drawn sets, the runs, and table.md; in agora-SOCRATES for
# another one. An interrupted experiment resumes. Besides the variables of common.sh:
# OMP_NUM_THREADS (default 1), and these:
#   SOCRATES  bert-tiny (default) or paraphrase-MiniLM-L3-v2
#   TASKS     of SST-2 MRPC RTE STS-B (default all)
#   METHODS   of the above (default all); the table needs `mistakes`
#   ROWS      of 100 200 500, of SST-2 (default all)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need DATA_DIR "the folder of the official files of the tasks"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
SOCRATES=${SOCRATES:-bert-tiny} TASKS=${TASKS:-SST-2 MRPC RTE STS-B} ROWS=${ROWS:-100 200 500}
METHODS=${METHODS:-mistakes real replay longer random plain infill eight}
one_of TASKS SST-2 MRPC RTE STS-B
one_of METHODS mistakes real replay longer random plain infill eight
one_of ROWS 100 200 500
one_of SOCRATES bert-tiny paraphrase-MiniLM-L3-v2
data=$EXPERIMENTS/agora out=$EXPERIMENTS/agora teacher=$EXPERIMENTS/teacher/model draws=5
socrates=()
if [[ $SOCRATES != bert-tiny ]]; then
    out+=-$SOCRATES socrates=(--pooling mean --bias_correction)
fi
if [[ " $METHODS " == *" infill "* ]]; then scripts/experiments/teacher.sh; fi
mkdir -p "$data" "$out"
echo "lr: [5e-4, 2e-4]" >"$out/grid.yaml" # chosen on draw 10 of SST-2, which is not reported
pretrained "$SOCRATES"
socrates+=(--pretrained_parameters "$saved")
pretrained all-MiniLM-L6-v2
labeller=$saved

# wanted <task> <method> <rows>: whether METHODS and ROWS choose it.
wanted() {
    [[ " $METHODS " == *" $2 "* && ($1 != SST-2 || " $ROWS " == *" $3 "*) ]]
}

# prepare <task>: draws the sets, fine-tunes Timaeus and labels the draws' rows once. Sets `sets`,
# `timaeus`, and `flags`, those of Socrates' fits for both programs.
prepare() {
    local task=$1 draw draw_flags timaeus_flags max_len=128
    case $task in
        SST-2)
            draw_flags=(--draws 11 --train 2500 --test 1000 --timaeus_train 20000 --timaeus_dev 500)
            timaeus_flags=(--epochs 1)
            max_len=48
            ;;
        MRPC)
            draw_flags=(--draws $draws --train 1000 --test 700 --timaeus_train 1900 --timaeus_dev 200)
            timaeus_flags=(--epochs 5 --bias_correction)
            ;;
        RTE)
            draw_flags=(--draws $draws --train 750 --test 400 --timaeus_train 1200 --timaeus_dev 150)
            timaeus_flags=(--epochs 5 --bias_correction)
            ;;
        STS-B)
            draw_flags=(--draws $draws --train 1000 --test 1000 --timaeus_train 4000)
            draw_flags+=(--timaeus_dev 300)
            timaeus_flags=(--epochs 3 --bias_correction)
            ;;
    esac
    sets=$data/$task/sets timaeus=$data/$task/timaeus/$task
    once "$sets/draw-$((draws - 1))/glue/$task/test.tsv" "$python" scripts/draw_subset.py \
        --task_name "$task" --data_dir "$DATA_DIR" --output_dir "$sets" --dev 200 "${draw_flags[@]}"
    once "$timaeus/metrics.json" "$python" finetune_classifier.py --task_name "$task" \
        --data_dir "$sets/timaeus" --output_dir "${timaeus%/*}" --cache_dir "$data/encoded" \
        --pretrained_parameters "$labeller" --pooling mean --batch_size 32 --lr 1e-4 \
        --max_len $max_len --dtype auto --resume "${timaeus_flags[@]}"
    for ((draw = 0; draw < draws; draw++)); do # labels for all rows; those from 500 on are used
        once "$sets/draw-$draw/labels.tsv" "$python" scripts/predict.py --batch_size 100 \
            --model_parameters "$timaeus" --input "$sets/draw-$draw/glue/$task/train.tsv" \
            --output "$sets/draw-$draw/labels.tsv"
    done
    flags=(--task_name "$task" "${socrates[@]}" --epochs 8 --batch_size 32
        --dev_batch_size 100 --num_buckets 4 --max_len $max_len --cache_dir "$data/encoded")
    # On STS-B, BERT-tiny needs it as MiniLM-L3 does everywhere.
    if [[ $task == STS-B && $SOCRATES == bert-tiny ]]; then flags+=(--bias_correction); fi
}

# agora_run <task> <method> <rows> <draw> <flags...>: Agora on one draw.
agora_run() {
    local run=$out/$1/$3/$2/draw-$4
    once "$run/$1/agora.png" "$python" scripts/run_agora.py "${flags[@]}" \
        --output_dir "$run" --timaeus "$timaeus" --search_space "$out/grid.yaml" \
        --tau dropout,swap,crop,noise --images_per_mistake 2 "${@:5}"
}

# agora <task> <method> <rows> <flags...>: Agora on every draw, if it is wanted.
agora() {
    local draw
    wanted "$@" || return 0
    for ((draw = 0; draw < draws; draw++)); do
        agora_run "$1" "$2" "$3" "$draw" --data_dir "$sets/draw-$draw" --train_rows "$3" "${@:4}"
    done
}

# plain <task> <rows>: one fine-tuning run on every draw.
plain() {
    local draw run
    wanted "$1" plain "$2" || return 0
    for ((draw = 0; draw < draws; draw++)); do
        run=$out/$1/$2/plain/draw-$draw
        once "$run/$1/metrics.json" "$python" finetune_classifier.py "${flags[@]}" \
            --data_dir "$sets/draw-$draw" --train_rows "$2" --output_dir "$run" --lr 5e-4 \
            --ckpt_interval 10000 --resume
    done
}

# real <task> <rows>: the grid on the scarce rows with as many real ones, labelled by Timaeus, as
# the last fits of `mistakes` had augmented ones.
real() {
    local draw rows
    wanted "$1" real "$2" || return 0
    for ((draw = 0; draw < draws; draw++)); do
        rows=$out/$1/$2/real/sets-$draw
        once "$rows/glue/$1/train.tsv" "$python" scripts/experiments/label_real_rows.py \
            --task_name "$1" --data_dir "$sets/draw-$draw" \
            --labels "$sets/draw-$draw/labels.tsv" --rows "$2" --first_real 500 \
            --agora "$out/$1/$2/mistakes/draw-$draw" --output_dir "$rows"
        agora_run "$1" real "$2" "$draw" --data_dir "$rows" --max_rounds 1
    done
}

for task in $TASKS; do
    prepare "$task"
    tables=() sizes=500
    if [[ $task == SST-2 ]]; then sizes=$ROWS; fi
    for rows in $sizes; do
        agora "$task" mistakes "$rows"
        real "$task" "$rows"
        tables+=("$out/$task/$rows")
    done
    if [[ $task == SST-2 ]]; then
        # As many updates as the last fits of `mistakes` had, by the mean of RESULTS.md's draws.
        agora SST-2 longer 100 --epochs 19 --max_rounds 1
        agora SST-2 longer 200 --epochs 13 --max_rounds 1
        agora SST-2 replay 100 --replay 1
        agora SST-2 replay 200 --replay 1
        agora SST-2 random 200 --images_from random
        plain SST-2 200
        agora SST-2 infill 200 --tau infill --tau_model "$teacher"
        agora SST-2 eight 200 --images_per_mistake 8
    elif [[ $task == STS-B ]]; then
        agora STS-B longer 500 --epochs 13 --max_rounds 1
        agora STS-B replay 500 --replay 1
    fi
    keep "$out/$task/table.md" "$python" scripts/experiments/agora_table.py "${tables[@]}"
done
