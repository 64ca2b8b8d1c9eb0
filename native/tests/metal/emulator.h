// Kernels of the Metal backend as functions that run one thread each: what metal_emulation.py writes around
// every kernel source, and what emulator.cpp runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <metal_stdlib>

namespace es_metal {

// where a kernel's parameter gets its value from
enum source {
    BUFFER,
    thread_position_in_threadgroup,
    threadgroup_position_in_grid,
    threads_per_threadgroup,
    thread_index_in_threadgroup,
    simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup,
    N_SOURCES,
};

struct call {
    const std::vector<const void *> * buffers; // by index
    uint32_t                          values[N_SOURCES][3];
};

typedef void (*kernel_fn)(const call &);

template <typename P>
P argument(const call & c, source from, size_t index) {
    if constexpr (std::is_reference_v<P>) {
        return *(std::remove_reference_t<P> *) c.buffers->at(index);
    } else if constexpr (std::is_pointer_v<P>) {
        return (P) c.buffers->at(index);
    } else if constexpr (std::is_integral_v<P>) {
        return P(c.values[from][0]);
    } else {
        const auto & v = c.values[from];
        P            p;
        for (size_t i = 0; i < 3; ++i) {
            p[i] = v[i];
        }
        return p;
    }
}

template <typename... P, size_t... I>
void run(void (*f)(P...), const call & c, const source (&from)[sizeof...(P)], std::index_sequence<I...>) {
    f(argument<P>(c, from[I], I)...);
}

template <typename... P>
void run(void (*f)(P...), const call & c, const source (&from)[sizeof...(P)]) {
    run(f, c, from, std::index_sequence_for<P...>());
}

// `lockstep`: the kernel's threads exchange values
int add_kernel(const char * name, kernel_fn fn, bool lockstep);
int add_constant(int index, void * value, size_t size);

} // namespace es_metal
