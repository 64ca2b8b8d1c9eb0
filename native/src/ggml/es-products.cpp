#include "es-products.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "es-vectors.h"

// 8-bit products of x86: AVX2, or AVX-512 with BW and VL, which all but the first such processors have
#if defined(ES_VECTORS) && !defined(__aarch64__) &&                                                                    \
    (!defined(__AVX512F__) || (defined(__AVX512BW__) && defined(__AVX512VL__)))
#define ES_PRODUCTS
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define PRODUCTS "AVX-512 VNNI"
#elif !defined(__AVX512F__) && defined(__AVXVNNI__)
#define PRODUCTS "AVX-VNNI"
#else
#define PRODUCTS INSTRUCTIONS
#endif
#endif

#ifdef ES_PRODUCTS

namespace {

//
// instructions: a vector has four bytes of each of N_COLUMNS columns, or a 32-bit number of each
//

constexpr int N_COLUMNS = N_LANES;

#ifdef __AVX512F__

using Ints = __m512i;

inline Ints load(const void * p) {
    return _mm512_loadu_si512(p);
}
inline Ints zero() {
    return _mm512_setzero_si512();
}
// four bytes, for every column
inline Ints four(const int8_t * p) {
    int32_t x;
    memcpy(&x, p, sizeof x);
    return _mm512_set1_epi32(x);
}
inline Ints low(Ints x) {
    return _mm512_and_si512(x, _mm512_set1_epi8(15));
}
inline Ints high(Ints x) {
    return low(_mm512_srli_epi16(x, 4));
}
#ifdef __AVX512VNNI__
#define ES_BYTE_PRODUCTS
inline Ints add_products(Ints sum, Ints weights, Ints x) {
    return _mm512_dpbusd_epi32(sum, weights, x);
}
inline Vec total(Ints sum) {
    return _mm512_cvtepi32_ps(sum);
}
#else
inline Ints add_products(Ints sum, Ints weights, Ints x) {
    return _mm512_add_epi16(sum, _mm512_maddubs_epi16(weights, x));
}
inline Vec total(Ints sum) {
    return _mm512_cvtepi32_ps(_mm512_madd_epi16(sum, _mm512_set1_epi16(1)));
}
#endif

#else

using Ints = __m256i;

inline Ints load(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}
inline Ints zero() {
    return _mm256_setzero_si256();
}
// four bytes, for every column
inline Ints four(const int8_t * p) {
    int32_t x;
    memcpy(&x, p, sizeof x);
    return _mm256_set1_epi32(x);
}
inline Ints low(Ints x) {
    return _mm256_and_si256(x, _mm256_set1_epi8(15));
}
inline Ints high(Ints x) {
    return low(_mm256_srli_epi16(x, 4));
}
#ifdef __AVXVNNI__
#define ES_BYTE_PRODUCTS
inline Ints add_products(Ints sum, Ints weights, Ints x) {
    return _mm256_dpbusd_avx_epi32(sum, weights, x);
}
inline Vec total(Ints sum) {
    return _mm256_cvtepi32_ps(sum);
}
#else
// in 16 bits: weights must be small, see Halves
inline Ints add_products(Ints sum, Ints weights, Ints x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x));
}
inline Vec total(Ints sum) {
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
}
#endif

#endif

// Add now: a compiler that puts all products before all sums has no registers for them.
inline void in_order(Ints & sum) {
#ifdef __GNUC__
    asm("" : "+v"(sum));
#else
    (void) sum;
#endif
}

//
// layouts
//

constexpr int BLOCK    = 32;                      // numbers that share a scale
constexpr int MAX_ROWS = N_VECTORS == 32 ? 8 : 4; // that share what is unpacked of the matrix: registers hold no more

// 32 numbers of a row, rounded to 8 bits as Q8_0 does it
struct RowBlock {
    float  scale;
    float  offset; // what the matrix's zero adds
    int8_t numbers[BLOCK];
};

// As GGUF has a block of one column (a row of the tensor). Of 4 bits the low halves are its first 16 numbers.
struct Q8_0 {
    uint16_t scale;
    uint8_t  numbers[BLOCK];
};
struct Q4_0 {
    uint16_t scale;
    uint8_t  numbers[BLOCK / 2];
};
struct Q4_1 {
    uint16_t scale, least;
    uint8_t  numbers[BLOCK / 2];
};

// Integer products of a block of four bits: a vector of bytes has the numbers i to i + 3 and, in their high halves,
// i + 16 to i + 19. In 16 bits this is at most 8 * 2 * 15 * 127.
struct Halves {
    Ints sum = zero();

