// Products on the CPU (native/src/ggml/es-products.cpp), through ggml's own graphs, against float64.
//
// The rows are whole multiples of a power of two, so that ggml's quantisation of them is exact.

#include "es-products.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

// where llama.cpp puts weights that it packs in another order
ggml_backend_buffer_type_t packed_type() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    assert(cpu);
    auto get = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts");
    assert(get);
    ggml_backend_buffer_type_t * types = get(cpu);
    for (; types && *types; ++types) {
        if (std::string(ggml_backend_buft_name(*types)) == "CPU_REPACK") {
            return *types;
        }
    }
    return nullptr;
}

// Returns the products, [rows][columns].
std::vector<float> multiply(ggml_backend_buffer_type_t type, int64_t n, int64_t n_columns, int64_t n_rows,
                            const std::vector<uint8_t> & weights, const float * rows, int n_threads) {
    ggml_init_params params  = { 16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context *   ctx_w   = ggml_init(params);
    ggml_context *   ctx     = ggml_init(params);
    ggml_tensor *    w       = ggml_new_tensor_2d(ctx_w, GGML_TYPE_Q4_0, n, n_columns);
    ggml_backend_t   backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, n_threads);
    ggml_backend_buffer_t buffer_w = ggml_backend_alloc_ctx_tensors_from_buft(ctx_w, type);
    assert(buffer_w);
    ggml_backend_tensor_set(w, weights.data(), 0, weights.size());
    ggml_tensor *         x      = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n_rows);
    ggml_tensor *         y      = ggml_mul_mat(ctx, w, x);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    ggml_backend_tensor_set(x, rows, 0, sizeof(float) * n * n_rows);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);
    assert(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);
    std::vector<float> out((size_t) (n_columns * n_rows));
    ggml_backend_tensor_get(y, out.data(), 0, sizeof(float) * out.size());
    ggml_backend_buffer_free(buffer);
    ggml_backend_buffer_free(buffer_w);
    ggml_backend_free(backend);
    ggml_free(ctx);
    ggml_free(ctx_w);
    return out;
}

// ES_TEST_EVERY=N: only every Nth case, for builds that are slow.
int every() {
    const char * text = getenv("ES_TEST_EVERY");
    return text ? std::max(1, atoi(text)) : 1;
}

double check(ggml_backend_buffer_type_t type, int64_t n, int64_t n_columns, int64_t n_rows, int n_threads, int seed) {
    std::mt19937                       random((unsigned) seed);
    std::uniform_int_distribution<int> nibble(0, 15), whole(-127, 127), exponent(-12, -2);

    // a block of Q4_0: a half float, then values 0 to 15 in the low and 16 to 31 in the high halves of 16 bytes
    const size_t         n_blocks = (size_t) (n * n_columns / 32);
    std::vector<uint8_t> weights;
    std::vector<float>   values; // [n_columns][n]
    for (size_t b = 0; b < n_blocks; ++b) {
        const float scale   = std::ldexp((float) (1 + nibble(random)) * (seed % 2 ? -1.0f : 1.0f), exponent(random));
        const ggml_fp16_t d = ggml_fp32_to_fp16(scale);
        assert(ggml_fp16_to_fp32(d) == scale);
        int q[32];
        for (int & i : q) {
            i = seed % 3 == 0 ? 15 : nibble(random); // the largest sums
            values.push_back(scale * (float) (i - 8));
        }
        weights.insert(weights.end(), (const uint8_t *) &d, (const uint8_t *) &d + 2);
        for (int i = 0; i < 16; ++i) {
            weights.push_back((uint8_t) (q[i] | q[i + 16] << 4));
        }
    }
    std::vector<float> rows((size_t) (n * n_rows));
    for (size_t i = 0; i < rows.size(); i += 32) {
        const int e = exponent(random);
        for (size_t j = 0; j < 32; ++j) {
            rows[i + j] = std::ldexp((float) (j == 5 ? 127 : seed % 3 == 0 ? -127 : whole(random)), e);
        }
    }
    const std::vector<float> got   = multiply(type, n, n_columns, n_rows, weights, rows.data(), n_threads);
    double                   worst = 0;
    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t c = 0; c < n_columns; ++c) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < n; ++i) {
                const double term = (double) values[(size_t) (c * n + i)] * rows[(size_t) (r * n + i)];
                sum += term;
                size += std::fabs(term);
            }
            worst = std::max(worst, std::fabs(got[(size_t) (r * n_columns + c)] - sum) / (size + 1e-30));
        }
    }
    // a row alone
    for (int64_t r = 0; r < n_rows; r += std::max((int64_t) 1, n_rows / 5)) {
        const std::vector<float> alone = multiply(type, n, n_columns, 1, weights, rows.data() + r * n, n_threads);
        assert(std::equal(alone.begin(), alone.end(), got.begin() + r * n_columns));
    }
    return worst;
}

} // namespace

int main() {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_buffer_type_t type = packed_type();
    if (!type) {
        printf("this machine packs no weights\n");
        return 0;
    }
    printf("products: %s\n", es_products_name());
    double worst = 0;
    int    n     = 0;
    for (const int64_t size : { 32, 64, 576, 1536 }) {
        for (const int64_t n_columns : { 8, 24, 104, 192 }) {
            for (const int64_t n_rows : { 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 15, 16, 31, 32, 33, 35, 36, 67 }) {
                if (n % every() == 0) {
                    worst = std::max(worst, check(type, size, n_columns, n_rows, 1 + n % 3, n));
                }
                ++n;
            }
        }
    }
    printf("%d cases, worst %.2g of the sum of absolute terms\n", n / every(), worst);
    return worst < 1e-6 ? 0 : 1;
}
