// Counts what a program asks of ggml's scheduler and backends: preload it (LD_PRELOAD), run some decodes, and take the
// counts. Every call goes through the dynamic linker, those between ggml's own functions included, so this sees
// what happens with any backend without a change to llama.cpp. Linux only. Used by benchmarks/graph_cost.py.

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <cstring>

#include <dlfcn.h>

namespace {

struct counts {
    int64_t builds; // graphs that were planned (split and allocated); a decode that reuses the last one has none
    int64_t splits; // graphs handed to a backend: the scheduler's splits
    int64_t nodes;  // their nodes that compute something (views and reshapes do not)
    int64_t copies; // tensors copied between backends
    int64_t syncs;  // waits for a backend
    int64_t reads;  // tensors read to the host
    int64_t read_bytes;
    int64_t writes; // tensors written by the host
    int64_t write_bytes;
    int64_t buffers;            // buffers allocated on any backend
    int64_t pairs;              // rotations followed by their store, with shapes that CUDA and Vulkan run as one kernel
    int64_t ops[GGML_OP_COUNT]; // nodes by ggml_op
};

counts now = {};

// ggml_cuda_should_fuse_rope_set_rows and ggml_vk_can_fuse_rope_set_rows, as far as a graph can differ in it
bool is_pair(ggml_cgraph * graph, int i) {
    if (i + 2 >= ggml_graph_n_nodes(graph)) {
        return false;
    }
    const ggml_tensor *rope = ggml_graph_node(graph, i), *view = ggml_graph_node(graph, i + 1),
                      *store = ggml_graph_node(graph, i + 2);
    return rope->op == GGML_OP_ROPE && view->op == GGML_OP_VIEW && store->op == GGML_OP_SET_ROWS &&
           view->src[0] == rope && store->src[0] == view && store->src[2]->op == GGML_OP_NONE &&
           ggml_is_contiguous(view) && rope->ne[3] == 1 && view->ne[0] == rope->ne[0] * rope->ne[1] &&
           view->ne[1] == rope->ne[2] && ggml_nelements(store->src[1]) == rope->ne[2] &&
           (store->type == GGML_TYPE_F16 || store->type == GGML_TYPE_F32);
}

// A backend without asynchronous copies gets them by a wait and a plain copy: still one copy, and no wait for anything.
thread_local int depth = 0;

struct inner {
    inner() { depth++; }
    ~inner() { depth--; }
};

template <typename F>
F next(const char * name) {
    static void * base = dlopen("libggml-base.so", RTLD_NOW | RTLD_NOLOAD);
    return base ? reinterpret_cast<F>(dlsym(base, name)) : nullptr;
}

} // namespace

#define NEXT(function) static const auto real = next<decltype(&function)>(#function)

extern "C" {

// Copies the counts since the last call to out and starts again from zero. Returns their number.
__attribute__((visibility("default"))) int32_t es_counts_take(int64_t * out) {
    memcpy(out, &now, sizeof(now));
    now = {};
    return (int32_t) (sizeof(now) / sizeof(int64_t));
}

bool ggml_backend_sched_alloc_graph(ggml_backend_sched_t sched, ggml_cgraph * graph) {
    NEXT(ggml_backend_sched_alloc_graph);
    now.builds++;
    return real(sched, graph);
}

enum ggml_status ggml_backend_graph_compute_async(ggml_backend_t backend, ggml_cgraph * graph) {
    NEXT(ggml_backend_graph_compute_async);
    now.splits++;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_op op = ggml_graph_node(graph, i)->op;
        if (op != GGML_OP_NONE && op != GGML_OP_VIEW && op != GGML_OP_RESHAPE && op != GGML_OP_PERMUTE &&
            op != GGML_OP_TRANSPOSE) {
            now.nodes++;
            now.ops[op]++;
            now.pairs += is_pair(graph, i);
        }
    }
    return real(backend, graph);
}

ggml_backend_buffer_t ggml_backend_buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    NEXT(ggml_backend_buft_alloc_buffer);
    now.buffers++;
    return real(buft, size);
}

void ggml_backend_synchronize(ggml_backend_t backend) {
    NEXT(ggml_backend_synchronize);
    now.syncs += depth == 0;
    real(backend);
}

void ggml_backend_event_synchronize(ggml_backend_event_t event) {
    NEXT(ggml_backend_event_synchronize);
    now.syncs++;
    real(event);
}

void ggml_backend_tensor_copy(const ggml_tensor * src, ggml_tensor * dst) {
    NEXT(ggml_backend_tensor_copy);
    now.copies++;
    real(src, dst);
}

void ggml_backend_tensor_copy_async(ggml_backend_t from, ggml_backend_t to, const ggml_tensor * src,
                                    ggml_tensor * dst) {
    NEXT(ggml_backend_tensor_copy_async);
    now.copies++;
    real(from, to, src, dst);
}

void ggml_backend_tensor_get(const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    NEXT(ggml_backend_tensor_get);
    now.reads += depth == 0;
    now.read_bytes += depth == 0 ? (int64_t) size : 0;
    real(tensor, data, offset, size);
}

void ggml_backend_tensor_get_async(ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset,
                                   size_t size) {
    NEXT(ggml_backend_tensor_get_async);
    now.reads++;
    now.read_bytes += (int64_t) size;
    const inner guard;
    real(backend, tensor, data, offset, size);
}

void ggml_backend_tensor_set(ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    NEXT(ggml_backend_tensor_set);
    now.writes += depth == 0;
    now.write_bytes += depth == 0 ? (int64_t) size : 0;
    real(tensor, data, offset, size);
}

void ggml_backend_tensor_set_async(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset,
                                   size_t size) {
    NEXT(ggml_backend_tensor_set_async);
    now.writes++;
    now.write_bytes += (int64_t) size;
    const inner guard;
    real(backend, tensor, data, offset, size);
}

} // extern "C"