    struct Weights {
        Ints first, second;
        explicit Weights(Ints bytes) : first(low(bytes)), second(high(bytes)) {}
    };
    void add(const Weights & w, const int8_t * x) {
        sum = add_products(sum, w.first, four(x));
        in_order(sum);
        sum = add_products(sum, w.second, four(x + BLOCK / 2));
        in_order(sum);
    }
    Vec total() const { return ::total(sum); }
};

// Of eight bits, without sign.
#ifdef ES_BYTE_PRODUCTS
struct Bytes {
    Ints sum = zero();

    using Weights = Ints;
    void add(Ints w, const int8_t * x) { sum = add_products(sum, w, four(x)); }
    Vec  total() const { return ::total(sum); }
};
#else
// Products of whole bytes do not fit into 16 bits: their halves' do.
struct Bytes {
    Ints sum = zero(), sixteenths = zero();

    struct Weights {
        Ints low, high;
        explicit Weights(Ints bytes) : low(::low(bytes)), high(::high(bytes)) {}
    };
    void add(const Weights & w, const int8_t * x) {
        const Ints numbers = four(x);
        sum                = add_products(sum, w.low, numbers);
        sixteenths         = add_products(sixteenths, w.high, numbers);
        in_order(sum);
        in_order(sixteenths);
    }
    Vec total() const { return v_fma(::total(sixteenths), v_set(16.0f), ::total(sum)); } // exact: below 2^24
};
#endif

// One scale for every column, and a zero that is not 0.
struct OneScale {
    uint16_t scale[N_COLUMNS];

    template <class Column>
    void put_scales(const Column & column, int i) {
        scale[i] = column.scale;
    }
    // scale * (n - 8) * x = scale * (n * x + offset). The offset is exact (11 and 12 binary digits), so all that is
    // rounded is the term and the sum.
    struct Scales {
        Vec scale;
    };
    Scales     scales() const { return { v_f16(scale) }; }
    static Vec add(Vec sum, Vec total, const Scales & s, const RowBlock & row) {
        return v_fma(v_fma(total, v_set(row.scale), v_set(row.offset)), s.scale, sum);
    }
};

// The same block of N_COLUMNS columns: the bytes four by four.
template <class Column>
struct Packed;
template <>
struct Packed<Q8_0> : OneScale {
    uint8_t numbers[BLOCK / 4][N_COLUMNS][4];

    using Dots                    = Bytes;
    static constexpr uint8_t FLIP = 0x80; // n + 128 has no sign
    static constexpr float   ZERO = -128.0f;
};
template <>
struct Packed<Q4_0> : OneScale {
    uint8_t numbers[BLOCK / 8][N_COLUMNS][4];

    using Dots                    = Halves;
    static constexpr uint8_t FLIP = 0;
    static constexpr float   ZERO = -8.0f;
};
template <>
struct Packed<Q4_1> {
    uint16_t scale[N_COLUMNS], least[N_COLUMNS];
    uint8_t  numbers[BLOCK / 8][N_COLUMNS][4];

    using Dots                    = Halves;
    static constexpr uint8_t FLIP = 0;
    static constexpr float   ZERO = 1.0f;

    void put_scales(const Q4_1 & column, int i) {
        scale[i] = column.scale;
        least[i] = column.least;
    }
    struct Scales {
        Vec scale, least;
    };
    Scales     scales() const { return { v_f16(scale), v_f16(least) }; }
    static Vec add(Vec sum, Vec total, const Scales & s, const RowBlock & row) {
        return v_fma(v_mul(total, v_set(row.scale)), s.scale, v_fma(s.least, v_set(row.offset), sum));
    }
};

// The columns [begin, end), multiples of N_COLUMNS. data, out: the whole matrix
template <class Column>
void pack(const void * data, int64_t begin, int64_t end, int64_t n_blocks, void * out) {
    Packed<Column> * packed = (Packed<Column> *) out + begin / N_COLUMNS * n_blocks;
    for (int64_t first = begin; first < end; first += N_COLUMNS) {
        const Column * columns = (const Column *) data + first * n_blocks;
        for (int64_t b = 0; b < n_blocks; ++b, ++packed) {
            for (int c = 0; c < N_COLUMNS; ++c) {
                const Column & column = columns[c * n_blocks + b];
                packed->put_scales(column, c);
                for (size_t i = 0; i < sizeof column.numbers; i += 4) {
                    uint32_t four;
                    memcpy(&four, column.numbers + i, sizeof four);
                    four ^= Packed<Column>::FLIP * 0x01010101u;
                    memcpy(packed->numbers[i / 4][c], &four, sizeof four);
                }
            }
        }
    }
}

