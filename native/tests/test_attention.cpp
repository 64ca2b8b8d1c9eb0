// Attention on the CPU (native/src/ggml/es-attention.cpp), through ggml's own graphs, against float64 over the numbers
// that the cache holds.

#include "es-attention.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace {

enum class Mask { none, causal, window, scattered, blind };

struct Case {
    ggml_type k_type = GGML_TYPE_F16, v_type = GGML_TYPE_F16;
    int       k_size = 64, v_size = 64; // dimensions of a head
    int       n_heads = 9, n_kv_heads = 3;
    int       n_tokens = 1, n_seqs = 1;
    int       n_cells   = 193;
    int       n_threads = 2;
    Mask      mask      = Mask::causal;
    bool      sinks     = false;
    float     softcap = 0.0f, max_bias = 0.0f;
    float     spread = 1.0f; // of scores
};

std::string name(const Case & c) {
    char text[256];
    snprintf(text, sizeof text,
             "%s/%s %d/%d heads %d/%d tokens %d seqs %d cells %d threads %d mask %d sinks %d cap %g bias %g spread %g",
             ggml_type_name(c.k_type), ggml_type_name(c.v_type), c.k_size, c.v_size, c.n_heads, c.n_kv_heads,
             c.n_tokens, c.n_seqs, c.n_cells, c.n_threads, (int) c.mask, c.sinks, c.softcap, c.max_bias, c.spread);
    return text;
}

using Numbers = std::vector<float>;

// Whether a token may see a cell, and what ALiBi multiplies there.
float mask_of(const Case & c, int seq, int token, int cell) {
    const int position = c.n_cells - c.n_tokens + token; // the last token is in the last cell
    bool      sees     = true;
    switch (c.mask) {
    case Mask::none: break;
    case Mask::causal: sees = cell <= position; break;
    case Mask::window: sees = cell <= position && (cell < 4 || cell > position - 70 - 13 * seq); break;
    case Mask::scattered: sees = (cell * 7 + seq * 3 + token) % 5 < 2 && cell / 40 % 3 != 1; break;
    case Mask::blind: sees = token != 0 && cell <= position; break; // the first token sees nothing
    }
    if (!sees) {
        return -std::numeric_limits<float>::infinity();
    }
    return c.max_bias > 0.0f ? -(float) std::abs(position - cell) : 0.0f;
}

struct Attention {
    Case           c;
    ggml_context * context;
    ggml_tensor *  result;
    ggml_cgraph *  graph;
    Numbers        q, k, v, sinks; // as the tensors hold them: [seq][token][head][], [seq][cell][kv head][]

    explicit Attention(const Case & what, unsigned seed = 1) : c(what) {
        context = ggml_init({ (size_t) 512 << 20, nullptr, false });
        std::mt19937 random(seed);

        // as llama.cpp's: a cell's heads are neighbours, and the tensors are views of them
        ggml_tensor * qt = ggml_new_tensor_4d(context, GGML_TYPE_F32, c.k_size, c.n_heads, c.n_tokens, c.n_seqs);
        q                = fill(random, qt, c.spread);
        const auto cache = [&](ggml_type type, int size, Numbers & numbers) {
            const int     n_all = c.n_cells + 5; // the cache is larger than what is read
            ggml_tensor * all   = ggml_new_tensor_3d(context, type, (int64_t) size * c.n_kv_heads, n_all, c.n_seqs);
            numbers             = fill(random, all, 1.0f);
            const size_t row    = ggml_row_size(type, size);
            return ggml_view_4d(context, all, size, c.n_cells, c.n_kv_heads, c.n_seqs, row * c.n_kv_heads, row,
                                row * c.n_kv_heads * n_all, 0);
        };
        ggml_tensor * kt   = cache(c.k_type, c.k_size, k);
        ggml_tensor * vt   = cache(c.v_type, c.v_size, v);
        ggml_tensor * mask = nullptr;
        if (c.mask != Mask::none) {
            mask = ggml_new_tensor_4d(context, GGML_TYPE_F16, c.n_cells, c.n_tokens, 1, c.n_seqs);
            for (int s = 0, i = 0; s < c.n_seqs; ++s) {
                for (int t = 0; t < c.n_tokens; ++t) {
                    for (int cell = 0; cell < c.n_cells; ++cell) {
                        ((ggml_fp16_t *) mask->data)[i++] = ggml_fp32_to_fp16(mask_of(c, s, t, cell));
                    }
                }
            }
        }
        result = ggml_flash_attn_ext(context, ggml_permute(context, qt, 0, 2, 1, 3), kt, vt, mask,
                                     1.0f / std::sqrt((float) c.k_size), c.max_bias, c.softcap);
        if (c.sinks) {
            ggml_tensor * st = ggml_new_tensor_1d(context, GGML_TYPE_F32, c.n_heads);
            sinks            = fill(random, st, 2.0f);
            ggml_flash_attn_ext_add_sinks(result, st);
        }
        graph = ggml_new_graph(context);
        ggml_build_forward_expand(graph, result);
    }
    ~Attention() { ggml_free(context); }
    Attention(const Attention &)             = delete;
    Attention & operator=(const Attention &) = delete;

