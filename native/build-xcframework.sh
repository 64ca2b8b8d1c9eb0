#!/usr/bin/env bash
# Builds ios_demo/EdgeStreamKit/CEdgeStream.xcframework: device, simulator and macOS, Apple silicon, Metal's shaders
# embedded, llama.cpp inside and hidden, edge_stream_app.h the only header. Needs Xcode, CMake and Python.
# Not run here: it was written without a Mac.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly ios_target=17.0 macos_target=14.0
readonly out=ios_demo/EdgeStreamKit/CEdgeStream.xcframework
python=${PYTHON:-python3}
[[ -x .venv/bin/python ]] && python=$PWD/.venv/bin/python

[[ $(uname) == Darwin ]] || { echo "build-xcframework.sh needs macOS with Xcode" >&2; exit 1; }
for tool in cmake xcodebuild; do
    command -v "$tool" > /dev/null || { echo "build-xcframework.sh needs $tool" >&2; exit 1; }
done

# build NAME CMAKE_ARGS...: build/apple/NAME holds the framework
build() {
    local name=$1
    shift
    cmake -S . -B "build/apple/$name" -DCMAKE_BUILD_TYPE=Release -DCMAKE_OSX_ARCHITECTURES=arm64 \
        -DEDGE_STREAM_SELF_CONTAINED=ON -DGGML_METAL=ON -DGGML_METAL_EMBED_LIBRARY=ON -DGGML_NATIVE=OFF \
        -DGGML_OPENMP=OFF -DPython3_EXECUTABLE="$(command -v "$python")" "$@"
    cmake --build "build/apple/$name" --target edge_stream --parallel
}

# framework NAME: where CMake left it
framework() {
    find "build/apple/$1" -type d -name CEdgeStream.framework -print -quit
}

build ios -DCMAKE_SYSTEM_NAME=iOS -DCMAKE_OSX_SYSROOT=iphoneos -DCMAKE_OSX_DEPLOYMENT_TARGET=$ios_target
build simulator -DCMAKE_SYSTEM_NAME=iOS -DCMAKE_OSX_SYSROOT=iphonesimulator -DCMAKE_OSX_DEPLOYMENT_TARGET=$ios_target
build macos -DCMAKE_OSX_DEPLOYMENT_TARGET=$macos_target

# a framework of macOS has versions, and CMake links all of them but the module map to its top
macos=$(framework macos)
[[ -e $macos/Modules ]] || ln -s Versions/Current/Modules "$macos/Modules"

# nothing but es_* may be seen from outside: another copy of llama.cpp in the same app is none of our business
for name in ios simulator macos; do
    if nm -gUj "$(framework $name)/CEdgeStream" | grep -v '^_es_'; then
        echo "build-xcframework.sh: the symbols above are exported by mistake ($name)" >&2
        exit 1
    fi
done

rm -rf "$out.partial" "$out"
xcodebuild -create-xcframework -output "$out.partial" \
    -framework "$(framework ios)" -framework "$(framework simulator)" -framework "$macos"
mv "$out.partial" "$out"
echo "wrote $out"
