# Sourced by the scripts that train, in the project's folder: runs programs, alone or on several
# workers, passes signals on to them and keeps their exit status.
# shellcheck shell=bash

# What supervise runs: its process id, `starting` or nothing; and who gets its signals.
child=
recipient=
# Number of the first signal that was passed on, and name of the last; empty before.
signal_received=
signal_name=
# For good: where SIGINT is ignored, as in a background job, `trap - INT` would let it kill the shell.
trap 'pass_on TERM 15' TERM
trap 'pass_on INT 2' INT
trap 'pass_on HUP 1' HUP

# supervise <recipient> <command...>: runs a command, waits for it and returns its exit status.
# SIGTERM, SIGINT and SIGHUP that reach this shell go to the recipient: `command`, `group` (all its
# processes) or a file with the process ids of its ranks. After a signal, no further command starts.
supervise() {
    local status=0
    [[ -z $signal_received ]] || exit $((128 + signal_received))
    recipient=$1
    shift
    child=starting
    # In a session of its own, the command gets a Ctrl-C once, from here, and not from the terminal,
    # too. Bash makes its background processes ignore SIGINT; the traps of the subshell undo that.
    (
        trap - INT QUIT TERM HUP
        exec setsid "$@"
    ) <&0 &
    child=$!
    [[ -z $signal_received ]] || deliver
    interrupted=yes
    # A trapped signal ends `wait` early.
    while [[ -n $interrupted ]]; do
        interrupted=
        status=0
        wait "$child" || status=$?
    done
    # Processes of a group may outlive the first one: they are about to end.
    while [[ $recipient == group && -n $signal_received ]] && kill -0 -- "-$child" 2>/dev/null; do
        sleep 0.1
    done
    child=
    return "$status"
}

# pass_on <signal> <number>: the traps.
pass_on() {
    interrupted=yes
    signal_received=${signal_received:-$2}
    signal_name=$1
    [[ -n $child ]] || exit $((128 + $2))
    [[ $child == starting ]] || deliver
}

# deliver: sends the signal to the recipient.
deliver() {
    local processes=("$child")
    # Of a terminal that was closed; programs save a checkpoint at SIGTERM.
    [[ $signal_name != HUP ]] || signal_name=TERM
    if [[ $recipient == group ]]; then
        processes=("-$child")
    elif [[ $recipient != command && -s $recipient ]]; then
        # From horovodrun, the ranks would have 5 seconds to save a checkpoint before it kills them.
        signal_name=TERM
        mapfile -t processes <"$recipient"
    fi
    kill -s "$signal_name" -- "${processes[@]}" 2>/dev/null ||
        kill -s "$signal_name" "$child" 2>/dev/null || true
}

# through <filter> <command...>: runs a command with stdout and stderr piped through a filter that
# no signal stops; returns the exit status of the command after the filter has written everything.
through() {
    local filter=$1 status=0 output filter_pid
    shift
    exec {output}> >(
        trap '' TERM INT HUP
        "$filter"
    )
    filter_pid=$!
    "$@" >&"$output" 2>&1 || status=$?
    exec {output}>&-
    wait "$filter_pid" 2>/dev/null || true
    return "$status"
}

# Horovod marks each line with its rank; only rank 0 prints, unless something fails. Then it adds a
# traceback of its own to what the rank says.
without_rank_0_mark() {
    sed -u '/^Traceback (most recent call last):$/{
            :more
            N
            /\n[^ \n][^\n]*$/!b more
            /\nRuntimeError: Horovod detected/d
        }
        /^Process name: /d
        /^Exit code: /d
        s/^\[0\]<std\(out\|err\)>: \{0,1\}//'
}

# launch <workers> <program> <program for horovodrun> <flags...>: one process, or one per worker.
# HOROVODRUN_FLAGS holds flags of horovodrun, such as --timeline-filename or --fusion-threshold-mb.
launch() {
    local workers=$1 alone=$2 together=$3 gpus=() ranks status=0
    shift 3
    # Set-up may choose the CPU on a machine with a GPU that MXNet cannot use.
    if [[ $(cat .venv/made-for 2>/dev/null) != *" cpu" ]] && nvidia-smi -L >/dev/null 2>&1; then
        gpus=(--gpus "$(seq -s, 0 $((workers - 1)))")
    fi
    if ((workers == 1)); then
        supervise command .venv/bin/python "$alone" "${gpus[@]}" "$@"
    else
        ranks=$(mktemp)
        # shellcheck disable=SC2016,SC2086  # a rank's $$; HOROVODRUN_FLAGS holds several words
        PATH="$PWD/.venv/bin:$PATH" through without_rank_0_mark supervise "$ranks" \
            horovodrun -np "$workers" -H "localhost:$workers" ${HOROVODRUN_FLAGS:-} \
            bash -c 'echo $$ >>"$0" && exec python -u "$@"' "$ranks" \
            "$together" "${gpus[@]}" "$@" || status=$?
        rm -f "$ranks"
        # horovodrun exits with 1, whatever the status of the ranks.
        if ((status)) && [[ -n $signal_received ]]; then
            status=$((128 + signal_received))
        fi
        return "$status"
    fi
}

# start_folder <folder>: makes a folder empty, unless a run that began with it is still active. The
# lock is a file beside it that this shell and all programs it starts hold open.
start_folder() {
    local lock status=0
    mkdir -p "$(dirname "$1")"
    exec {lock}>"$(dirname "$1")/.$(basename "$1").lock"
    flock --nonblock --conflict-exit-code 9 "$lock" || status=$? # any other: there are no locks
    if ((status == 9)); then
        echo "error: $1: another run of this script is writing there; wait for its end" >&2
        exit 1
    fi
    rm -rf "${1:?}"
    mkdir "$1"
}

# flag_value <flag> <flags...>: prints the last value that a flag has among others, if any. Flags may
# be abbreviated, as the programs take them; they refuse what could be several flags.
flag_value() {
    local flag=$1 name value=
    shift
    while (($#)); do
        name=${1%%=*}
        if [[ $name == --?* && $flag == "$name"* ]]; then
            case $1 in
                *=*) value=${1#*=} ;;
                *) value=${2:-} ;;
            esac
        fi
        shift
    done
    printf '%s' "$value"
}

# refuse_variables <names...>: environment variables that earlier versions of the scripts read. To
# ignore them in silence would train with other settings than the caller expects.
refuse_variables() {
    local name flag
    for name; do
        flag=--${name,,}
        case $name in
            EXTRA_FLAGS) flag="these flags" ;;
            TEMPERATURE) flag=--distillation_temperature ;;
        esac
        if [[ -n ${!name:-} ]]; then
            echo "error: the environment variable $name is no longer read: unset it and give" \
                "$flag at the end of the command" >&2
            exit 2
        fi
    done
}

# refuse_config <flags...>: the defaults of a script are flags, which override those of the file.
refuse_config() {
    local flag
    for flag; do
        [[ $flag == --con* ]] || continue # flags may be abbreviated
        echo "error: --config: the defaults of this script would override the file; give it to the" \
            "Python program itself" >&2
        exit 2
    done
}
