// Metal's device, library and encoder on the CPU: enough for llama.cpp's own op encoders (ggml-metal-ops.cpp) to run
// the ops of the sinks' moves through llama.cpp's own kernel sources. Command order is the worst that the barriers
// allow: dispatches between two of them run in reverse.
//
// Preloaded (LD_PRELOAD), it has Metal's graph optimiser and encoders look at every graph that llama.cpp gives to the
// CPU: the order is theirs, what would be dispatched is counted and searched for missing barriers, nothing is run.

#include "emulator.h"

// the language's words are C++ names in the headers below
#undef device
#undef constant
#undef thread
#undef kernel

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-impl.h"
#include "ggml-metal-common.h"
#include "ggml-metal-device.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-impl.h"
#include "ggml-metal-ops.h"

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>

using namespace es_metal;

namespace {

struct kernel_entry {
    kernel_fn fn;
    bool      lockstep;
};

struct constant_entry {
    void * value;
    size_t size;
};

std::map<std::string, kernel_entry> & kernels() {
    static std::map<std::string, kernel_entry> all;
    return all;
}

std::multimap<int, constant_entry> & constants() {
    static std::multimap<int, constant_entry> all;
    return all;
}

std::string           failure;
std::set<std::string> used;
int32_t               n_dispatches, n_barriers;
bool                  recording;                        // commands are counted, not run
int32_t               first_barrier = -1, last_barrier; // barriers before the first and the last dispatch of a node

void fail(const std::string & text) {
    if (failure.empty()) {
        failure = text;
    }
}

} // namespace

int es_metal::add_kernel(const char * name, kernel_fn fn, bool lockstep) {
    kernels()[name] = { fn, lockstep };
    return 0;
}

int es_metal::add_constant(int index, void * value, size_t size) {
    constants().insert({ index, { value, size } });
    return 0;
}

//
// threads that exchange values: fibers, switched at each exchange
//

