#!/usr/bin/env bash
# Sets up .venv-mmdet: mmdet 2.x on current PyTorch, for the mmdet backend and its tests. The
# Makefile selects the versions of Python and PyTorch.
#
#   scripts/mmdet_env.sh          builds the environment; compiling mmcv-full takes 20 minutes
#   scripts/mmdet_env.sh --ready  builds nothing: exit status 0 if mmcv-full is compiled already
#
# The user's cache stores the compiled mmcv-full for each combination of versions. Another checkout
# then only takes the minutes of installing torch.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${PYTHON:?} ${TORCH:?}"
MMCV=1.7.2
MMDET=2.28.2
VENV=.venv-mmdet

# Prints the cache folder of the mmcv-full that was compiled for a version of torch.
wheels() {
    "$PYTHON" - "$1" "$MMCV" <<'CODE'
import os, pathlib, platform, sys
home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
python = "cp{}{}".format(*sys.version_info)
key = f"mmcv-{sys.argv[2]}-torch-{sys.argv[1]}-{python}-{platform.machine()}"
print(pathlib.Path(home) / "vitadapter-zoo" / "wheels" / key)
CODE
}

compiled() { compgen -G "$1/mmcv_full-*.whl" >/dev/null; }

if [[ ${1:-} == --ready ]]; then
    pinned=${TORCH%% *}
    compiled "$(wheels "${pinned#torch==}")"
    exit
fi

pip() { "$VENV/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

# mmcv-full passes -std=c++14, but the headers of torch 2.14 need C++20, and mmcv-full compiles as
# C++20. Without debugging symbols, which Python's own flags enable, it takes less time and memory.
compile() {
    local work wheel
    work=$(mktemp -d)
    # shellcheck disable=SC2064  # the folder's name is expanded now on purpose
    trap "rm -rf '$work'" EXIT
    cat >"$work/c++" <<WRAPPER
#!/usr/bin/env bash
exec ${CXX:-c++} "\${@/#-std=c++1[47]/-std=c++20}" -g0
WRAPPER
    chmod +x "$work/c++"
    echo "compiling mmcv-full $MMCV, about 20 minutes on 2 cores"
    # If a GPU were visible, mmcv would compile its CUDA sources too.
    CXX="$work/c++" MMCV_WITH_OPS=1 FORCE_CUDA=0 CUDA_VISIBLE_DEVICES='' \
        pip wheel --no-build-isolation --no-deps --no-binary mmcv-full \
        --wheel-dir "$work/wheels" "mmcv-full==$MMCV"
    wheel=$(echo "$work"/wheels/mmcv_full-*.whl)
    mkdir -p "$1"
    cp "$wheel" "$1/unfinished.$$"
    mv "$1/unfinished.$$" "$1/$(basename "$wheel")"
}

rm -f "$VENV/.current"
"$PYTHON" -m venv "$VENV"
# mmcv's setup.py imports pkg_resources, which setuptools 82 dropped.
# shellcheck disable=SC2086  # TORCH has two requirements
pip install $TORCH 'setuptools<82' wheel ninja opencv-python-headless
version=$("$VENV/bin/python" -c 'from importlib import metadata; print(metadata.version("torch"))')
cache=$(wheels "$version")
compiled "$cache" || compile "$cache"
VITADAPTER_ZOO_BUILD_OP=1 pip install --find-links "$cache" --only-binary mmcv-full \
    --editable '.[dev,mmdet]' "mmcv-full==$MMCV" "mmdet==$MMDET"
"$VENV/bin/python" -c 'import mmcv.ops, mmdet.apis'
touch "$VENV/.current"
