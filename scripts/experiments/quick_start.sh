#!/usr/bin/env bash
# Trains real pretrained weights for a minute and shows what changes, in numbers and in words.
#
#   ./scripts/experiments/quick_start.sh
#
# The weights are those of BERT-tiny, which a fine-tuning for search has spoilt as a masked LM; the
# text is the language reference that every Python carries (pydoc_data/topics.py, 0.4 MB). Every
# 5th topic is held out. The words for five masks are printed before and after, then held-out loss
# and accuracy. The result is in $EXPERIMENTS/quick_start. Besides the variables of common.sh:
#   QUICK_STEPS   updates of 16 sequences (default 300)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
number QUICK_STEPS
folder=$EXPERIMENTS/quick_start
pretrained bert-tiny
mkdir -p "$folder"
once "$folder/test.txt" "$python" scripts/experiments/python_reference.py "$folder"
for part in train test; do
    shards "$folder/$part.txt" "$folder/$part"
done

# fill <model>: prints the three most probable words for each mask, with their probabilities.
fill() {
    "$python" scripts/predict.py --fill_mask --model_parameters "$1" <<'MASKS' | cut -f 1-6
The statement raises an [MASK] when the name is not defined.
The body of the [MASK] is executed when it is called.
If the file cannot be [MASK], an error is raised.
A list is a [MASK] of objects.
The method returns the [MASK] of the object.
MASKS
}
pretrain "$folder/model" "${QUICK_STEPS:-300}" --data "$folder/train" --data_eval "$folder/test" \
    --student_model bort_2_2_512_128 --student_parameters "$saved" --mlm_weight 1 \
    --dynamic_masking --lr 1e-3 --warmup_ratio 0.1 --seed 0 --eval_interval 100
echo "== five masks, before"
fill "$saved"
echo "== and after"
fill "$folder/model"