namespace {

constexpr int SIMD_WIDTH = 32, MAX_THREADS = 1024;

struct fiber {
    ucontext_t        context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    const call *      arguments;
    int               n_exchanges;
    bool              done;
};

ucontext_t                          scheduler;
std::vector<std::unique_ptr<fiber>> fibers; // used again by every group
fiber *                             current;
kernel_fn                           current_fn;
// two sets, used in turns: a thread may be one exchange ahead of its neighbour
float exchanged[2][MAX_THREADS];

void enter() {
    current_fn(*current->arguments);
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

void run_in_lockstep(kernel_fn fn, const std::vector<call> & threads) {
    current_fn = fn;
    while (fibers.size() < threads.size()) {
        fibers.push_back(std::make_unique<fiber>());
    }
    for (size_t i = 0; i < threads.size(); ++i) {
        auto & f      = *fibers[i];
        f.arguments   = &threads[i];
        f.n_exchanges = 0;
        f.done        = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp   = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link          = nullptr;
        makecontext(&f.context, enter, 0);
    }
    for (bool running = true; running;) {
        running = false;
        for (size_t i = 0; i < threads.size(); ++i) {
            if (!fibers[i]->done) {
                current = fibers[i].get();
                swapcontext(&scheduler, &current->context);
                running = running || !fibers[i]->done;
            }
        }
    }
}

} // namespace

float es_simd_shuffle_xor(float value, int mask) {
    const int thread = current->arguments->values[thread_index_in_threadgroup][0];
    auto &    slots  = exchanged[current->n_exchanges++ % 2];
    slots[thread]    = value;
    swapcontext(&current->context, &scheduler);
    return slots[thread ^ mask];
}

//
// Metal
//

struct ggml_metal_cv {
    std::map<int, int32_t> values;
};

struct ggml_metal_pipeline {
    std::string   name;
    ggml_metal_cv cv;
};

struct es_command {
    ggml_metal_pipeline *            pipeline;
    std::map<int, std::vector<char>> bytes;
    std::map<int, void *>            buffers;
    int                              grid[3], group[3];
};

struct ggml_metal_encoder {
    es_command              next;
    std::vector<es_command> waiting;
};

namespace {

void run_command(const es_command & c) {
    const auto found = kernels().find(c.pipeline->name);
    if (found == kernels().end()) {
        return fail("no kernel source has " + c.pipeline->name);
    }
    for (auto & [index, entry] : constants()) {
        const auto    set   = c.pipeline->cv.values.find(index);
        const int32_t value = set == c.pipeline->cv.values.end() ? 0 : set->second;
        memcpy(entry.value, &value, entry.size); // little-endian: bool, short and int
    }
    const int n_threads = c.group[0] * c.group[1] * c.group[2];
    if (n_threads < 1 || n_threads > MAX_THREADS) {
        return fail(c.pipeline->name + ": " + std::to_string(n_threads) + " threads in a group");
    }
    std::vector<const void *> buffers;
    for (int i = 0; c.bytes.count(i) || c.buffers.count(i); ++i) {
        buffers.push_back(c.bytes.count(i) ? c.bytes.at(i).data() : c.buffers.at(i));
    }
    call base    = {};
    base.buffers = &buffers;
    for (int i = 0; i < 3; ++i) {
        base.values[threads_per_threadgroup][i] = c.group[i];
    }
    used.insert(c.pipeline->name);
    std::vector<call> threads(n_threads, base);
    for (int t = 0; t < n_threads; ++t) {
        auto & v                             = threads[t].values;
        v[thread_index_in_threadgroup][0]    = t;
        v[simdgroup_index_in_threadgroup][0] = t / SIMD_WIDTH;
        v[thread_index_in_simdgroup][0]      = t % SIMD_WIDTH;
        v[thread_position_in_threadgroup][0] = t % c.group[0];
        v[thread_position_in_threadgroup][1] = t / c.group[0] % c.group[1];
        v[thread_position_in_threadgroup][2] = t / c.group[0] / c.group[1];
    }
    for (int g = 0; g < c.grid[0] * c.grid[1] * c.grid[2]; ++g) {
        for (auto & thread : threads) {
            thread.values[threadgroup_position_in_grid][0] = g % c.grid[0];
            thread.values[threadgroup_position_in_grid][1] = g / c.grid[0] % c.grid[1];
            thread.values[threadgroup_position_in_grid][2] = g / c.grid[0] / c.grid[1];
        }
        if (found->second.lockstep) {
            run_in_lockstep(found->second.fn, threads);
        } else {
            for (const auto & thread : threads) {
                found->second.fn(thread);
            }
        }
    }
}

void run_waiting(ggml_metal_encoder & encoder) {
    for (auto c = encoder.waiting.rbegin(); c != encoder.waiting.rend() && !recording; ++c) {
        run_command(*c);
    }
    encoder.waiting.clear();
}

} // namespace

extern "C" {

ggml_metal_cv_t ggml_metal_cv_init() {
    return new ggml_metal_cv;
}

void ggml_metal_cv_free(ggml_metal_cv_t cv) {
    delete cv;
}

void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t index) {
    cv->values[index] = value;
}

void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t index) {
    cv->values[index] = value;
}

void ggml_metal_cv_set_bool(ggml_metal_cv_t cv, bool value, int32_t index) {
    cv->values[index] = value;
}

// one Apple device: family 7 (M1, A14) or later
const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t) {
    static ggml_metal_device_props props = [] {
        ggml_metal_device_props p    = {};
        p.max_theadgroup_memory_size = 32768;
        p.has_simdgroup_reduction = p.has_simdgroup_mm = p.has_bfloat = p.has_unified_memory = true;
        p.supports_gpu_family_apple7                                                         = true;
        return p;
    }();
    return &props;
}

ggml_metal_device_t ggml_metal_device_init(int, int) {
    return nullptr;
}

void ggml_metal_device_free(ggml_metal_device_t) {}

ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t) {
    return nullptr;
}

ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t) {
    return nullptr;
}

