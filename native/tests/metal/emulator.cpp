// Metal's device, library and encoder on the CPU: enough for llama.cpp's own op encoders (ggml-metal-ops.cpp) to run
// the ops of the sinks' moves through llama.cpp's own kernel sources. Command order is the worst that the barriers
// allow: dispatches between two of them run in reverse.

#include "emulator.h"

// the language's words are C++ names from here on
#undef device
#undef constant
#undef thread
#undef kernel

#include "encoding.h"

#include <ucontext.h>

#include <map>
#include <memory>

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

} // namespace

std::string           es_metal::failure;
std::set<std::string> es_metal::used;
int32_t               es_metal::n_dispatches, es_metal::n_barriers;
bool                  es_metal::recording;
int32_t               es_metal::first_barrier, es_metal::last_barrier;

void es_metal::fail(const std::string & text) {
    if (failure.empty()) {
        failure = text;
    }
}

void es_metal::encode(ggml_cgraph * graph, const std::function<void(int, int)> & after) {
    n_barriers = n_dispatches       = 0;
    ggml_metal_fusion_info * fusion = ggml_metal_fusion_info_init(true, 0);
    ggml_metal_op_t          encoder =
        ggml_metal_op_init(nullptr, nullptr, graph, fusion, 0, graph->n_nodes, /*use_concurrency =*/true, false, 0);
    for (int i = 0; i < ggml_metal_op_n_nodes(encoder);) {
        first_barrier = -1;
        const int n   = ggml_metal_op_encode(encoder, i);
        if (after) {
            after(i, n);
        }
        i += n;
    }
    ggml_metal_op_free(encoder);
    ggml_metal_fusion_info_free(fusion);
}

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