    // Random numbers into a tensor. Returns what it holds after it was rounded to its type.
    static Numbers fill(std::mt19937 & random, ggml_tensor * tensor, float spread) {
        std::uniform_real_distribution<float> between(-1.7f * spread, 1.7f * spread); // variance spread^2
        Numbers                               numbers(ggml_nelements(tensor));
        for (float & x : numbers) {
            x = between(random);
        }
        ggml_quantize_chunk(tensor->type, numbers.data(), tensor->data, 0, ggml_nrows(tensor), tensor->ne[0], nullptr);
        if (tensor->type != GGML_TYPE_F32) {
            ggml_get_type_traits(tensor->type)->to_float(tensor->data, numbers.data(), (int64_t) numbers.size());
        }
        return numbers;
    }

    const float * compute() {
        memset(result->data, 0xff, ggml_nbytes(result));
        ggml_graph_compute_with_ctx(context, graph, c.n_threads);
        return (const float *) result->data;
    }

    // The result in float64.
    std::vector<double> reference() const {
        std::vector<double> out;
        const int           group = c.n_heads / c.n_kv_heads;
        const int           log2  = 1 << (int) std::floor(std::log2(c.n_heads));
        for (int s = 0; s < c.n_seqs; ++s) {
            for (int t = 0; t < c.n_tokens; ++t) {
                for (int h = 0; h < c.n_heads; ++h) {
                    const double  slope = c.max_bias <= 0 ? 1.0
                                          : h < log2      ? std::pow(2.0, -c.max_bias * (h + 1) / log2)
                                                          : std::pow(2.0, -c.max_bias * (h - log2 + 0.5) / log2);
                    const float * query = &q[((size_t) (s * c.n_tokens + t) * c.n_heads + h) * c.k_size];
                    const auto    row   = [&](int cell) {
                        return (size_t) (s * (c.n_cells + 5) + cell) * c.n_kv_heads + h / group;
                    };
                    double              largest = c.sinks ? sinks[h] : -INFINITY;
                    std::vector<double> scores(c.n_cells);
                    for (int cell = 0; cell < c.n_cells; ++cell) {
                        double score = 0;
                        for (int d = 0; d < c.k_size; ++d) {
                            score += (double) query[d] * k[row(cell) * c.k_size + d];
                        }
                        score *= (double) (1.0f / std::sqrt((float) c.k_size));
                        if (c.softcap != 0) {
                            score = c.softcap * std::tanh(score / c.softcap);
                        }
                        if (c.mask != Mask::none) {
                            score += slope * mask_of(c, s, t, cell);
                        }
                        scores[cell] = score;
                        largest      = std::max(largest, score);
                    }
                    std::vector<double> sum(c.v_size);
                    double              weight = c.sinks ? std::exp(sinks[h] - largest) : 0;
                    for (int cell = 0; cell < c.n_cells && largest > -INFINITY; ++cell) {
                        const double w = std::exp(scores[cell] - largest);
                        weight += w;
                        for (int d = 0; d < c.v_size; ++d) {
                            sum[d] += w * v[row(cell) * c.v_size + d];
                        }
                    }
                    for (double x : sum) {
                        out.push_back(weight > 0 ? x / weight : 0);
                    }
                }
            }
        }
        return out;
    }
};

double worst = 0;
int    n_bad = 0, n_cases = 0, n_asked = 0;

// ES_TEST_EVERY=N: only every Nth case, for builds that are slow.
int every() {
    static const int n = [] {
        const char * text = getenv("ES_TEST_EVERY");
        return text ? std::max(1, atoi(text)) : 1;
    }();
    return n;
}

