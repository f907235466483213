#!/usr/bin/env bash
# Builds llama.cpp's llama-bench on the shared libraries of the llama-cpp-python that is installed.
#
#     bash benchmarks/build_llama_bench.sh FOLDER [PYTHON]      # prints the path of the program
#
# Only the tool and llama.cpp's `common` are compiled, from the source distribution of the installed version; libllama
# and libggml are those which efficli itself runs, so a difference between the two is one of measuring, not of code.
# What FOLDER has is kept: a second call takes no time, a killed one goes on.
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=${2:-python3}
version=$("$python" -c "import importlib.metadata as m; print(m.version('llama-cpp-python'))")
libraries=$("$python" -c "import importlib.util as u; print(u.find_spec('llama_cpp').submodule_search_locations[0])")/lib
source=$folder/llama_cpp_python-$version/vendor/llama.cpp
build=$folder/build-$version
# The loader is asked, not the linker: the program is good if it runs on these libraries.
runs_on_installed() { [[ $(ldd "$1" | grep -E 'lib(llama|ggml[a-z-]*)\.so' | grep -cv "$libraries/") == 0 ]]; }

if [[ -x $build/bin/llama-bench ]] && runs_on_installed "$build/bin/llama-bench"; then
  echo "$build/bin/llama-bench"
  exit 0
fi
for tool in cmake "${CXX:-c++}"; do
  if ! command -v "$tool" >/dev/null; then
    echo "error: no $tool to build llama-bench with" >&2
    echo "hint: apt-get install cmake g++" >&2
    exit 1
  fi
done
if [[ ! -f $source/tools/llama-bench/CMakeLists.txt ]]; then
  "$python" -m pip download -qq --no-deps --no-binary llama-cpp-python -d "$folder" "llama-cpp-python==$version" >&2
  tar -xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder"
fi

mkdir -p "$folder/project"
cat >"$folder/project/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.21)
project(llama-bench-on-installed-libraries C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(LLAMA_VERSION_MAJOR 0)
set(LLAMA_VERSION_BASE 0.0.0)
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT unknown)
set(LLAMA_SUBPROCESS OFF)
set(LLAMA_OPENSSL OFF)
function(llama_add_compile_flags)
endfunction()
function(license_add_file)
endfunction()
foreach(name llama ggml ggml-base ggml-cpu)
  file(GLOB file "${INSTALLED}/lib${name}.so.0")
  add_library(${name} SHARED IMPORTED GLOBAL)
  set_target_properties(${name} PROPERTIES IMPORTED_LOCATION "${file}")
endforeach()
target_include_directories(llama INTERFACE "${SOURCE}/include" "${SOURCE}/ggml/include")
target_link_libraries(llama INTERFACE ggml ggml-base ggml-cpu)
foreach(part vendor/nlohmann vendor/sheredom vendor/cpp-httplib common tools/llama-bench)
  add_subdirectory("${SOURCE}/${part}" "${CMAKE_BINARY_DIR}/${part}")
endforeach()
# Of `common` only the batch in common.cpp is in the measured loop: the rest (arguments, downloads) is compiled quickly.
set_target_properties(llama-common PROPERTIES UNITY_BUILD ON)
set_source_files_properties("${SOURCE}/common/common.cpp" "${SOURCE}/common/json.cpp"
  TARGET_DIRECTORY llama-common PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
set_source_files_properties("${SOURCE}/common/common.cpp" TARGET_DIRECTORY llama-common PROPERTIES COMPILE_OPTIONS -O3)
foreach(target llama-common cpp-httplib)
  target_compile_options(${target} PRIVATE -O1)
endforeach()
CMAKE
cmake -S "$folder/project" -B "$build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
  -DSOURCE="$source" -DINSTALLED="$libraries" >&2
cmake --build "$build" --target llama-bench --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" >&2
if ! runs_on_installed "$build/bin/llama-bench"; then
  echo "error: $build/bin/llama-bench does not run on $libraries" >&2
  ldd "$build/bin/llama-bench" >&2
  exit 1
fi
echo "$build/bin/llama-bench"
