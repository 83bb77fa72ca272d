#!/usr/bin/env bash
# Sets up, then runs lint, type check, and all tests but the slow ones and those for GPUs.
#
#   ./scripts/run_tests.sh [arguments for pytest ...]      e.g. -k tokenization, --durations=10
#
# All of them run even when one fails; the exit status is that of the worst.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
chosen=$#
worst=0

# check <what> <command...>
check() {
    local what=$1 status=0
    shift
    printf '\n== %s\n' "$what"
    "$@" || status=$?
    # Chosen tests need not be of both kinds: pytest's 5, for none found, is no failure then.
    if ((status > worst && !(status == 5 && chosen > 0))); then
        worst=$status
    fi
}

./scripts/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"

check "lint" ruff check .
check "format" ruff format --check .
check "types" mypy
check "quick and integration tests" \
    python -m pytest "$@" -m "not (slow or distributed or cluster or gpu)"
check "two-process and cluster tests" \
    python -m pytest -n 2 "$@" -m "(distributed or cluster) and not slow"
exit "$worst"