// The error of each row of the result, as a fraction of the row's largest number, must be below 1e-5.
void check(const Case & c) {
    if (n_asked++ % every() != 0) {
        return;
    }
    Attention attention(c);
    assert(es_attention_work_size(attention.result, c.n_threads) > 0); // it is ours, not llama.cpp's
    const float *             out       = attention.compute();
    const std::vector<double> reference = attention.reference();
    double                    error     = 0;
    for (size_t row = 0; row < reference.size(); row += c.v_size) {
        double size = 0, difference = 0;
        for (size_t i = row; i < row + c.v_size; ++i) {
            assert(std::isfinite(out[i]));
            size       = std::max(size, std::abs(reference[i]));
            difference = std::max(difference, std::abs(out[i] - reference[i]));
        }
        error = std::max(error, size > 0 ? difference / size : difference);
    }
    ++n_cases;
    worst = std::max(worst, error);
    if (!(error <= 1e-5)) {
        ++n_bad;
        printf("%g: %s\n", error, name(c).c_str());
    }
    // the same number of threads, the same result
    const std::vector<float> first(out, out + reference.size());
    attention.compute();
    assert(memcmp(first.data(), out, first.size() * sizeof(float)) == 0);
}

const std::vector<ggml_type> TYPES = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };

void test_types_and_sizes() {
    for (ggml_type k_type : TYPES) {
        for (ggml_type v_type : TYPES) {
            for (int size : { 32, 64, 96, 128, 256 }) {
                Case c;
                c.k_type = k_type, c.v_type = v_type, c.k_size = c.v_size = size;
                for (int n_tokens : { 1, 2, 7, 16 }) {
                    c.n_tokens = n_tokens;
                    check(c);
                }
            }
        }
    }
}

// All numbers of rows that share a KV head, up to 16 tokens of groups of 1 to 8 heads.
void test_rows() {
    for (ggml_type type : TYPES) {
        for (int group : { 1, 2, 3, 4, 5, 7, 8 }) {
            for (int n_tokens = 1; n_tokens <= 16; ++n_tokens) {
                Case c;
                c.k_type = c.v_type = type;
                c.n_kv_heads        = 2;
                c.n_heads           = 2 * group;
                c.n_tokens          = n_tokens;
                c.n_cells           = 77;
                check(c);
            }
        }
    }
}

void test_windows() {
    for (int n_cells : { 1, 2, 3, 7, 31, 32, 33, 63, 65, 100, 127, 511, 513, 1000, 4099 }) {
        for (int n_threads : { 1, 2, 3, 8 }) {
            for (Mask mask : { Mask::none, Mask::window, Mask::scattered }) {
                if (n_cells > 1000 && n_threads != 3) {
                    continue;
                }
                Case c;
                c.n_cells = n_cells, c.n_threads = n_threads, c.mask = mask;
                check(c);
                c.k_type = GGML_TYPE_Q8_0, c.v_type = GGML_TYPE_Q4_0;
                c.n_tokens = std::min(3, n_cells);
                check(c);
            }
        }
    }
}

void test_kinds_of_attention() {
    for (ggml_type type : TYPES) {
        for (int n_tokens : { 1, 5 }) {
            for (int n_seqs : { 1, 3 }) {
                for (Mask mask : { Mask::causal, Mask::window, Mask::scattered, Mask::blind }) {
                    Case c;
                    c.k_type = c.v_type = type;
                    c.n_tokens = n_tokens, c.n_seqs = n_seqs, c.mask = mask, c.n_threads = 3;
                    check(c);
                    c.sinks = true;
                    check(c);
                    c.softcap = 20, c.spread = 30;
                    check(c);
                    c.spread = 0.01f;
                    check(c);
                    c.sinks = false, c.softcap = 0, c.spread = 1, c.max_bias = 8;
                    check(c);
                    c.max_bias = 0, c.spread = 10; // one cell has nearly all the weight
                    check(c);
                }
            }
            for (int n_seqs : { 1, 2 }) {
                check({ type, type, 192, 128, 12, 4, n_tokens, n_seqs });
                check({ type, type, 576, 512, 16, 1, n_tokens, n_seqs });
                check({ type, type, 64, 64, 71, 1, n_tokens, n_seqs });
            }
        }
    }
}

// Alone or with others, a sequence's result is the same to the bit.
void test_together() {
    for (ggml_type type : TYPES) {
        Case c;
        c.k_type = c.v_type = type;
        c.n_seqs = 4, c.n_cells = 600;
        Attention     together(c);
        const float * all = together.compute();
        const size_t  n   = (size_t) c.v_size * c.n_heads;
        for (int s = 0; s < c.n_seqs; ++s) {
            c.n_seqs = 1;
            Attention alone(c);
            c.n_seqs                   = 4;
            const ggml_tensor * from[] = { together.result->src[0], together.result->src[1], together.result->src[2] };
            ggml_tensor *       to[]   = { alone.result->src[0], alone.result->src[1], alone.result->src[2] };
            for (int i = 0; i < 3; ++i) {
                memcpy(to[i]->data, (const char *) from[i]->data + s * from[i]->nb[3], from[i]->nb[3]);
            }
            assert(memcmp(alone.compute(), all + s * n, n * sizeof(float)) == 0);
        }
    }
}

