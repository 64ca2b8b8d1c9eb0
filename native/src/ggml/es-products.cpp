#include "es-products.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace {

constexpr int QK        = 32; // values of a block
constexpr int FOURS_MAX = 8;  // groups of four rows for which a column is read once: they stay in the L2 cache

// eight columns of Q4_0: 8 bytes of the first column, 8 of the second, ..., each half a nibble ^ 8
struct Columns {
    uint16_t d[8];
    uint8_t  qs[QK * 4];
};
struct FourRows {
    uint16_t d[4];
    int8_t   qs[QK * 4]; // 8 of the first row, 8 of the second, ...
};
struct OneRow {
    uint16_t d;
    int8_t   qs[QK];
};
static_assert(sizeof(Columns) == 144 && sizeof(FourRows) == 136 && sizeof(OneRow) == 34, "ggml's layouts");

// What a block of four rows is multiplied with besides its bytes.
struct Factors {
    int32_t sum8[4]; // 8 times the sum of a row's values: a weight is its nibble less 8
    float   d[4];
};

inline void finish(Factors & f, __m256i sums, __m128i d) { // sums: two 32-bit parts of each row's
    const __m256i s = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums, sums), 0x08);
    _mm_storeu_si128((__m128i *) f.sum8, _mm256_castsi256_si128(s));
    _mm_storeu_ps(f.d, _mm_cvtph_ps(d));
}

// Where the bytes of a tile's rows are, and their factors.
struct Fours {
    const FourRows * rows;
    int64_t          n_blocks;

    const int8_t * at(int64_t b, int r, int k) const {
        return rows[r / 4 * n_blocks + b].qs + 32 * (k / 8) + 8 * (r % 4) + k % 8;
    }
    void prepare(Factors * out) const { // of the first four
        for (int64_t b = 0; b < n_blocks; ++b) {
            __m256i sum = _mm256_setzero_si256();
            for (int i = 0; i < 4; ++i) {
                const __m256i q = _mm256_loadu_si256((const __m256i *) rows[b].qs + i);
                sum             = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(1), q));
            }
            finish(out[b], _mm256_madd_epi16(sum, _mm256_set1_epi16(8)), _mm_loadl_epi64((const __m128i *) rows[b].d));
        }
    }
};
struct Ones {
    const OneRow * rows;
    int64_t        n_blocks;

    const int8_t * at(int64_t b, int r, int k) const { return rows[r * n_blocks + b].qs + k; }
    void           prepare(int n, Factors * out) const {
        for (int64_t b = 0; b < n_blocks; ++b) {
            for (int r = 0; r < n; ++r) {
                const OneRow & one = rows[r * n_blocks + b];
                const __m256i  q   = _mm256_loadu_si256((const __m256i *) one.qs);
                const __m256i  two = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
                const __m256i  s   = _mm256_madd_epi16(two, _mm256_set1_epi16(8));
                __m128i        t   = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
                t                  = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
                t                  = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1));
                out[b].sum8[r]     = _mm_cvtsi128_si32(t);
                out[b].d[r]        = _cvtsh_ss(one.d);
            }
        }
    }
};

inline __m256i fours(const int8_t * p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
}

// Sums of products of unsigned and signed bytes: of 16 nibbles with 16 values, they fit into 16 bits.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define INSTRUCTIONS "AVX-512 VNNI"
inline __m256i add_products(__m256i sum, __m256i w, __m256i y) {
    return _mm256_dpbusd_epi32(sum, w, y);
}
#elif defined(__AVXVNNI__)
#define INSTRUCTIONS "AVX-VNNI"
inline __m256i add_products(__m256i sum, __m256i w, __m256i y) {
    return _mm256_dpbusd_avx_epi32(sum, w, y);
}
#else
#define INSTRUCTIONS "AVX2"
#define IN_16_BITS
inline __m256i add_products(__m256i sum, __m256i w, __m256i y) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, y));
}
#endif

