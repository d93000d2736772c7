#!/usr/bin/env bash
# Tests and benchmarks on a GPU machine that has Python with PyTorch but no cargo.
#   scripts/gpu.sh stage             here: builds everything into target/gpu (at most 60 MiB). nvcc comes from pip if
#                                    there is none. SMALTI_CUDA_ARCH (default 90a) names the GPU's architecture.
#   scripts/gpu.sh run [PART]...     there, in a copy of the tree with target/gpu: the parts `tests`, `wgmma` (the tests
#                                    again, with the kernels for Hopper's warpgroup instructions), `sanitize` and `bench`
#                                    (default: all; each takes under 10 minutes). Results go to
#                                    ${OUT:-target/gpu-results}: logs, results.json, results.md.
#   scripts/gpu.sh rehearse          here, without a GPU: the benchmark on the emulated device with tiny shapes, PyTorch
#                                    on the CPU ($PYTHON, default python3), and the table of both.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolkit.sh
stage=target/gpu
programs=target/gpu-programs  # unpacked
out=${OUT:-target/gpu-results}
python=${PYTHON:-python3}

# What cargo built, as lines "NAME PATH"; kernels.a is the library of kernels.
built() {
    python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    kind = message.get("target", {}).get("kind", [""])[0]
    if message.get("executable") and kind in ("lib", "test", "bench"):
        print(message["target"]["name"] + ("-lib" if kind == "lib" else ""), message["executable"])
    if "static=smalti_kernels" in message.get("linked_libs", []):
        print("kernels.a", message["out_dir"] + "/libsmalti_kernels.a")'
}

# Every program holds all kernels, byte for byte the same: packed with a window larger than a program, they are stored
# once.
pack() {
    python3 -c '
import lzma, sys, tarfile
window = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 27}]
with lzma.open(sys.argv[1], "wb", filters=window) as out, tarfile.open(fileobj=out, mode="w") as packed:
    for name in ("tests", "bench_gpu", "kernel_tests"):
        packed.add(f"{sys.argv[2]}/{name}", name)' "$stage/programs.tar.xz" "$programs"
}
unpack() {
    [ "$programs" -nt "$stage/programs.tar.xz" ] && return
    rm -rf "$programs" "$programs.part"
    "$python" -m tarfile -e "$stage/programs.tar.xz" "$programs.part" || {
        rm -rf "$programs.part"
        echo "$stage/programs.tar.xz is damaged, or $python lacks lzma" >&2
        exit 1
    }
    mv "$programs.part" "$programs"
    touch "$programs"
}

# Tests are optimised as the benchmark is: one build, and what is tested is what is measured.
stage() {
    use_nvcc
    export SMALTI_CUDA_ARCH=${SMALTI_CUDA_ARCH:-90a} CARGO_INCREMENTAL=0 CARGO_TARGET_DIR="$PWD/target/cuda"
    rm -rf "$stage" "$programs"
    mkdir -p "$stage" "$programs/tests"
    local kernels name path
    cargo test --release --no-run --message-format=json -p smalti --features cuda > "$programs/built"
    cargo test --release --no-run --message-format=json -p smalti-models --features cuda --test goldens >> "$programs/built"
    cargo bench --no-run --message-format=json -p smalti-models --features cuda --bench gpu >> "$programs/built"
    while read -r name path; do
        case $name in
            kernels.a) kernels=$path ;;
            no_driver) ;;  # what it tests is a machine without a driver
            gpu) strip -o "$programs/bench_gpu" "$path" ;;
            *) strip -o "$programs/tests/$name" "$path" ;;
        esac
    done < <(built < "$programs/built")
    SMALTI_KERNEL_TESTS=target/kernel-tests LIBRARY=$kernels NVCC_ARCH=$SMALTI_CUDA_ARCH scripts/kernels.sh nvcc
    strip -o "$programs/kernel_tests" target/kernel-tests/nvcc/kernel_tests
    ls -l "$programs" "$programs/tests"
    pack
    local mib
    mib=$(du -sm "$stage" | cut -f1)
    echo "$stage: $mib MiB"
    [ "$mib" -le 60 ] || { echo "more than 60 MiB" >&2; exit 1; }
}

# What `run` needs, or one sentence that says what is missing.
require_gpu() {
    [ -f "$stage/programs.tar.xz" ] || {
        echo "there is no $stage here: 'scripts/gpu.sh stage' makes it on a machine with cargo" >&2
        exit 1
    }
    nvidia-smi -L 2> /dev/null | grep -q GPU || {
        echo "nvidia-smi finds no GPU here, and 'run' measures on one; 'scripts/gpu.sh rehearse' works without" >&2
        exit 1
    }
}

