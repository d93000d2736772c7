#!/usr/bin/env bash
# Kernel tests without cargo: scripts/kernels.sh MODE [FILTER] [SEED]...
#   plain   emulated, optimised            asan   emulated, AddressSanitizer and UBSan
#   tsan    emulated, ThreadSanitizer      nvcc   for a real GPU (needs nvcc; NVCC_ARCH, default 90a)
# KERNELS="softmax norm" limits the build to these families (cuda/<family>*.cu and cuda/tests/<family>*.cpp).
# LIBRARY=FILE takes the kernels from this library instead of compiling them.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:?plain, asan, tsan or nvcc}
shift
out=${SMALTI_KERNEL_TESTS:-target/kernel-tests}/$mode
mkdir -p "$out"

case $mode in
    plain) compile=(g++ -O2) ;;
    asan) compile=(g++ -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer) ;;
    tsan) compile=(g++ -O1 -fsanitize=thread) ;;
    nvcc) compile=("${NVCC:-nvcc}" -O3 -lineinfo -Xfatbin=-compress-all "-gencode=arch=compute_${NVCC_ARCH:-90a},code=sm_${NVCC_ARCH:-90a}") ;;
    *) echo "unknown mode $mode" >&2; exit 2 ;;
esac
hopper=yes
if [ "$mode" = nvcc ] && [ "${NVCC_ARCH:-90a}" != 90a ]; then
    hopper=
    compile+=(-DSMALTI_NO_SM90)
fi
language=(-x c++ -g -Wall -Wextra -Wno-unknown-pragmas)
[ "$mode" = nvcc ] && language=(-x cu)

sources=(cuda/status.cu cuda/tests/main.cpp)
[ "$mode" = nvcc ] || sources+=(cuda/emulate/simt.cpp)
if [ -n "${KERNELS:-}" ]; then
    for family in $KERNELS; do
        for f in cuda/"$family"*.cu cuda/"$family"/{,sm90/}*.cu cuda/tests/"$family"*.cpp; do [ -f "$f" ] && sources+=("$f"); done
    done
else
    if [ -n "${LIBRARY:-}" ]; then
        sources=(cuda/tests/main.cpp)
    else
        while read -r f; do sources+=("$f"); done < <(find cuda -name '*.cu' ! -name status.cu | sort)
    fi
    for f in cuda/tests/*.cpp; do [ "$f" = cuda/tests/main.cpp ] || sources+=("$f"); done
fi

# Files in folders sm90 are for Hopper alone.
if [ -z "$hopper" ]; then
    for i in "${!sources[@]}"; do [[ ${sources[i]} != */sm90/* ]] || unset "sources[i]"; done
fi

# Recompile what is older than its source or any header; two compilers at a time.
newest=$(find cuda -name '*.cuh' -o -name '*.hpp' -o -name '*.h' | xargs ls -t | head -1)
objects=()
jobs=()
for source in "${sources[@]}"; do
    object=$out/$(echo "$source" | tr '/.' '__').o
    objects+=("$object")
    if [ ! "$object" -nt "$source" ] || [ ! "$object" -nt "$newest" ]; then jobs+=("$source" "$object"); fi
done
for ((i = 0; i < ${#jobs[@]}; i += 2)); do
    "${compile[@]}" -std=c++17 "${language[@]}" -c "${jobs[i]}" -o "${jobs[i + 1]}" &
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
done
while [ "$(jobs -rp | wc -l)" -gt 0 ]; do wait -n; done
link=()
if [ "$mode" = nvcc ]; then
    home=$(dirname "$(dirname "$(command -v "${compile[0]}")")")
    for lib in "$home/lib" "$home/lib64"; do [ -d "$lib" ] && link+=("-L$lib"); done
fi
"${compile[@]}" -o "$out/kernel_tests" "${objects[@]}" ${LIBRARY:+"$LIBRARY"} ${link[@]+"${link[@]}"}
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0:detect_stack_use_after_return=0}
export TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=0:exitcode=66}
[ "$mode" = nvcc ] && [ -z "${RUN:-}" ] && exit 0
exec "$out/kernel_tests" "$@"