// Alone or with others, whatever these see, a token's result is the same to the bit. (Values of quantised types are
// scaled at other places for many rows.)
void test_tokens_together() {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        for (Mask mask : { Mask::causal, Mask::window, Mask::scattered }) {
            Case c;
            c.k_type = c.v_type = type;
            c.n_tokens = 16, c.n_cells = 200, c.n_threads = 3, c.mask = mask;
            Attention     together(c);
            const float * all = together.compute();
            const size_t  n   = (size_t) c.v_size * c.n_heads;
            const int     end = c.n_tokens;
            c.n_tokens        = 1;
            for (int t = 0; t < end; ++t) {
                Attention alone(c);
                for (int i : { 1, 2 }) {
                    memcpy(alone.result->src[i]->data, together.result->src[i]->data,
                           ggml_nbytes(together.result->src[i]));
                }
                const ggml_tensor *q = together.result->src[0], *seen = together.result->src[3];
                const ggml_tensor *to = alone.result->src[0], *to_seen = alone.result->src[3];
                for (int head = 0; head < c.n_heads; ++head) {
                    memcpy((char *) to->data + head * to->nb[2],
                           (const char *) q->data + t * q->nb[1] + head * q->nb[2], q->ne[0] * sizeof(float));
                }
                memcpy(to_seen->data, (const char *) seen->data + t * seen->nb[1], seen->ne[0] * seen->nb[0]);
                assert(memcmp(alone.compute(), all + t * n, n * sizeof(float)) == 0);
            }
        }
    }
}

// Prompts: more tokens than are worked on together.
void test_prompts() {
    for (ggml_type type : TYPES) {
        for (Mask mask : { Mask::none, Mask::causal, Mask::window, Mask::scattered, Mask::blind }) {
            for (int n_tokens : { 17, 31, 33, 100 }) {
                Case c;
                c.k_type = c.v_type = type;
                c.n_tokens = n_tokens, c.mask = mask, c.n_threads = 1 + n_tokens % 3, c.n_seqs = 1 + n_tokens % 2;
                check(c);
                c.sinks = true, c.n_heads = 4, c.n_kv_heads = 4, c.k_size = 96, c.v_size = 32;
                check(c);
                c.softcap = 20, c.spread = 30, c.n_kv_heads = 1;
                check(c);
                c.softcap = 0, c.spread = 1, c.max_bias = mask == Mask::none ? 0.0f : 8.0f, c.n_cells = 300;
                check(c);
            }
        }
    }
    check({ GGML_TYPE_F16, GGML_TYPE_F16, 64, 64, 9, 3, 250, 1, 700, 2 });
}

// What it does not take is llama.cpp's, and computed.
void test_left_to_llama() {
    Case odd, other;
    odd.k_size = odd.v_size = 80;
    other.k_type = other.v_type = GGML_TYPE_Q5_0;
    for (const Case & c : { odd, other }) {
        Attention attention(c);
        assert(es_attention_work_size(attention.result, c.n_threads) == 0);
        const float *             out       = attention.compute();
        const std::vector<double> reference = attention.reference();
        for (size_t i = 0; i < reference.size(); ++i) {
            assert(std::abs(out[i] - reference[i]) < 0.05);
        }
    }
}

// What nobody sees is not read: a cell that was never written may hold anything.
void test_unseen_cells() {
    Case c;
    c.k_type = c.v_type = GGML_TYPE_F32;
    c.n_cells           = 100;
    c.mask              = Mask::window;
    Attention                 attention(c);
    const std::vector<double> reference = attention.reference();
    for (int i = 1; i <= 2; ++i) {
        const ggml_tensor * t = attention.result->src[i];
        for (int cell = 0; cell < c.n_cells; ++cell) {
            if (std::isinf(mask_of(c, 0, 0, cell))) {
                memset((char *) t->data + cell * t->nb[1], 0xff, t->nb[1]); // NaN
            }
        }
    }
    const float * out = attention.compute();
    for (size_t i = 0; i < reference.size(); ++i) {
        assert(std::abs(out[i] - reference[i]) < 1e-5);
    }
}

} // namespace

int main() {
    test_types_and_sizes();
    test_rows();
    test_windows();
    test_kinds_of_attention();
    test_together();
    test_tokens_together();
    test_prompts();
    test_left_to_llama();
    test_unseen_cells();
    printf("%d cases, largest error %.2g of a row's largest number\n", n_cases, worst);
    return n_bad != 0;
}
