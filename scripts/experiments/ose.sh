#!/usr/bin/env bash
# Searches eight small shapes with OSE. T is MiniLM-L6 as a masked LM, cut to 4,096 word pieces.
#
#   TEXT=textbooks.txt,wikipedia.txt,books.txt ./scripts/experiments/ose.sh
#
# T comes from teacher.sh, which is run first. Candidates and held-out loss see sequences of 16
# tokens of every 40th document of its text and of every fourth of its held-out documents: so short
# a context lets small shapes leave the plateau of word frequencies within 200 updates of 32
# sequences. The searches have a grid of two learning rates: those of five with the lowest mean
# divergences on a seed that is not reported. A longer run has that of its shape in the first search.
#   $EXPERIMENTS/ose/search-200, search-1000   the searches, three seeds each
#   $EXPERIMENTS/ose/theory                    200 updates in theory mode, at three learning rates
#   $EXPERIMENTS/ose/pretrained                the winner of 200 updates and the three others of its
#                                              size, trained for 2,000
#   $EXPERIMENTS/ose/tables.md                 all tables
# An interrupted search or run resumes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need TEXT "files of English prose, separated by commas"
scripts/experiments/teacher.sh
folder=$EXPERIMENTS/ose
tables=scripts/experiments/ose_tables.py
top=bort_6_12_1536_384
rates=(5e-4 1e-3 2e-3 5e-3 1e-2)
begun_with "$folder" "TEACHER_STEPS=${TEACHER_STEPS:-3000}"

documents() { # <text> <every> <result>
    awk -v every="$2" 'BEGIN { RS = ""; ORS = "\n\n" } NR % every == 1' "$1" >"$3.part"
    mv "$3.part" "$3"
}

short_shards() { # <name>
    once "$folder/$1/manifest.json" "$python" create_pretraining_data.py \
        --input_file "$folder/$1.txt" --output_dir "$folder/$1" \
        --vocab_file "$folder/T/tokenizer/tokenizer.json" --max_seq_length 16 --num_workers 1
}

outputs() {
    "$python" scripts/build_teacher_cache.py --data "$folder/train,$folder/test" \
        --output_dir "$folder/cache" --teacher_model "$top" --teacher_ckpt_dir "$folder/T" \
        --batch_size 128
    touch "$folder/cache.done"
}

search() { # <folder> <flags...>
    "$python" scripts/run_ose.py --maximum_point "$top" \
        --teacher_cache "$folder/cache" --data "$folder/train" --data_eval "$folder/test" \
        --sequence_length 16 --batch_size 32 --dropout 0 --workers 1 --output_dir "$@"
}

once "$folder/train.txt" documents "$EXPERIMENTS/teacher/train.txt" 40 "$folder/train.txt"
once "$folder/test.txt" documents "$EXPERIMENTS/teacher/test.txt" 4 "$folder/test.txt"
once "$folder/T" "$python" scripts/experiments/reduce_vocabulary.py \
    "$EXPERIMENTS/teacher/model" --text "$folder/train.txt" --output "$folder/T"
short_shards train
short_shards test
once "$folder/cache.done" outputs
cat >"$folder/space.yaml" <<'SPACE'
# In each line the shapes have the same size within 1 %, and differ in depth.
architectures: [
  bort_1_4_320_32, bort_2_4_128_32, bort_3_4_64_32, bort_4_4_32_32,
  bort_1_4_640_64, bort_2_4_256_64, bort_3_4_128_64, bort_4_4_64_64]
SPACE
cat >"$folder/rates.yaml" <<'SPACE'
architectures: [bort_2_4_128_32, bort_4_4_32_32, bort_2_4_256_64, bort_4_4_64_64]
SPACE
once "$folder/rates/ose.json" search "$folder/rates" --space "$folder/rates.yaml" --steps 200 \
    --loss divergence --seed 100 --grid "lr=$(IFS=,; echo "${rates[*]}")"
grid=$("$python" "$tables" "$folder" --best "${rates[@]}")
for steps in 200 1000; do
    once "$folder/search-$steps/ose.json" search "$folder/search-$steps" \
        --space "$folder/space.yaml" --steps "$steps" --loss divergence --repeats 3 \
        --grid "lr=$grid" --compare_strides 1,2,4
done
once "$folder/theory/ose.json" search "$folder/theory" --space "$folder/space.yaml" \
    --steps 200 --loss divergence --mode theory --grid lr=0.5,1,2
"$python" "$tables" --winners "$folder" | while read -r shape rate; do
    for seed in 1 2 3; do
        run=$folder/pretrained/$shape-$seed
        once "$run/step-0002000" "$python" run_pretraining_distillation.py --resume \
            --ckpt_dir "$run" --student_model "$shape" --seed "$seed" --num_steps 2000 \
            --data "$folder/train" --data_eval "$folder/test" --teacher_cache "$folder/cache" \
            --mlm_weight 0 --teacher_ce_weight 1 --distillation_temperature 1 --lr "$rate" \
            --warmup_ratio 0.1 --dropout 0 --batch_size 32 --batch_size_eval 64 --num_buckets 2 \
            --eval_interval 500 --ckpt_interval 500 --keep_checkpoints 1
    done
done
keep "$folder/tables.md" "$python" "$tables" "$folder"
