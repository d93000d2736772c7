#!/usr/bin/env bash
# Makes src/gpu/bindings.rs from cuda/kernels.h. `--check` compares instead and fails if they differ.
# Installs bindgen and libclang under target/tools if need be.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/toolkit.sh
use_bindgen
make() {
    bindgen cuda/kernels.h --no-layout-tests --no-doc-comments --use-core --no-prepend-enum-name \
        --allowlist-item 'smalti_.*' --allowlist-item 'SMALTI_.*' --rust-target 1.85 --rust-edition 2024 \
        --raw-line '//! The C interface of the kernels. Made by scripts/bindings.sh from cuda/kernels.h: do not edit.' \
        --raw-line '#![allow(missing_docs, non_camel_case_types, dead_code, clippy::all)]' \
        --formatter rustfmt
}
if [ "${1:-}" = --check ]; then
    diff -u src/gpu/bindings.rs <(make) || { echo "src/gpu/bindings.rs is out of date: run scripts/bindings.sh" >&2; exit 1; }
else
    trap "rm -f src/gpu/bindings.rs.new" EXIT
    make > src/gpu/bindings.rs.new
    mv src/gpu/bindings.rs.new src/gpu/bindings.rs
fi
