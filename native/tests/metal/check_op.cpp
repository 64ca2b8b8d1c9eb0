// An op on the CPU backend and on the emulated Metal, from the same data.

#include "encoding.h"

#include "ggml-backend.h"

#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <vector>

using namespace es_metal;

namespace {

constexpr int MAX_SHIFT = 1024;

// Data for every tensor of the graph: the same for the same seed.
void fill(ggml_tensor * t, std::minstd_rand & random) {
    const int64_t n = ggml_nelements(t);
    if (t->type == GGML_TYPE_I32) { // positions: forward, and backward as in a rebase
        for (int64_t i = 0; i < n; ++i) {
            ((int32_t *) t->data)[i] = (int32_t) (random() % (2 * MAX_SHIFT + 1)) - MAX_SHIFT;
        }
    } else if (t->type == GGML_TYPE_I64) { // cells, all different
        const int64_t first = random() % 64;
        for (int64_t i = 0; i < n; ++i) {
            ((int64_t *) t->data)[i] = first + (n - i) * 37;
        }
    } else {
        std::vector<float> x(n);
        for (auto & v : x) {
            v = (float) random() / random.max() * 8 - 4;
        }
        if (t->type == GGML_TYPE_F32) {
            memcpy(t->data, x.data(), n * sizeof(float));
        } else {
            ggml_quantize_chunk(t->type, x.data(), t->data, 0, ggml_nrows(t), t->ne[0], nullptr);
        }
    }
}

void fill_hadamard(ggml_tensor * t) {
    const int64_t n = t->ne[0];
    for (int64_t i = 0; i < n * n; ++i) {
        const float sign       = __builtin_popcountll((i / n) & (i % n)) % 2 ? -1.0f : 1.0f;
        ((float *) t->data)[i] = sign / std::sqrt((float) n);
    }
}

std::vector<float> values(const ggml_tensor * t) {
    std::vector<float> x(ggml_nelements(t));
    const auto *       traits = ggml_get_type_traits(t->type);
    if (t->type == GGML_TYPE_F32) {
        memcpy(x.data(), t->data, x.size() * sizeof(float));
    } else {
        traits->to_float(t->data, x.data(), x.size());
    }
    return x;
}

} // namespace

extern "C" {

struct es_metal_result {
    double  max_abs;     // largest value that the CPU computes
    double  max_diff;    // largest difference from it, anywhere in the tensor (or in the one that it is a view of)
    int64_t n_differing; // values that differ by more than 1e-3 of max_abs
    int64_t n_changed;   // values that the op changed
    int32_t n_dispatches, n_barriers;
};

// Compute `op` and what it depends on, with the CPU backend and with the Metal backend's encoders and kernels, from the
// same random data. The tensors have none of their own. Returns 0, or -1 and *error says why.
int es_metal_check(ggml_tensor * op, uint32_t seed, es_metal_result * result, const char ** error) {
    static std::string told;
    failure.clear();

    ggml_init_params params = { ggml_graph_overhead() + 1024, nullptr, /*no_alloc =*/true };
    ggml_context *   ctx    = ggml_init(params);
    ggml_cgraph *    graph  = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, op);
    for (int i = 0; i < graph->n_nodes; ++i) {
        graph->nodes[i]->flags |= GGML_TENSOR_FLAG_COMPUTE;
    }

    std::vector<ggml_tensor *> tensors(graph->leafs, graph->leafs + graph->n_leafs);
    tensors.insert(tensors.end(), graph->nodes, graph->nodes + graph->n_nodes);
    std::map<ggml_tensor *, std::vector<char>> data;
    for (auto * t : tensors) {
        if (ggml_tensor * owner = t->view_src ? t->view_src : t; !data.count(owner)) {
            data[owner].resize(ggml_nbytes(owner) + 64);
            owner->data = (void *) (((uintptr_t) data[owner].data() + 63) / 64 * 64);
        }
    }
    for (auto & [owner, bytes] : data) {
        owner->buffer = ggml_backend_cpu_buffer_from_ptr(owner->data, ggml_nbytes(owner));
    }
    for (auto * t : tensors) {
        if (t->view_src) {
            t->data   = (char *) t->view_src->data + t->view_offs;
            t->buffer = t->view_src->buffer;
        }
    }
    ggml_tensor * whole = op->view_src ? op->view_src : op;

    std::minstd_rand random(seed);
    for (auto * t : tensors) {
        if (!t->view_src) {
            fill(t, random);
        }
    }
    for (int i = 0; i < graph->n_nodes; ++i) {
        if (graph->nodes[i]->op == GGML_OP_MUL_MAT) {
            fill_hadamard(graph->nodes[i]->src[0]);
        }
    }
    const auto filled = data;

    const auto     before = values(whole);
    ggml_backend_t cpu    = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    if (ggml_backend_graph_compute(cpu, graph) != GGML_STATUS_SUCCESS) {
        fail("the CPU backend failed");
    }
    ggml_backend_free(cpu);
    const auto expected = values(whole);

    for (auto & [owner, bytes] : data) {
        memcpy(bytes.data(), filled.at(owner).data(), bytes.size());
    }
    encode(graph);
    const auto got = values(whole);

    *result = { 0, 0, 0, 0, n_dispatches, n_barriers };
    for (const float x : expected) {
        result->max_abs = std::max(result->max_abs, (double) std::fabs(x));
    }
    for (size_t i = 0; i < got.size(); ++i) {
        const double diff = std::fabs((double) got[i] - expected[i]);
        result->max_diff  = diff <= result->max_diff ? result->max_diff : diff; // NaN is kept
        result->n_differing += !(diff <= 1e-3 * result->max_abs);
        result->n_changed += expected[i] != before[i];
    }

    for (auto & [owner, bytes] : data) {
        ggml_backend_buffer_free(owner->buffer);
    }
    for (auto * t : tensors) {
        t->buffer = nullptr;
        t->data   = nullptr;
    }
    for (auto & [owner, bytes] : data) {
        owner->buffer = nullptr;
        owner->data   = nullptr;
    }
    ggml_free(ctx);
    told   = failure;
    *error = told.c_str();
    return told.empty() ? 0 : -1;
}

} // extern "C"
