#!/usr/bin/env bash
# Trains a masked-LM head on all-MiniLM-L6-v2, which has none, with the network below it.
#
#   TEXT=textbooks.txt,wikipedia.txt,books.txt ./scripts/experiments/teacher.sh
#
# Of every 50th document of TEXT the first 40 lines are held out; the rest of that document is not
# used. The result is the teacher of distillation.sh and true_bort.sh:
#   $EXPERIMENTS/teacher/train, test   shards with the model's WordPiece, 128 tokens at most
#   $EXPERIMENTS/teacher/model         the run; its held-out loss is that of the last eval line
# An interrupted run resumes. Besides the variables of common.sh:
#   TEACHER_STEPS   updates of 16 sequences (default 3000: 35 minutes of one core)
#   DTYPE           type of the products (default auto)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need TEXT "files of English prose, separated by commas"
folder=$EXPERIMENTS/teacher
DTYPE=${DTYPE:-auto}
number TEACHER_STEPS
one_of DTYPE auto float32 bfloat16
steps=${TEACHER_STEPS:-3000}
pretrained all-MiniLM-L6-v2

hold_out() {
    mkdir -p "$folder"
    IFS=, read -ra files <<<"$TEXT"
    rm -f "$folder/test.part"
    awk -v train="$folder/train.part" -v heldout="$folder/test.part" '
        BEGIN { RS = ""; FS = "\n"; ORS = "\n\n" }
        NR % 50 { print > train; next }
        {
            text = $1
            for (line = 2; line <= NF && line <= 40; line++) text = text "\n" $line
            print text > heldout
        }' "${files[@]}"
    if [[ ! -e $folder/test.part ]]; then
        echo "error: TEXT: has fewer than 50 documents, so that none is held out" >&2
        exit 2
    fi
    mv "$folder/train.part" "$folder/train.txt"
    mv "$folder/test.part" "$folder/test.txt"
}

once "$folder/test.txt" hold_out
begun_with "$folder" "TEXT=$TEXT"
for part in train test; do
    shards "$folder/$part.txt" "$folder/$part"
done
pretrain "$folder/model" "$steps" --data "$folder/train" --data_eval "$folder/test" \
    --student_model bort_6_12_1536_384 --student_parameters "$saved" --mlm_weight 1 \
    --dynamic_masking --dtype "$DTYPE" --lr 5e-4 --warmup_ratio 0.05 --seed 0 \
    --eval_interval 400 --ckpt_interval 200
