// Vectors of float32 for es-attention.cpp and es-products.cpp, in the widest instructions that ggml's CPU backend is
// compiled for: AVX-512F, AVX2 with FMA and F16C, NEON of 64-bit ARM. Without any of them ES_VECTORS is not defined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#define ES_VECTORS
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define ES_VECTORS
#endif

#ifdef ES_VECTORS

namespace {

// Whether an environment variable leaves our code on: it is not "stock".
inline bool is_wanted(const char * variable) {
    const char * value = std::getenv(variable);
    return !value || std::strcmp(value, "stock") != 0;
}

#if defined(__AVX512F__)

#define INSTRUCTIONS "AVX-512"
using Vec               = __m512;
constexpr int N_LANES   = 16;
constexpr int N_VECTORS = 32; // registers

inline Vec v_set(float x) {
    return _mm512_set1_ps(x);
}
inline Vec v_load(const float * p) {
    return _mm512_loadu_ps(p);
}
inline void v_store(float * p, Vec x) {
    _mm512_storeu_ps(p, x);
}
inline Vec v_max(Vec a, Vec b) {
    return _mm512_max_ps(a, b);
}
inline Vec v_min(Vec a, Vec b) {
    return _mm512_min_ps(a, b);
}
inline Vec v_fma(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
} // a * b + c
inline Vec v_round(Vec x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 2^x for whole x from -127 (as 0) to 127
inline Vec v_pow2(Vec x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(127)), 23));
}
inline Vec v_f16(const void * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}
inline Vec v_set_f16(uint16_t x) {
    return _mm512_cvtph_ps(_mm256_set1_epi16((short) x));
}
inline Vec v_bf16(const void * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
inline Vec v_i8(const void * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}
// the low or the high half of each byte, less 8
inline Vec v_i4(const void * p, bool high) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p));
    const __m512i n = high ? _mm512_srli_epi32(x, 4) : _mm512_and_si512(x, _mm512_set1_epi32(15));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(n, _mm512_set1_epi32(8)));
}
inline __m256 v_halves(Vec x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
}
// the sums of four vectors' lanes
inline void v_sum4(Vec a, Vec b, Vec c, Vec d, float * out) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(v_halves(a), v_halves(b)), _mm256_hadd_ps(v_halves(c), v_halves(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
// the largest of a vector's lanes
inline float v_largest(Vec x) {
    return _mm512_reduce_max_ps(x);
}

#elif defined(__AVX2__)

#define INSTRUCTIONS "AVX2"
using Vec               = __m256;
constexpr int N_LANES   = 8;
constexpr int N_VECTORS = 16;

inline Vec v_set(float x) {
    return _mm256_set1_ps(x);
}
inline Vec v_load(const float * p) {
    return _mm256_loadu_ps(p);
}
inline void v_store(float * p, Vec x) {
    _mm256_storeu_ps(p, x);
}
inline Vec v_max(Vec a, Vec b) {
    return _mm256_max_ps(a, b);
}
inline Vec v_min(Vec a, Vec b) {
    return _mm256_min_ps(a, b);
}
inline Vec v_fma(Vec a, Vec b, Vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline Vec v_round(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec v_pow2(Vec x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127)), 23));
}
inline Vec v_f16(const void * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}
inline Vec v_set_f16(uint16_t x) {
    return _mm256_cvtph_ps(_mm_set1_epi16((short) x));
}
inline Vec v_bf16(const void * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}
inline Vec v_i8(const void * p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)));
}
inline Vec v_i4(const void * p, bool high) {
    const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p));
    const __m256i n = high ? _mm256_srli_epi32(x, 4) : _mm256_and_si256(x, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(n, _mm256_set1_epi32(8)));
}
inline void v_sum4(Vec a, Vec b, Vec c, Vec d, float * out) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
inline float v_largest(Vec x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m        = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

#else // NEON

#define INSTRUCTIONS "NEON"
using Vec               = float32x4_t;
constexpr int N_LANES   = 4;
constexpr int N_VECTORS = 32;

inline Vec v_set(float x) {
    return vdupq_n_f32(x);
}
inline Vec v_load(const float * p) {
    return vld1q_f32(p);
}
inline void v_store(float * p, Vec x) {
    vst1q_f32(p, x);
}
inline Vec v_max(Vec a, Vec b) {
    return vmaxq_f32(a, b);
}
inline Vec v_min(Vec a, Vec b) {
    return vminq_f32(a, b);
}
inline Vec v_fma(Vec a, Vec b, Vec c) {
    return vfmaq_f32(c, a, b);
}
inline Vec v_round(Vec x) {
    return vrndnq_f32(x);
}
inline Vec v_pow2(Vec x) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(x), vdupq_n_s32(127)), 23));
}
inline Vec v_f16(const void * p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) p)));
}
inline Vec v_set_f16(uint16_t x) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x)));
}
inline Vec v_bf16(const void * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *) p), 16));
}
// four bytes at the bottom of a register; alone, since ARM's smallest vector is of eight
inline uint8x8_t v_bytes(const void * p) {
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return vreinterpret_u8_u32(vdup_n_u32(x));
}
inline Vec v_i8(const void * p) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(v_bytes(p))))));
}
inline Vec v_i4(const void * p, bool high) {
    const uint8x8_t x = v_bytes(p);
    const int8x8_t  n = vreinterpret_s8_u8(high ? vshr_n_u8(x, 4) : vand_u8(x, vdup_n_u8(15)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vsub_s8(n, vdup_n_s8(8))))));
}
inline void v_sum4(Vec a, Vec b, Vec c, Vec d, float * out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}
inline float v_largest(Vec x) {
    return vmaxvq_f32(x);
}