// N rows and eight columns. A row's sums do not depend on N.
template <int N, class Rows>
void tile(const Columns * columns, const Rows & rows, const Factors * factors, float * out, int64_t stride) {
    const int64_t n_blocks = rows.n_blocks;
    const __m256i mask     = _mm256_set1_epi8(15);
    // columns 0 4 1 5 2 6 3 7: so blends put four values of each side by side
    const __m128i order = _mm_set_epi8(15, 14, 7, 6, 13, 12, 5, 4, 11, 10, 3, 2, 9, 8, 1, 0);
    __m256        acc[N];
    for (int r = 0; r < N; ++r) {
        acc[r] = _mm256_setzero_ps();
    }
    for (int64_t b = 0; b < n_blocks; ++b) {
        __m256i sum[N];
        for (int r = 0; r < N; ++r) {
            sum[r] = _mm256_setzero_si256();
        }
        for (int i = 0; i < 2; ++i) { // values 8i to 8i + 7, and those 16 after them
            const __m256i * p     = (const __m256i *) columns[b].qs + 2 * i;
            const __m256i   sign  = _mm256_set1_epi8((char) 0x88);
            const __m256i   first = _mm256_xor_si256(_mm256_loadu_si256(p), sign);
            const __m256i   last  = _mm256_xor_si256(_mm256_loadu_si256(p + 1), sign);
            const __m256i   even  = _mm256_blend_epi32(first, _mm256_shuffle_epi32(last, 0xb1), 0xaa);
            const __m256i   odd   = _mm256_blend_epi32(_mm256_shuffle_epi32(first, 0xb1), last, 0xaa);
            const __m256i   w0    = _mm256_and_si256(even, mask);
            const __m256i   w1    = _mm256_and_si256(odd, mask);
            const __m256i   w2    = _mm256_and_si256(_mm256_srli_epi16(even, 4), mask);
            const __m256i   w3    = _mm256_and_si256(_mm256_srli_epi16(odd, 4), mask);
#pragma GCC unroll 8
            for (int r = 0; r < N; ++r) {
                sum[r] = add_products(sum[r], w0, fours(rows.at(b, r, 8 * i)));
                sum[r] = add_products(sum[r], w1, fours(rows.at(b, r, 8 * i + 4)));
                sum[r] = add_products(sum[r], w2, fours(rows.at(b, r, 8 * i + 16)));
                sum[r] = add_products(sum[r], w3, fours(rows.at(b, r, 8 * i + 20)));
            }
        }
        const __m256 d = _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *) columns[b].d), order));
#pragma GCC unroll 8
        for (int r = 0; r < N; ++r) {
            const Factors & f = factors[r / 4 * n_blocks + b];
#ifdef IN_16_BITS
            sum[r] = _mm256_madd_epi16(sum[r], _mm256_set1_epi16(1));
#endif
            sum[r] = _mm256_sub_epi32(sum[r], _mm256_set1_epi32(f.sum8[r % 4]));
            acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]), _mm256_mul_ps(d, _mm256_set1_ps(f.d[r % 4])), acc[r]);
        }
    }
    const __m256i back = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
    for (int r = 0; r < N; ++r) {
        _mm256_storeu_ps(out + r * stride, _mm256_permutevar8x32_ps(acc[r], back));
    }
}

bool wanted() {
    static const bool value = [] {
        const char * name = getenv("EDGE_STREAM_PRODUCTS");
        return !name || strcmp(name, "stock") != 0;
    }();
    return value;
}

} // namespace

bool es_products_q4_0(int64_t n, float * out, int64_t stride, const void * columns, const void * rows, int64_t n_rows,
                      int64_t n_columns) {
    if (!wanted()) {
        return false;
    }
    const int64_t                     n_blocks = n / QK, n_fours = n_rows / 4;
    const int                         n_left = (int) (n_rows % 4);
    const Ones                        ones   = { (const OneRow *) rows + 4 * n_fours * n_blocks, n_blocks };
    thread_local std::vector<Factors> factors;
    factors.resize((size_t) (n_blocks * std::max((int64_t) 1, std::min((int64_t) FOURS_MAX, n_fours))));
    Factors * f = factors.data();
    for (int64_t first = 0; first < n_fours; first += FOURS_MAX) {
        const int   n_now = (int) std::min((int64_t) FOURS_MAX, n_fours - first);
        const Fours fours = { (const FourRows *) rows + first * n_blocks, n_blocks };
        for (int i = 0; i < n_now; ++i) {
            Fours{ fours.rows + i * n_blocks, n_blocks }.prepare(f + i * n_blocks);
        }
        for (int64_t c = 0; c < n_columns; c += 8) {
            const Columns * from = (const Columns *) columns + c / 8 * n_blocks;
            for (int i = 0; i < n_now; i += 2) {
                const Fours now = { fours.rows + i * n_blocks, n_blocks };
                float *     to  = out + 4 * (first + i) * stride + c;
                (i + 1 < n_now ? tile<8, Fours> : tile<4, Fours>) (from, now, f + i * n_blocks, to, stride);
            }
        }
    }
    if (n_left > 0) {
        const auto of_rows = n_left == 1 ? tile<1, Ones> : n_left == 2 ? tile<2, Ones> : tile<3, Ones>;
        ones.prepare(n_left, f);
        for (int64_t c = 0; c < n_columns; c += 8) {
            of_rows((const Columns *) columns + c / 8 * n_blocks, ones, f, out + 4 * n_fours * stride + c, stride);
        }
    }
    return true;
}

const char * es_products_name(void) {
    return wanted() ? "edge-stream (" INSTRUCTIONS ")" : "stock";
}

#else // no such vectors on this machine

bool es_products_q4_0(int64_t, float *, int64_t, const void *, const void *, int64_t, int64_t) {
    return false;
}
const char * es_products_name(void) {
    return "stock";
}

#endif
