# To be sourced: what compiles CUDA and makes bindings, from pip and cargo where it is not installed.
#   use_nvcc        nvcc on the PATH, CUDA_HOME set
#   use_bindgen     bindgen on the PATH, libclang where it finds it
# Both keep what they install under target/tools. To be called from the root of the repository.

tools=$PWD/target/tools

pip_install() {
    [ -x "$tools/pip/bin/pip" ] || python3 -m venv "$tools/pip" || {
        echo "python3 with venv is needed (Debian: apt-get install python3-venv)" >&2
        return 1
    }
    "$tools/pip/bin/pip" -q --disable-pip-version-check install "$@"
}

use_nvcc() {
    command -v "${NVCC:-nvcc}" > /dev/null && return
    pip_install "nvidia-cuda-nvcc==13.0.*" "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-crt==13.0.*" \
        "nvidia-nvvm==13.0.*" "nvidia-cuda-cccl==13.0.*"
    CUDA_HOME=$(echo "$tools"/pip/lib/python3*/site-packages/nvidia/cu13)
    export CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"
}

use_bindgen() {
    export PATH="$tools/bin:$PATH"
    [ "$(bindgen --version 2> /dev/null)" = "bindgen 0.72.1" ] \
        || CARGO_TARGET_DIR=$tools/build cargo install -q bindgen-cli --version 0.72.1 --locked --root "$tools"
    if [ -z "${LIBCLANG_PATH:-}" ]; then
        pip_install "libclang==18.1.1"
        LIBCLANG_PATH=$(echo "$tools"/pip/lib/python3*/site-packages/clang/native)
        # this libclang comes without the compiler's own headers
        BINDGEN_EXTRA_CLANG_ARGS="-I$(g++ -print-file-name=include)"
        export LIBCLANG_PATH BINDGEN_EXTRA_CLANG_ARGS
    fi
}
