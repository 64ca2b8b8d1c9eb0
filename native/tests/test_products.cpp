// Products on the CPU (native/src/ggml/es-products.cpp), through ggml's own graphs and its buffer of repacked matrices,
// against float64 over the numbers that the matrix holds.

#include "es-products.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace {

using Numbers = std::vector<float>;

ggml_backend_buffer_type_t repacked() {
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto         types  = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * type = types(device); type && *type; ++type) {
        if (strcmp(ggml_backend_buft_name(*type), "CPU_REPACK") == 0) {
            return *type;
        }
    }
    return nullptr;
}

struct Case {
    ggml_type type;
    int       size, n_columns, n_rows; // of the numbers that are added up; of the matrix; of what it is multiplied with
    int       n_planes = 1;            // third dimension of the latter
};

// What Q8_0 makes of numbers, as llama.cpp rounds them.
Numbers rounded(const Numbers & x) {
    const auto *      q8 = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0);
    std::vector<char> bytes(ggml_row_size(GGML_TYPE_Q8_0, (int64_t) x.size()));
    Numbers           out(x.size());
    q8->from_float(x.data(), bytes.data(), (int64_t) x.size());
    ggml_get_type_traits(GGML_TYPE_Q8_0)->to_float(bytes.data(), out.data(), (int64_t) x.size());
    return out;
}

struct Product {
    Case                  c;
    ggml_context *        context;
    ggml_backend_t        backend;
    ggml_backend_buffer_t matrix_buffer, buffer;
    ggml_tensor *         result;
    ggml_cgraph *         graph;
    Numbers               matrix, x;

    explicit Product(const Case & what, unsigned seed, int n_threads) : c(what) {
        context = ggml_init({ (size_t) 1 << 20, nullptr, true });
        backend = ggml_backend_cpu_init();
        ggml_backend_cpu_set_n_threads(backend, n_threads);
        std::mt19937                          random(seed);
        std::uniform_real_distribution<float> between(-1.0f, 1.3f);

        ggml_tensor * m = ggml_new_tensor_2d(context, c.type, c.size, c.n_columns);
        matrix_buffer   = ggml_backend_buft_alloc_buffer(repacked(), ggml_nbytes(m));
        ggml_backend_tensor_alloc(matrix_buffer, m, ggml_backend_buffer_get_base(matrix_buffer));
        matrix.resize((size_t) c.size * c.n_columns);
        for (float & number : matrix) {
            number = between(random) + 0.1f * (float) (&number - matrix.data()) / (float) matrix.size();
        }
        std::vector<char> bytes(ggml_nbytes(m));
        ggml_quantize_chunk(c.type, matrix.data(), bytes.data(), 0, c.n_columns, c.size, nullptr);
        ggml_get_type_traits(c.type)->to_float(bytes.data(), matrix.data(), (int64_t) matrix.size());
        ggml_backend_tensor_set(m, bytes.data(), 0, bytes.size());

        ggml_tensor * xt = ggml_new_tensor_3d(context, GGML_TYPE_F32, c.size, c.n_rows, c.n_planes);
        result           = ggml_mul_mat(context, m, xt);
        graph            = ggml_new_graph(context);
        ggml_build_forward_expand(graph, result);
        buffer = ggml_backend_alloc_ctx_tensors(context, backend);
        x.resize((size_t) c.size * c.n_rows * c.n_planes);
        for (float & number : x) {
            number = between(random);
        }
        std::fill(x.begin(), x.begin() + 32, 0.0f); // a block of nothing
        std::fill(x.end() - 32, x.end(), 5.0f);     // and one where every number is the largest
        ggml_backend_tensor_set(xt, x.data(), 0, ggml_nbytes(xt));
    }
    ~Product() {
        ggml_backend_buffer_free(buffer);
        ggml_backend_buffer_free(matrix_buffer);
        ggml_backend_free(backend);
        ggml_free(context);
    }
    Product(const Product &)             = delete;
    Product & operator=(const Product &) = delete;

