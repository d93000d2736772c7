#!/usr/bin/env bash
# Proves that the emulator and the sanitizers find mistakes in kernels: each bug of cuda/tests/planted/bugs.cpp must be
# caught by the tools named here, in one of two schedules, and the program without bugs must pass everywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
out=target/planted
mkdir -p "$out"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 TSAN_OPTIONS=exitcode=66
declare -A flags=([plain]=-O2 [asan]="-O1 -fsanitize=address,undefined" [tsan]="-O1 -fsanitize=thread")
failed=0
passed=0

# check BUG TOOL yes|no: is it caught?
check() {
    local bug=$1 tool=$2 expected=$3 program=$out/$1.$2 caught=no seed
    # shellcheck disable=SC2086
    g++ -std=c++17 -g -w ${flags[$tool]} -DBUG_"$bug" -x c++ cuda/tests/planted/bugs.cpp cuda/emulate/simt.cpp -o "$program"
    for seed in 0 1; do "$program" $seed > "$program.log" 2>&1 || caught=yes; done
    if [ "$caught" = "$expected" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf '%-12s %-6s caught: %-4s expected: %s\n' "$bug" "$tool" "$caught" "$expected"
}
for tool in plain asan tsan; do check NONE $tool no; done
check NO_SYNC tsan yes      # no __syncthreads between a load and its use by another warp
check NO_SYNCWARP tsan yes  # no __syncwarp between a write and a read of another lane
check NO_WAIT tsan yes      # one cp.async group is left in flight
check OOB asan yes          # a write behind the block's dynamic shared memory
check ONE_LANE plain yes    # a shuffle that not all lanes reach
check NO_PROXY tsan yes     # no fence.proxy.async between stores and the wgmma that reads them
check NO_FENCE plain yes    # no wgmma.fence
check EARLY plain yes       # operands of a wgmma overwritten before it is waited for
check NO_ARRIVAL plain yes  # results of a wgmma read before it is waited for
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
