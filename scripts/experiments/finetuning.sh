#!/usr/bin/env bash
# Fine-tunes small pretrained BERTs, and networks of the same shapes from random weights, on tasks of
# GLUE and SuperGLUE and on RACE-M, with three seeds, and prints the table of the dev scores.
#
#   DATA_DIR=FOLDER ./scripts/experiments/finetuning.sh
#
# DATA_DIR has the official files, as described in data/README.md. All of it takes an estimated two
# days of one core, mostly for MiniLM on RACE-M. These variables choose a part; the table has every
# run that has finished:
#   MODELS  of bert-tiny, paraphrase-MiniLM-L3-v2, all-MiniLM-L6-v2, and each with -random, for
#           random weights, or with -corrected, for --bias_correction, -float32 or -bfloat16, for
#           the type of products, or both in this order (default: as they are, and -random)
#   TASKS   of the names below
#   SEEDS   default 1,2,3; seed 0 is left out of the table: it chose the rates, with
#           SEEDS=0 RATES=1e-4,3e-4,1e-3 TASKS="MRPC CoLA"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need DATA_DIR "the folder of the official files of the tasks"

models="bert-tiny paraphrase-MiniLM-L3-v2 all-MiniLM-L6-v2"
MODELS=${MODELS:-$models $(printf '%s-random ' $models)}
TASKS=${TASKS:-MRPC STS-B CoLA RTE CB COPA WSC SST-2 BoolQ RACE-M}
one_of MODELS $(for one in $models; do echo "$one"{-random,{,-corrected}{,-float32,-bfloat16}}; done)
one_of TASKS MRPC STS-B CoLA RTE CB COPA WSC SST-2 BoolQ RACE-M
runs=$EXPERIMENTS/finetuning

# flags_of <task>: sets `flags` to those that all models share.
flags_of() {
    flags=(--batch_size 32 --num_buckets 6 --log_interval 50)
    case $1 in
        MRPC | STS-B | RTE) flags+=(--epochs 3 --max_len 128) ;;
        CoLA) flags+=(--epochs 3 --max_len 64) ;;
        CB) flags+=(--epochs 6 --max_len 128 --batch_size 16) ;;
        COPA) flags+=(--epochs 5 --max_len 64 --batch_size 16) ;;
        WSC) flags+=(--epochs 5 --max_len 128 --batch_size 16) ;;
        SST-2) flags+=(--epochs 1 --max_len 64 --batch_size 64) ;;
        BoolQ) flags+=(--epochs 1 --max_len 256) ;;
        RACE-M) flags+=(--epochs 1 --max_len 256 --batch_size 8) ;;
    esac
}

# start_of <model>: sets `start` to the flags of its initial weights and `rate` to its rate.
start_of() {
    local name shape
    name=$(sed -E 's/(-(random|corrected|float32|bfloat16))+$//' <<<"$1")
    pretrained "$name"
    start=(--pretrained_parameters "$saved")
    if [[ $1 == *-random ]]; then
        shape=$(basename "$saved"/*.params .params)
        start=(--model_name "$shape" --vocab_file "$saved/tokenizer/tokenizer.json")
    fi
    rate=1e-4
    case $1 in
        bert-tiny*) rate=3e-4 ;;
        *) start+=(--pooling mean --dtype auto) ;; # the mean, as sentence models were trained with
    esac
    if [[ $1 == *-float32 ]]; then start+=(--dtype float32); fi
    if [[ $1 == *-bfloat16 ]]; then start+=(--dtype bfloat16); fi
    if [[ $1 == *-corrected* ]]; then start+=(--bias_correction); fi
}

for task in $TASKS; do
    for model in $MODELS; do
        flags_of "$task"
        start_of "$model"
        # With 1e-4 this network, the deepest, had not left the loss of chance after 769 updates.
        if [[ $task == RACE-M && $model == all-MiniLM-L6-v2* ]]; then rate=3e-5; fi
        mkdir -p "$runs/$model"
        printf 'seed: [%s]\nlr: [%s]\n' "${SEEDS:-1,2,3}" "${RATES:-$rate}" >"$runs/$model/grid.yaml"
        "$python" scripts/sweep.py --task_name "$task" --data_dir "$DATA_DIR" \
            --grid "$runs/$model/grid.yaml" --output_dir "$runs/$model" \
            --cache_dir "$runs/encoded" "${flags[@]}" "${start[@]}"
    done
done
"$python" scripts/experiments/finetuning_table.py "$runs"
