#!/usr/bin/env bash
# Does Agora help when the labeller is competent and data are scarce?
#
#   TEXT=textbooks.txt,wikipedia.txt,books.txt DATA_DIR=glue ./scripts/experiments/agora.sh
#
# Socrates is BERT-tiny on 100, 200 and 500 rows of SST-2, five draws of each. Timaeus is MiniLM-L6,
# fine-tuned on rows that no draw contains. Methods, some of them on 200 rows only:
#   mistakes   Agora: two augmented examples per mistake, by the four cheap tau-functions
#   random     the same number of examples from random rows of dev
#   infill     tau is the masked LM of teacher.sh
#   eight      eight augmented examples per mistake
#   real       the grid on as many real rows as `mistakes` has augmented ones, labelled by Timaeus
#   longer     the grid on the scarce rows, with as many updates as the last fits of `mistakes`
#   plain      one fine-tuning run
# Results, in $EXPERIMENTS/agora: the drawn sets, the runs, and table.md. An interrupted experiment
# resumes. Besides the variables of common.sh: OMP_NUM_THREADS (default 1).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need TEXT "files of English prose, separated by commas"
need DATA_DIR "the folder of the official files of SST-2"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
scripts/experiments/teacher.sh
out=$EXPERIMENTS/agora teacher=$EXPERIMENTS/teacher/model draws=5
mkdir -p "$out"
printf 'lr: [5e-4, 2e-4]\n' >"$out/grid.yaml" # chosen on draw 10 of SST-2, which is not reported
pretrained bert-tiny
socrates=$saved
pretrained all-MiniLM-L6-v2
labeller=$saved

sets=$out/SST-2/sets timaeus=$out/SST-2/timaeus/SST-2
once "$sets/draw-10/glue/SST-2/test.tsv" "$python" scripts/draw_subset.py --task_name SST-2 \
    --data_dir "$DATA_DIR" --output_dir "$sets" --draws 11 --train 2500 --dev 200 --test 1000 \
    --timaeus_train 20000 --timaeus_dev 500
once "$timaeus/metrics.json" "$python" finetune_classifier.py --task_name SST-2 \
    --data_dir "$sets/timaeus" --output_dir "${timaeus%/*}" --cache_dir "$out/encoded" \
    --pretrained_parameters "$labeller" --pooling mean --batch_size 32 --lr 1e-4 --epochs 1 \
    --max_len 48 --dtype bfloat16 --resume
for ((draw = 0; draw < draws; draw++)); do # labels for all rows; those from 500 on are used
    once "$sets/draw-$draw/labels.tsv" "$python" scripts/predict.py --batch_size 100 \
        --model_parameters "$timaeus" --input "$sets/draw-$draw/glue/SST-2/train.tsv" \
        --output "$sets/draw-$draw/labels.tsv"
done

# The flags of Socrates' fits, for both programs.
flags=(--task_name SST-2 --pretrained_parameters "$socrates" --epochs 8 --batch_size 32
    --dev_batch_size 100 --num_buckets 4 --max_len 48 --cache_dir "$out/encoded")

# agora_run <method> <rows> <draw> <flags...>: Agora on one draw.
agora_run() {
    local run=$out/SST-2/$2/$1/draw-$3
    once "$run/SST-2/agora.png" "$python" scripts/run_agora.py "${flags[@]}" \
        --output_dir "$run" --timaeus "$timaeus" --search_space "$out/grid.yaml" \
        --tau dropout,swap,crop,noise --images_per_mistake 2 "${@:4}"
}

# agora <method> <rows> <flags...>: Agora on every draw.
agora() {
    local draw
    for ((draw = 0; draw < draws; draw++)); do
        agora_run "$1" "$2" "$draw" --data_dir "$sets/draw-$draw" --train_rows "$2" "${@:3}"
    done
}

# plain <rows>: one fine-tuning run on every draw.
plain() {
    local draw run
    for ((draw = 0; draw < draws; draw++)); do
        run=$out/SST-2/$1/plain/draw-$draw
        once "$run/SST-2/metrics.json" "$python" finetune_classifier.py "${flags[@]}" \
            --data_dir "$sets/draw-$draw" --train_rows "$1" --output_dir "$run" --lr 5e-4 \
            --ckpt_interval 10000 --resume
    done
}

# real <rows>: the grid on the scarce rows with as many real ones, labelled by Timaeus, as the last
# fits of `mistakes` had augmented ones.
real() {
    local draw data
    for ((draw = 0; draw < draws; draw++)); do
        data=$out/SST-2/$1/real/sets-$draw
        once "$data/glue/SST-2/train.tsv" "$python" scripts/experiments/label_real_rows.py \
            --task_name SST-2 --data_dir "$sets/draw-$draw" \
            --labels "$sets/draw-$draw/labels.tsv" --rows "$1" --first_real 500 \
            --agora "$out/SST-2/$1/mistakes/draw-$draw" --output_dir "$data"
        agora_run real "$1" "$draw" --data_dir "$data" --max_rounds 1
    done
}

for rows in 100 200 500; do
    agora mistakes "$rows"
    real "$rows"
done
agora longer 100 --epochs 19 --max_rounds 1
agora longer 200 --epochs 13 --max_rounds 1
agora random 200 --images_from random
plain 200
agora infill 200 --tau infill --tau_model "$teacher"
agora eight 200 --images_per_mistake 8
"$python" scripts/experiments/agora_table.py "$out"/SST-2/{100,200,500} | tee "$out/table.md"
