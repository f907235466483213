#!/usr/bin/env bash
# Builds and installs llama-cpp-python into the Python given as $1, with flags that are safe on this machine.
#
# GGML_NATIVE is off: a native build crashes on virtual machines that show AMX, and pip would hand a wheel from its
# cache to an older CPU. The SIMD sets that /proc/cpuinfo shows are named one by one instead. The library parts that
# the Python package never ships (common, llava) are left out, and the rest is a unity build: 2 minutes, not 10.
set -euo pipefail
python=${1:-python3}
version=${LLAMA_CPP_PYTHON_VERSION:-0.3.36}

if "$python" -c "import importlib.metadata as m, sys; sys.exit(m.version('llama-cpp-python') != '$version')" 2>/dev/null &&
  "$python" -c "import llama_cpp" 2>/dev/null; then
  exit 0
fi

flags=()
if [[ $(uname -m) == x86_64 && -r /proc/cpuinfo ]]; then
  set_of() { # set_of CPUINFO_NAME CMAKE_NAME: both ways, because cmake's own default is on for the older sets
    if grep -qw "$1" /proc/cpuinfo; then flags+=("-DGGML_$2=ON"); else flags+=("-DGGML_$2=OFF"); fi
  }
  set_of sse4_2 SSE42
  set_of avx AVX
  set_of avx2 AVX2
  set_of fma FMA
  set_of f16c F16C
  set_of bmi2 BMI2
  set_of avx512f AVX512
  set_of avx512_vnni AVX512_VNNI
  set_of avx512_bf16 AVX512_BF16
fi

# The wheel is kept by version, Python and compiler flags, so that another CPU builds its own.
key=$(printf '%s\n' "$version" "$(uname -m)" "$("$python" -c 'import sys; print(sys.implementation.cache_tag)')" \
  "${flags[@]:-}" | sha256sum | cut -c1-16)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/efficli/wheels/$key
if ! compgen -G "$cache/*.whl" >/dev/null; then
  if ! command -v "${CXX:-c++}" >/dev/null; then
    echo "error: no C++ compiler (${CXX:-c++}) to build llama-cpp-python $version" >&2
    echo "hint: apt-get install g++" >&2
    exit 1
  fi
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  printf 'set(LLAMA_BUILD_COMMON OFF)\n' >"$work/nocommon.cmake"
  export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
  export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_UNITY_BUILD=ON -DCMAKE_PROJECT_INCLUDE=$work/nocommon.cmake -DGGML_NATIVE=OFF ${flags[*]:-}"
  "$python" -m pip wheel -qq --no-deps --no-cache-dir --no-binary llama-cpp-python -w "$work/wheel" "llama-cpp-python==$version"
  mkdir -p "$cache"
  # Whole or absent: another set-up may be looking at the same moment.
  mv "$work"/wheel/llama_cpp_python-*.whl "$work/"
  cp "$work"/llama_cpp_python-*.whl "$cache/.partial-$$"
  mv "$cache/.partial-$$" "$cache/$(basename "$work"/llama_cpp_python-*.whl)"
fi
"$python" -m pip install -qq --no-deps --force-reinstall "$cache"/llama_cpp_python-*.whl