    Numbers compute() {
        memset(result->data, 0xff, ggml_nbytes(result));
        ggml_backend_graph_compute(backend, graph);
        Numbers out(ggml_nelements(result));
        ggml_backend_tensor_get(result, out.data(), 0, ggml_nbytes(result));
        return out;
    }
};

double worst   = 0;
int    n_cases = 0, n_bad = 0;

// Every number of the result must be within 1e-6 of the size of what was added up, beyond the rounding of x to 8 bits.
void check(const Case & c, unsigned seed, int n_threads) {
    Product       product(c, seed, n_threads);
    const Numbers out = product.compute(), x = rounded(product.x);
    double        error = 0;
    for (int row = 0; row < c.n_rows * c.n_planes; ++row) {
        for (int column = 0; column < c.n_columns; ++column) {
            double sum = 0, size = 0;
            for (int i = 0; i < c.size; ++i) {
                const double term =
                    (double) product.matrix[(size_t) column * c.size + i] * x[(size_t) row * c.size + i];
                sum += term;
                size += std::abs(term);
            }
            const double difference = std::abs(out[(size_t) row * c.n_columns + column] - sum);
            error                   = std::max(error, size > 0 ? difference / size : difference);
            assert(std::isfinite(out[(size_t) row * c.n_columns + column]));
        }
    }
    ++n_cases;
    worst = std::max(worst, error);
    if (!(error < 1e-6)) {
        ++n_bad;
        printf("%g: %s, %d x %d, %d rows, %d planes, %d threads\n", error, ggml_type_name(c.type), c.size, c.n_columns,
               c.n_rows, c.n_planes, n_threads);
    }
}

// A row's result is the same to the bit alone and among others, with any number of threads.
void check_alone(ggml_type type, int n_rows) {
    const Case    c = { type, 288, 96, n_rows };
    Product       together(c, 7, 2);
    const Numbers all = together.compute();
    for (int row = 0; row < n_rows; ++row) {
        Product alone({ type, c.size, c.n_columns, 1 }, 7, 3); // the same matrix
        assert(alone.matrix == together.matrix);
        ggml_backend_tensor_set(alone.result->src[1], together.x.data() + (size_t) row * c.size, 0,
                                c.size * sizeof(float));
        const Numbers one = alone.compute();
        assert(memcmp(one.data(), all.data() + (size_t) row * c.n_columns, one.size() * sizeof(float)) == 0);
    }
}

} // namespace

int main() {
    ggml_backend_load_all();
    if (strcmp(es_products_name(), "stock") == 0 || !repacked()) {
        printf("no products of ours on this machine\n");
        return 0;
    }
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1 }) {
        ggml_tensor matrix = {};
        matrix.type        = type;
        matrix.ne[0] = 64, matrix.ne[1] = 64, matrix.ne[2] = matrix.ne[3] = 1;
        assert(es_products_take(&matrix));
        matrix.ne[1] = 65; // columns are taken 8 or 16 at a time
        assert(!es_products_take(&matrix));
        matrix.ne[1] = 64, matrix.ne[2] = 2; // experts
        assert(!es_products_take(&matrix));

        for (int n_rows = 1; n_rows <= 64; ++n_rows) {
            check({ type, 64, 48, n_rows }, n_rows, 1 + n_rows % 3);
        }
        for (int size : { 32, 96, 576, 1536, 8192 }) {
            for (int n_columns : { 16, 80, 576 }) {
                for (int n_rows : { 1, 3, 5, 37 }) {
                    check({ type, size, n_columns, n_rows }, size + n_columns, 2);
                }
            }
        }
        check({ type, 256, 64, 3, 5 }, 1, 4);
        for (int n_rows : { 2, 5, 9, 31 }) {
            check_alone(type, n_rows);
        }
    }
    printf("%d cases, largest error %.2g of what was added up\n", n_cases, worst);
    return n_bad != 0;
}