// asked with the tensors of the test: benchmarks/backend_ops.py asks the real function about the same
bool ggml_metal_device_supports_op(ggml_metal_device_t, const ggml_tensor *) {
    return true;
}

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t, const char *) {
    return {}; // never compiled before: constants belong to a pipeline
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t, const char * base,
                                                                    const char *, ggml_metal_cv_t      cv) {
    static std::vector<std::unique_ptr<ggml_metal_pipeline>> all;
    all.push_back(std::make_unique<ggml_metal_pipeline>(ggml_metal_pipeline{ base, cv ? *cv : ggml_metal_cv{} }));
    ggml_metal_pipeline_with_params params = {};
    params.pipeline                        = all.back().get();
    return params;
}

void ggml_metal_pipeline_free(ggml_metal_pipeline_t) {}

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) {
    return MAX_THREADS;
}

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) {
    return { t->data, 0 };
}

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) {
    return new ggml_metal_encoder;
}

void ggml_metal_encoder_free(ggml_metal_encoder_t encoder) {
    delete encoder;
}

void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}

void ggml_metal_encoder_debug_group_pop(ggml_metal_encoder_t) {}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t encoder, ggml_metal_pipeline_with_params pipeline) {
    encoder->next.pipeline = pipeline.pipeline;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t encoder, void * data, size_t size, int index) {
    encoder->next.bytes[index].assign((char *) data, (char *) data + size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t encoder, ggml_metal_buffer_id buffer, int index) {
    encoder->next.buffers[index] = (char *) buffer.metal + buffer.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t encoder, size_t, int) {
    if (!recording) {
        fail(encoder->next.pipeline->name + " asks for threadgroup memory, which the emulator does not have");
    }
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t encoder, int g0, int g1, int g2, int t0, int t1,
                                              int t2) {
    auto & c  = encoder->next;
    c.grid[0] = g0, c.grid[1] = g1, c.grid[2] = g2;
    c.group[0] = t0, c.group[1] = t1, c.group[2] = t2;
    encoder->waiting.push_back(c);
    if (recording) {
        used.insert(c.pipeline->name);
    }
    c = {};
    ++n_dispatches;
    first_barrier = first_barrier < 0 ? n_barriers : first_barrier;
    last_barrier  = n_barriers;
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t encoder) {
    run_waiting(*encoder);
    ++n_barriers;
}

void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t encoder) {
    run_waiting(*encoder);
}

} // extern "C"

//
// the test
//

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
    n_dispatches = n_barriers = 0;

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
    ggml_metal_fusion_info * fusion = ggml_metal_fusion_info_init(true, 0);
    ggml_metal_op_t          encoder =
        ggml_metal_op_init(nullptr, nullptr, graph, fusion, 0, graph->n_nodes, /*use_concurrency =*/true, false, 0);
    for (int i = 0; i < ggml_metal_op_n_nodes(encoder);) {
        i += ggml_metal_op_encode(encoder, i);
    }
    ggml_metal_op_free(encoder);
    ggml_metal_fusion_info_free(fusion);
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

// The kernels that were dispatched since the start, one per line.
const char * es_metal_kernels_used() {
    static std::string text;
    text.clear();
    for (const auto & name : used) {
        text += name + "\n";
    }
    return text.c_str();
}

} // extern "C"

//
// whole graphs
//

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
    recording  = true;
    n_barriers = n_dispatches       = 0;
    ggml_metal_fusion_info * fusion = ggml_metal_fusion_info_init(true, 0);
    ggml_metal_op_t          encoder =
        ggml_metal_op_init(nullptr, nullptr, graph, fusion, 0, graph->n_nodes, /*use_concurrency =*/true, false, 0);
    std::vector<ggml_tensor *> nodes; // as the encoder counts them
    for (int i = 0; i < graph->n_nodes; ++i) {
        if (!ggml_op_is_empty(graph->nodes[i]->op) && !ggml_is_empty(graph->nodes[i])) {
            nodes.push_back(graph->nodes[i]);
        }
    }
    std::vector<access> done;
    for (int i = 0; i < ggml_metal_op_n_nodes(encoder);) {
        first_barrier            = -1;
        const int           n    = ggml_metal_op_encode(encoder, i);
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
        i += n;
    }
    ggml_metal_op_free(encoder);
    ggml_metal_fusion_info_free(fusion);
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
