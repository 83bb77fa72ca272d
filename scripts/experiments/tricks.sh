#!/usr/bin/env bash
# What int8, OpenVINO and bfloat16 cost on networks that were really pretrained: the best network of
# finetuning.sh on each task in every runtime of predict.py, and fine-tuning in bfloat16 against
# float32 with three seeds. Prints both tables.
#
#   DATA_DIR=FOLDER ./scripts/experiments/tricks.sh
#
# What finetuning.sh has not trained yet is trained first. These variables choose a part:
#   MODELS  default bert-tiny all-MiniLM-L6-v2
#   TASKS   default SST-2 MRPC STS-B
#   LOW     task of the comparison of types (default STS-B)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need DATA_DIR "the folder of the official files of the tasks"

export MODELS=${MODELS:-bert-tiny all-MiniLM-L6-v2} TASKS=${TASKS:-SST-2 MRPC STS-B}
LOW=${LOW:-STS-B}
one_of LOW MRPC STS-B CoLA RTE CB COPA WSC SST-2 BoolQ RACE-M
runs=$EXPERIMENTS/finetuning

scripts/experiments/finetuning.sh >&2 # also what an interruption has left of a sweep
for model in $MODELS; do
    for task in $TASKS; do
        best=$("$python" scripts/experiments/tricks_table.py --best "$runs/$model/$task-sweep")
        once "$(dirname "$best")/int8/best.json" \
            "$python" scripts/quantize.py "$best" --data_dir "$DATA_DIR"
    done
done
MODELS="bert-tiny bert-tiny-bfloat16" TASKS=$LOW scripts/experiments/finetuning.sh
"$python" scripts/experiments/tricks_table.py "$runs"