// Round a row. zero: see Packed.
void round_row(const float * x, int64_t n_blocks, float zero, RowBlock * out) {
    for (int64_t b = 0; b < n_blocks; ++b, x += BLOCK, ++out) {
        const __m256 part[] = { _mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _mm256_loadu_ps(x + 16),
                                _mm256_loadu_ps(x + 24) };
        const __m256 sign   = _mm256_set1_ps(-0.0f);
        const __m256 large =
            _mm256_max_ps(_mm256_max_ps(_mm256_andnot_ps(sign, part[0]), _mm256_andnot_ps(sign, part[1])),
                          _mm256_max_ps(_mm256_andnot_ps(sign, part[2]), _mm256_andnot_ps(sign, part[3])));
        __m128 m            = _mm_max_ps(_mm256_castps256_ps128(large), _mm256_extractf128_ps(large, 1));
        m                   = _mm_max_ps(m, _mm_movehl_ps(m, m));
        const float largest = _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));

        const __m256 factor = _mm256_set1_ps(largest != 0.0f ? 127.0f / largest : 0.0f);
        __m256i      n[4];
        for (int i = 0; i < 4; ++i) {
            n[i] = _mm256_cvtps_epi32(part[i] * factor); // to nearest, ties to even
        }
        const __m256i total = _mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
        __m128i       t     = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
        t                   = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
        t                   = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1));

        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
        _mm256_storeu_si256((__m256i *) out->numbers,
                            _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        out->scale  = _cvtsh_ss(_cvtss_sh(largest / 127.0f, _MM_FROUND_TO_NEAREST_INT));
        out->offset = out->scale * (float) _mm_cvtsi128_si32(t) * zero;
    }
}

//
// the product
//

// N_COLUMNS columns times n_rows rows, which begin n_blocks apart. A sum is added up in the same order, whatever the
// number of rows.
template <class Column, int N_ROWS>
void multiply(const void * columns, const RowBlock * rows, int64_t n_blocks, float * const * out) {
    const Packed<Column> * packed = (const Packed<Column> *) columns;
    Vec                    sum[N_ROWS];
    for (int r = 0; r < N_ROWS; ++r) {
        sum[r] = v_set(0.0f);
    }
    for (int64_t b = 0; b < n_blocks; ++b, ++packed, ++rows) {
        typename Packed<Column>::Dots dots[N_ROWS];
        for (size_t i = 0; i < sizeof packed->numbers / sizeof packed->numbers[0]; ++i) {
            const typename Packed<Column>::Dots::Weights weights(load(packed->numbers[i]));
            for (int r = 0; r < N_ROWS; ++r) {
                dots[r].add(weights, rows[r * n_blocks].numbers + 4 * i);
            }
        }
        const auto scales = packed->scales();
        for (int r = 0; r < N_ROWS; ++r) {
            sum[r] = Packed<Column>::add(sum[r], dots[r].total(), scales, rows[r * n_blocks]);
        }
    }
    for (int r = 0; r < N_ROWS; ++r) {
        v_store(out[r], sum[r]);
    }
}

using Multiply = void (*)(const void * columns, const RowBlock * rows, int64_t n_blocks, float * const * out);

template <class Column, int... N>
constexpr std::array<Multiply, MAX_ROWS> multiply_kernels(std::integer_sequence<int, N...>) {
    return { multiply<Column, N + 1>... };
}

struct Kernels {
    std::array<Multiply, MAX_ROWS> multiply; // by rows, less 1
    void (*pack)(const void * data, int64_t begin, int64_t end, int64_t n_blocks, void * out);
    size_t block_size; // bytes of N_COLUMNS columns
    float  zero;
};
template <class Column>
constexpr Kernels kernels = {
    multiply_kernels<Column>(std::make_integer_sequence<int, MAX_ROWS>()),
    pack<Column>,
    sizeof(Packed<Column>),
    Packed<Column>::ZERO,
};
template <class Column>
constexpr bool as_many_bytes = sizeof(Packed<Column>) == sizeof(Column) * N_COLUMNS;
static_assert(as_many_bytes<Q8_0> && as_many_bytes<Q4_0> && as_many_bytes<Q4_1>, "");

const Kernels * kernels_of(ggml_type type) {
    switch (type) {
    case GGML_TYPE_Q8_0: return &kernels<Q8_0>;
    case GGML_TYPE_Q4_0: return &kernels<Q4_0>;
    case GGML_TYPE_Q4_1: return &kernels<Q4_1>;
    default: return nullptr;
    }
}

bool wanted() {
    static const bool value = is_wanted("EDGE_STREAM_PRODUCTS");
    return value;
}

// Row i of a tensor, of all that its further dimensions have.
char * row_of(const ggml_tensor * t, int64_t i) {
    const int64_t i1 = i % t->ne[1], i2 = i / t->ne[1] % t->ne[2], i3 = i / t->ne[1] / t->ne[2];
    return (char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
}

} // namespace

