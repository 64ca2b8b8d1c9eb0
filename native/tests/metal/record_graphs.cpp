// Preloaded (LD_PRELOAD), the emulator has Metal's graph optimiser and encoders look at every graph that llama.cpp
// gives to the CPU: the order is theirs, what would be dispatched is counted and searched for missing barriers, nothing
// is run.

#include "encoding.h"

#include "ggml-backend-impl.h"
#include "ggml-metal-common.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <vector>

using namespace es_metal;

namespace {

struct graph_counts {
    int64_t n_graphs, n_kernels, n_barriers;
    int64_t n_dependent; // pairs of accesses by different nodes to the same memory, one of them writing
    int64_t n_conflicts; // those with no barrier between
} graphs;

struct access {
    const ggml_tensor * tensor;
    bool                writes;
    int32_t             first, last; // barriers before its node's first and last dispatch
};

bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char *x = (const char *) a->data, *y = (const char *) b->data;
    return x < y + ggml_nbytes(b) && y < x + ggml_nbytes(a);
}

void record(ggml_cgraph * graph) {
    recording = true;
    std::vector<ggml_tensor *> nodes; // as the encoder counts them
    for (int i = 0; i < graph->n_nodes; ++i) {
        if (!ggml_op_is_empty(graph->nodes[i]->op) && !ggml_is_empty(graph->nodes[i])) {
            nodes.push_back(graph->nodes[i]);
        }
    }
    std::vector<access> done;
    encode(graph, [&](int i, int n) {
        const ggml_tensor * last = nodes[i + n - 1];
        std::vector<access> now  = { { last, true, first_barrier, last_barrier } };
        for (int j = i; j < i + n; ++j) {
            for (const ggml_tensor * src : nodes[j]->src) {
                const bool inner = src && std::find(nodes.begin() + i, nodes.begin() + j, src) != nodes.begin() + j;
                if (src && !inner) { // what a fused group keeps to itself is never in memory
                    now.push_back({ src, false, first_barrier, last_barrier });
                }
            }
        }
        for (const auto & a : done) {
            for (const auto & b : now) {
                const bool dependent = (a.writes || b.writes) && overlap(a.tensor, b.tensor);
                graphs.n_dependent += dependent;
                graphs.n_conflicts += dependent && a.last >= b.first;
            }
        }
        done.insert(done.end(), now.begin(), now.end());
    });
    graphs.n_graphs++;
    graphs.n_kernels += n_dispatches;
    graphs.n_barriers += n_barriers;
    recording = false;
}

template <typename F>
F next(const char * name) {
    static void * base = dlopen("libggml-base.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<F>(dlsym(base, name));
}

} // namespace

extern "C" {

// Copies graph_counts to out and starts again from zero.
void es_metal_graphs_take(int64_t * out) {
    memcpy(out, &graphs, sizeof(graphs));
    graphs = {};
}

ggml_backend_t ggml_backend_dev_init(ggml_backend_dev_t dev, const char * params) {
    ggml_backend_t backend = next<decltype(&ggml_backend_dev_init)>("ggml_backend_dev_init")(dev, params);
    if (backend) {
        backend->iface.graph_optimize = [](ggml_backend_t, ggml_cgraph * graph,
                                           ggml_backend_graph_optimize_params * p) {
            ggml_metal_fusion_add_alloc_deps(p->user_data, p->add_alloc_dep, graph);
            ggml_graph_optimize(graph);
        };
    }
    return backend;
}

enum ggml_status ggml_backend_graph_compute_async(ggml_backend_t backend, ggml_cgraph * graph) {
    record(graph);
    return next<decltype(&ggml_backend_graph_compute_async)>("ggml_backend_graph_compute_async")(backend, graph);
}

} // extern "C"
