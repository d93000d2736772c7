#!/usr/bin/env bash
# Registers, shared memory and spills of every kernel: scripts/kernel_registers.sh [ARCH]... (default 80 90a).
# Compiles each file of cuda/ with nvcc (those in folders sm90 for 90a alone), prints a table, and fails if a kernel spills
# more bytes than $SPILL (default 32), waits for wgmma where its source does not, or does not compile. nvcc comes from pip
# if there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolkit.sh
use_nvcc
archs=("$@")
[ ${#archs[@]} -gt 0 ] || archs=(80 90a)
table=$(mktemp)
trap 'rm -f "$table" "$table".*' EXIT
one() {
    nvcc -std=c++17 -O3 -Xptxas -v "-gencode=arch=compute_$2,code=sm_$2" -cubin -o /dev/null "$1" > "$3" 2>&1 \
        || { cat "$3" >&2; exit 1; }
}
export -f one
find cuda -name '*.cu' | sort | while read -r f; do for a in "${archs[@]}"; do
    case $f in */sm90/*) [ "$a" = 90a ] || continue ;; esac
    echo "$f $a $table.$(echo "$f" | tr '/.' '__').$a"
done; done \
    | xargs -P 2 -L 1 bash -c 'one "$0" "$1" "$2"'
python3 - "$table" "${SPILL:-32}" "${archs[@]}" <<'P'
import glob, re, sys
table, limit, archs = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
worst = []
print(f"{'file':34} {'sm':4} {'kernels':>7} {'most registers':>14} {'with spills':>11} {'most spilled, bytes':>19}")
for path in sorted(glob.glob(table + ".*")):
    name, arch = path[len(table) + 1:].rsplit(".", 1)
    text = open(path).read()
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", text)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    if not registers:
        continue
    most = max(spills, default=0)
    name = name.replace("cuda_", "", 1).removesuffix("_cu")
    print(f"{name:34} {arch:4} {len(registers):7} {max(registers):14} {sum(s > 0 for s in spills):11} {most:19}")
    if "warpgroup.wait is injected" in text or "serialized" in text:
        worst.append(f"{name} for sm_{arch}: wgmma is serialized")
    if most > limit:
        worst.append(f"{name} for sm_{arch}: {most} bytes")
if worst:
    sys.exit(f"kernels that spill more than {limit} bytes of registers, or wait between wgmma: " + "; ".join(worst))
P