bool es_products_take(const ggml_tensor * matrix) {
    return wanted() && kernels_of(matrix->type) && ggml_n_dims(matrix) == 2 && matrix->ne[1] % N_COLUMNS == 0;
}

void es_products_pack(ggml_tensor * matrix, const void * data) {
    // in a large matrix most of the time goes by while the system clears new pages, which threads can share
    constexpr int64_t PER_THREAD = 2 << 20;
    const Kernels *   k          = kernels_of(matrix->type);
    const int64_t     n_columns = matrix->ne[1], n_blocks = matrix->ne[0] / BLOCK;
    const int64_t     n_parts   = std::clamp<int64_t>(ggml_nbytes(matrix) / PER_THREAD, 1,
                                                      std::clamp(std::thread::hardware_concurrency(), 1u, 8u));
    const auto        at        = [&](int64_t part) { return n_columns / N_COLUMNS * part / n_parts * N_COLUMNS; };
    const auto        pack_part = [&](int64_t part) { k->pack(data, at(part), at(part + 1), n_blocks, matrix->data); };

    std::vector<std::thread> threads;
    int64_t                  next = 1;
    try {
        threads.reserve((size_t) n_parts);
        for (; next < n_parts; ++next) {
            threads.emplace_back(pack_part, next);
        }
    } catch (const std::exception &) {} // no more threads: this one packs the rest
    pack_part(0);
    for (; next < n_parts; ++next) {
        pack_part(next);
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

size_t es_products_work_size(const ggml_tensor * node) {
    return ggml_nelements(node->src[1]) / BLOCK * sizeof(RowBlock);
}

void es_products(const ggml_compute_params * params, ggml_tensor * node) {
    const ggml_tensor *matrix = node->src[0], *x = node->src[1];
    const Kernels *    k        = kernels_of(matrix->type);
    const int64_t      n_blocks = matrix->ne[0] / BLOCK, n_rows = ggml_nrows(x), n_groups = matrix->ne[1] / N_COLUMNS;
    RowBlock *         rows = (RowBlock *) params->wdata;
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && node->nb[0] == sizeof(float));
    GGML_ASSERT(es_products_work_size(node) <= params->wsize);

    // one row's blocks are shared, many rows are dealt out
    if (n_rows < params->nth) {
        const int64_t first = n_blocks * params->ith / params->nth, end = n_blocks * (params->ith + 1) / params->nth;
        for (int64_t r = 0; r < n_rows; ++r) {
            round_row((const float *) row_of(x, r) + first * BLOCK, end - first, k->zero, rows + r * n_blocks + first);
        }
    } else {
        for (int64_t r = params->ith; r < n_rows; r += params->nth) {
            round_row((const float *) row_of(x, r), n_blocks, k->zero, rows + r * n_blocks);
        }
    }

    // Threads take columns as they come. Of many rows as many are worked on at a time as fit into the first cache,
    // while the columns stay in the second.
    constexpr int64_t CACHED = 20 << 10;
    const int64_t at_once = std::max<int64_t>(MAX_ROWS, CACHED / (n_blocks * sizeof(RowBlock)) / MAX_ROWS * MAX_ROWS);
    const int64_t n_parts = std::min<int64_t>(n_groups, 4 * params->nth);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t part = params->ith; part < n_parts; part = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t begin = n_groups * part / n_parts, end = n_groups * (part + 1) / n_parts;
        for (int64_t tile = 0; tile < n_rows; tile += at_once) {
            const int64_t tile_end = std::min(tile + at_once, n_rows);
            for (int64_t group = begin; group < end; ++group) {
                const char * columns = (const char *) matrix->data + group * n_blocks * k->block_size;
                for (int64_t row = tile; row < tile_end; row += MAX_ROWS) {
                    const int n = (int) std::min<int64_t>(MAX_ROWS, tile_end - row);
                    float *   out[MAX_ROWS];
                    for (int r = 0; r < n; ++r) {
                        out[r] = (float *) row_of(node, row + r) + group * N_COLUMNS;
                    }
                    k->multiply[n - 1](columns, rows + row * n_blocks, n_blocks, out);
                }
            }
        }
    }
}

const char * es_products_name(void) {
    return wanted() ? "edge-stream (" PRODUCTS ")" : "stock";
}

#else // no instructions for this machine

bool es_products_take(const ggml_tensor *) {
    return false;
}
void   es_products_pack(ggml_tensor *, const void *) {}
size_t es_products_work_size(const ggml_tensor *) {
    return 0;
}
void         es_products(const ggml_compute_params *, ggml_tensor *) {}
const char * es_products_name(void) {
    return "stock";
}

#endif
