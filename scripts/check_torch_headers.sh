#!/usr/bin/env bash
# Compiles csrc/ against the headers of several releases of torch, without linking or running.
#
#     scripts/check_torch_headers.sh [2.10.0 2.11.0 2.14.1]
#
# Downloads each wheel once into the user's cache (0.5 to 0.9 GB each) and unpacks its headers. Needs
# g++ and, for cuda.cu, nvcc; without nvcc only the C++ files are compiled.
set -euo pipefail
cd "$(dirname "$0")/.."
releases=("$@")
[ ${#releases[@]} -gt 0 ] || releases=(2.10.0 2.11.0 2.14.1)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/vitadapter-zoo/torch-headers
target=0x020a000000000000
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT

for release in "${releases[@]}"; do
    folder=$cache/$release
    if [ ! -d "$folder/torch/include" ]; then
        mkdir -p "$folder"
        python3 -m pip download --quiet --no-deps --dest "$folder" "torch==$release"
        unzip -q -o "$folder"/torch-*.whl 'torch/include/*' -d "$folder"
        rm "$folder"/torch-*.whl
    fi
    include=(-I "$folder/torch/include" -I "$folder/torch/include/torch/csrc/api/include")
    for file in csrc/cpu.cpp csrc/masks.cpp csrc/roi_align.cpp; do
        g++ -c -std=c++20 -O1 -fPIC -fvisibility=hidden "-DTORCH_TARGET_VERSION=$target" "${include[@]}" "$file" \
            -o "$objects/object.o"
    done
    if command -v nvcc >/dev/null; then
        nvcc -c -std=c++20 -O1 -DUSE_CUDA "-DTORCH_TARGET_VERSION=$target" "${include[@]}" \
            -gencode=arch=compute_80,code=sm_80 csrc/cuda.cu -o "$objects/object.o"
        echo "torch $release: C++ and CUDA compile"
    else
        echo "torch $release: C++ compiles; no nvcc here, CUDA was not compiled"
    fi
done