# Libraries that come with PyTorch: cuBLASLt and cuDNN are opened when they are first used.
use_libraries() {
    local folders
    folders=$("$python" -c '
import glob, os, sysconfig
site = sysconfig.get_paths()["purelib"]
print(":".join(sorted({os.path.dirname(p) for p in glob.glob(site + "/nvidia/**/lib*.so*", recursive=True)})))' || true)
    export LD_LIBRARY_PATH=$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}

# check NAME SECONDS COMMAND...: runs it, keeps its output, says how it ended.
failures=0
check() {
    local name=$1 seconds=$2 start=$SECONDS rc=0
    shift 2
    timeout "$seconds" "$@" > "$out/$name.log" 2>&1 || rc=$?
    echo "{\"check\": \"$name\", \"rc\": $rc, \"seconds\": $((SECONDS - start))}" | tee -a "$out/checks.jsonl"
    if [ $rc -ne 0 ]; then
        failures=$((failures + 1))
        tail -n 40 "$out/$name.log"
    fi
}

# rust_tests NAME [VARIABLE=VALUE]...
rust_tests() {
    local name=$1 program
    shift
    for program in "$programs"/tests/*; do
        local folder=$PWD
        case $(basename "$program") in goldens | smalti_models-lib) folder=$PWD/models ;; esac
        check "${name}_$(basename "$program")" 180 env CARGO_MANIFEST_DIR="$folder" SMALTI_DEVICE=cuda:0 "$@" "$program"
    done
}

# The kernel tests take both kinds of kernels by themselves.
run_tests() {
    check kernel_tests 120 "$programs/kernel_tests"
    rust_tests test
}
run_wgmma() { rust_tests wgmma SMALTI_WGMMA=1; }

run_sanitize() {
    command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer on the PATH" >&2; exit 1; }
    check memcheck 270 compute-sanitizer --tool memcheck --error-exitcode 9 "$programs/kernel_tests"
    check racecheck 270 compute-sanitizer --tool racecheck --error-exitcode 9 "$programs/kernel_tests"
}

table() {
    "$python" benches/against/gpu_table.py "$out" --json "$out/results.json" --out "$out/results.md"
    cat "$out/results.md"
}

# The works that have kernels for warpgroups.
wgmma_shapes() { grep -E '"(window-attn|global-attn|attn|clip-loss|step/(mae|vit))' "$out/shapes.jsonl" > "$out/wgmma_shapes.jsonl"; }

run_bench() {
    "$python" benches/against/gpu_torch.py --shapes > "$out/shapes.jsonl"
    check bench_smalti 160 "$programs/bench_gpu" --shapes "$out/shapes.jsonl" --out "$out/smalti.jsonl" --budget-s 120
    wgmma_shapes
    check bench_wgmma 80 env SMALTI_WGMMA=1 "$programs/bench_gpu" --shapes "$out/wgmma_shapes.jsonl" --out "$out/wgmma.jsonl" --budget-s 50
    check bench_torch 340 "$python" benches/against/gpu_torch.py --budget-s 300 --out "$out/torch.jsonl"
    table
}

rehearse() {
    mkdir -p "$out"
    out=$(realpath "$out")  # cargo runs the benchmark in its package's folder
    "$python" benches/against/gpu_torch.py --tiny --shapes > "$out/shapes.jsonl"
    wgmma_shapes
    export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/emulate}
    cargo bench -p smalti-models --features emulate --bench gpu -- --tiny --shapes "$out/shapes.jsonl" --out "$out/smalti.jsonl"
    SMALTI_WGMMA=1 cargo bench -p smalti-models --features emulate --bench gpu \
        -- --tiny --shapes "$out/wgmma_shapes.jsonl" --out "$out/wgmma.jsonl"
    "$python" benches/against/gpu_torch.py --tiny --device cpu --budget-s 240 --out "$out/torch.jsonl" > /dev/null
    table
}

case ${1:-} in
    stage) stage ;;
    rehearse) rehearse ;;
    run)
        shift
        [ $# -gt 0 ] || set -- tests wgmma sanitize bench
        for part in "$@"; do
            case $part in
                tests | wgmma | sanitize | bench) ;;
                *) echo "unknown part $part: tests, wgmma, sanitize or bench" >&2; exit 2 ;;
            esac
        done
        require_gpu
        unpack
        mkdir -p "$out"
        use_libraries
        for part in "$@"; do "run_$part"; done
        [ $failures -eq 0 ] || { echo "$failures checks failed" >&2; exit 1; }
        ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
