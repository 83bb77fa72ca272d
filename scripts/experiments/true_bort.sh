#!/usr/bin/env bash
# Pretrains the shape of Bort itself, for as long as this machine is given.
#
#   TEXT=textbooks.txt,wikipedia.txt,books.txt DATA_DIR=glue ./scripts/experiments/true_bort.sh
#
# bort_4_8_768_1024 is distilled on the text of teacher.sh with the specification's weights, from
# the teacher run in each step. With 5e-4 after 50 steps of warmup, dropout and batches of 16 it did
# not leave the plateau of word frequencies; with what is set below it does. It can be stopped at any
# time: the same command resumes from the last checkpoint, at most 200 updates back. At the end of
# BORT_STEPS it, and random weights, are fine-tuned on SST-2 and MRPC, and it is converted for
# Hugging Face with a card that says how little text it has seen. A larger BORT_STEPS resumes from
# there.
# Results, in $EXPERIMENTS/true_bort: model, huggingface-STEPS, tasks, and the tables on standard
# output.
# Besides the variables of common.sh and teacher.sh:
#   DTYPE, TEACHER_DTYPE   types of the products (default auto and float32)
#   BORT_STEPS   updates of 8 sequences (default 4000: two hours of one core)
#   ROWS         rows of each task to train on, for one epoch (default 500; the table has all
#                that were run)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need TEXT "files of English prose, separated by commas"
need DATA_DIR "the folder of the official files of the tasks"
TEACHER_DTYPE=${TEACHER_DTYPE:-float32}
one_of TEACHER_DTYPE float32 bfloat16
number BORT_STEPS
number ROWS
scripts/experiments/teacher.sh
folder=$EXPERIMENTS/true_bort teacher=$EXPERIMENTS/teacher shape=bort_4_8_768_1024
steps=${BORT_STEPS:-4000} rows=${ROWS:-500} dtype=${DTYPE:-auto} tokenizer=$teacher/train/tokenizer/tokenizer.json

begun_with "$folder" "TEACHER_STEPS=${TEACHER_STEPS:-3000}"
pretrain "$folder/model" "$steps" --data "$teacher/train" --data_eval "$teacher/test" \
    --student_model $shape --teacher_model bort_6_12_1536_384 --teacher_ckpt_dir "$teacher/model" \
    --teacher_dtype "$TEACHER_DTYPE" --dynamic_masking --dtype "$dtype" --dropout 0 --batch_size 8 \
    --lr 2.5e-4 --warmup_ratio 0.2 --seed 0 --eval_interval $(((steps + 5) / 6)) --ckpt_interval 200
for seed in 1 2 3; do
    for task in SST-2 MRPC; do
        for start in "step-$steps" random; do
            weights=(--model_name $shape --vocab_file "$tokenizer")
            [[ $start == random ]] || weights=(--pretrained_parameters "$folder/model")
            run=$folder/tasks/$start-rows-$rows/$seed
            once "$run/$task/metrics.json" "$python" finetune_classifier.py --task_name $task \
                --data_dir "$DATA_DIR" --train_rows "$rows" --epochs 1 --batch_size 16 \
                --max_len 64 --lr 1e-4 --dtype "$dtype" --seed $seed --resume \
                --cache_dir "$folder/encoded" --output_dir "$run" "${weights[@]}"
        done
    done
done
once "$folder/huggingface-$steps" "$python" scripts/convert_to_huggingface.py "$folder/model" \
    --output "$folder/huggingface-$steps"
"$python" scripts/experiments/true_bort.py "$folder"
