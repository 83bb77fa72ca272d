# Sourced by the scripts that train, in the project's folder: starts a program on several workers.
# HOROVODRUN_FLAGS holds flags of horovodrun, such as --timeline-filename or --fusion-threshold-mb.
# shellcheck shell=bash

# Horovod marks each line with its rank; only rank 0 prints, unless something fails.
without_rank_0_mark() { sed -u 's/^\[0\]<std\(out\|err\)>: \{0,1\}//'; }

# launch <workers> <program> <program for horovodrun> <flags...>: one process, or one per worker.
launch() {
    local workers=$1 alone=$2 together=$3 gpus=()
    shift 3
    # The set-up may have chosen the CPU on a machine with a GPU that MXNet cannot use.
    if [[ $(<.venv/made-for) != *" cpu" ]] && nvidia-smi -L >/dev/null 2>&1; then
        gpus=(--gpus "$(seq -s, 0 $((workers - 1)))")
    fi
    if ((workers == 1)); then
        .venv/bin/python "$alone" "$@" "${gpus[@]}"
    else
        # shellcheck disable=SC2086  # HOROVODRUN_FLAGS holds several words
        PATH="$PWD/.venv/bin:$PATH" horovodrun -np "$workers" -H "localhost:$workers" \
            ${HOROVODRUN_FLAGS:-} python -u "$together" "$@" "${gpus[@]}" 2>&1 |
            without_rank_0_mark
    fi
}
