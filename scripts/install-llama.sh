#!/usr/bin/env bash
# Builds and installs llama-cpp-python into the Python given as $1, with flags that are safe on this machine.
#
# GGML_NATIVE is off: a native build crashes on virtual machines that show AMX, and pip would hand a wheel from its
# cache to an older CPU. The SIMD sets that /proc/cpuinfo shows are named one by one instead. The library parts that
# the Python package never ships (common, llava) are left out, and the rest is a unity build: 2 minutes, not 10.
set -euo pipefail
python=${1:-python3}
version=${LLAMA_CPP_PYTHON_VERSION:-0.3.36}

if "$python" -c "import llama_cpp, sys; sys.exit(llama_cpp.__version__ != '$version')" 2>/dev/null; then
  exit 0
fi

flags=()
cpuinfo() { grep -qw "$1" /proc/cpuinfo 2>/dev/null; }
cpuinfo avx512f && flags+=(-DGGML_AVX512=ON)
cpuinfo avx512_vbmi && flags+=(-DGGML_AVX512_VBMI=ON)
cpuinfo avx512_vnni && flags+=(-DGGML_AVX512_VNNI=ON)
cpuinfo avx512_bf16 && flags+=(-DGGML_AVX512_BF16=ON)

# The wheel is kept by compiler flags, so that another CPU builds its own.
key=$(printf '%s\n' "$version" "$(uname -m)" "$("$python" -c 'import sys; print(sys.implementation.cache_tag)')" \
  "${flags[@]:-}" | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/efficli/wheels/$key
if ! compgen -G "$cache/*.whl" >/dev/null; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  printf 'set(LLAMA_BUILD_COMMON OFF)\n' >"$work/nocommon.cmake"
  export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
  export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_UNITY_BUILD=ON -DCMAKE_PROJECT_INCLUDE=$work/nocommon.cmake -DGGML_NATIVE=OFF ${flags[*]:-}"
  "$python" -m pip wheel -q --no-deps --no-cache-dir --no-binary llama-cpp-python -w "$work/wheel" "llama-cpp-python==$version"
  mkdir -p "$cache"
  mv "$work"/wheel/llama_cpp_python-*.whl "$cache/"
fi
"$python" -m pip install -q --no-deps --force-reinstall "$cache"/llama_cpp_python-*.whl