constexpr int SQUARE = 4;
// out[j][i] = in[i][j] for i and j below SQUARE; rows are in_row and out_row floats apart
inline void v_transpose(const float * in, size_t in_row, float * out, size_t out_row) {
    const float32x4_t   r0 = vld1q_f32(in), r1 = vld1q_f32(in + in_row);
    const float32x4_t   r2 = vld1q_f32(in + 2 * in_row), r3 = vld1q_f32(in + 3 * in_row);
    const float32x4x2_t a = vtrnq_f32(r0, r1), b = vtrnq_f32(r2, r3);
    vst1q_f32(out, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
    vst1q_f32(out + out_row, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
    vst1q_f32(out + 2 * out_row, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
    vst1q_f32(out + 3 * out_row, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
}

#endif

#ifndef __aarch64__
constexpr int SQUARE = 8;
// out[j][i] = in[i][j] for i and j below SQUARE; rows are in_row and out_row floats apart
inline void v_transpose(const float * in, size_t in_row, float * out, size_t out_row) {
    __m256 pair[8], four[8]; // of two rows: their numbers in turns; of four
    for (int i = 0; i < 8; i += 2) {
        const __m256 a = _mm256_loadu_ps(in + i * in_row), b = _mm256_loadu_ps(in + (i + 1) * in_row);
        pair[i]     = _mm256_unpacklo_ps(a, b);
        pair[i + 1] = _mm256_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 8; i += 4) {
        four[i]     = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(out + i * out_row, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * out_row, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
}
#endif

inline Vec v_add(Vec a, Vec b) {
    return a + b;
}
inline Vec v_sub(Vec a, Vec b) {
    return a - b;
}
inline Vec v_mul(Vec a, Vec b) {
    return a * b;
}
inline Vec v_div(Vec a, Vec b) {
    return a / b;
}

// the sum of a vector's lanes
inline float v_sum(Vec x) {
    float out[4];
    v_sum4(x, x, x, x, out);
    return out[0];
}

// e^x is power * (1 + part): power a power of two, part in [-0.3, 0.42], both from x in [-88, 88]. Below -87.7 power is
// 0.
struct ExpParts {
    Vec power, part;
};
inline ExpParts v_exp_parts(Vec x) {
    const Vec n = v_round(v_mul(x, v_set(1.44269504f)));
    // ln 2 in two pieces, the first with so few digits that its multiples are exact
    Vec r = v_fma(n, v_set(-0.693145751953125f), x);
    r     = v_fma(n, v_set(-1.42860682e-6f), r);
    Vec p = v_set(1.0f / 5040); // Taylor: |r| <= ln 2 / 2, where r^8 / 8! is 5e-9
    p     = v_fma(p, r, v_set(1.0f / 720));
    p     = v_fma(p, r, v_set(1.0f / 120));
    p     = v_fma(p, r, v_set(1.0f / 24));
    p     = v_fma(p, r, v_set(1.0f / 6));
    p     = v_fma(p, r, v_set(0.5f));
    return { v_pow2(n), v_fma(v_mul(p, r), r, r) };
}

// e^x for x <= 0, 0 for x < -87.7
inline Vec v_exp(Vec x) {
    const ExpParts e = v_exp_parts(v_max(v_set(-88.0f), x)); // in this order a NaN stays one
    return v_fma(e.power, e.part, e.power);
}

// tanh x = t / (t + 2) with t = e^2x - 1, which loses no digits near 0
inline Vec v_tanh(Vec x) {
    const Vec      y = v_max(v_min(v_add(x, x), v_set(40.0f)), v_set(-40.0f));
    const ExpParts e = v_exp_parts(y);
    const Vec      t = v_fma(e.power, e.part, v_sub(e.power, v_set(1.0f)));
    return v_div(t, v_add(t, v_set(2.0f)));
}

} // namespace

#endif
