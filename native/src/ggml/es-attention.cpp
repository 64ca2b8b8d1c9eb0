#include "es-attention.h"

#include "ggml-cpu-impl.h"

#include "es-vectors.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#ifdef ES_VECTORS

namespace {

constexpr int FEW_TOKENS = 16;   // of a sequence; above, it is a prompt
constexpr int MAX_TOKENS = 32;   // of a prompt that are worked on together
constexpr int MAX_HEAD   = 1024; // dimensions
constexpr int TILE       = 32;   // cells that are worked on at a time
constexpr int BLOCK      = 32;   // numbers of a row that are read at a time, as quantised types store them
constexpr int MAX_ROWS   = 4;    // query rows that share what is read of K and V
constexpr int MANY_ROWS  = N_VECTORS == 32 ? 12 : 6; // the same in prompts: two sums of each fit into registers
constexpr int N_PARTS    = BLOCK / N_LANES;

constexpr uint16_t MASKED = 0xfc00; // -inf in f16

//
// cache types: block(row, i) is the i-th 32 numbers of a row, part(block, j) its j-th vector. scaled(x, block)
// multiplies by the scale that a quantised block has.
//

template <Vec (*read)(const void *), int SIZE>
struct Plain {
    using Block = const char *;
    static Block block(const char * row, int i) { return row + (size_t) i * BLOCK * SIZE; }
    static Vec   part(Block block, int j) { return read(block + j * N_LANES * SIZE); }
    static Vec   scaled(Vec x, Block) { return x; }
};
inline Vec v_f32(const void * p) {
    return v_load((const float *) p);
}
using F32  = Plain<v_f32, 4>;
using F16  = Plain<v_f16, 2>;
using BF16 = Plain<v_bf16, 2>;

struct ScaledBlock {
    const char * numbers;
    Vec          scale;
};
template <int SIZE>
struct Scaled {
    using Block = ScaledBlock;
    static Block block(const char * row, int i) {
        uint16_t     scale;
        const char * p = row + (size_t) i * SIZE;
        memcpy(&scale, p, sizeof scale);
        return { p + sizeof scale, v_set_f16(scale) };
    }
    static Vec scaled(Vec x, const Block & block) { return v_mul(x, block.scale); }
};
struct Q8_0 : Scaled<2 + BLOCK> {
    static Vec part(const Block & block, int j) { return v_i8(block.numbers + j * N_LANES); }
};
struct Q4_0 : Scaled<2 + BLOCK / 2> {
    // the first 16 numbers are the low halves of 16 bytes, the others the high ones
    static Vec part(const Block & block, int j) {
        return v_i4(block.numbers + j * N_LANES % (BLOCK / 2), j >= N_PARTS / 2);
    }
};

//
// kernels, for N_ROWS query rows
//

// Into the second cache: the first has no room for a tile beside the next one.
inline void prefetch(const char * p, size_t n) {
#if defined(__GNUC__)
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch(p + i, 0, 2);
    }
#else
    (void) p, (void) n;
#endif
}

// scores[row][cell] = q[row] . k[cell]. n_cells is a multiple of 8. `ahead`: where the next tile's cells are from
// these.
using Dot = void (*)(const float * const * q, const char * const * k, int n_cells, int n_blocks, size_t row_size,
                     const char * ahead, float (*scores)[TILE]);
// out[row] += sum of weights[row][cell] v[cell]
using Mix = void (*)(const float (*weights)[TILE], const char * const * v, int n_cells, int n_blocks, size_t row_size,
                     const char * ahead, float * const * out);

template <class Type, int N_ROWS>
void dot(const float * const * q, const char * const * k, int n_cells, int n_blocks, size_t row_size,
         const char * ahead, float (*scores)[TILE]) {
    // as many sums as registers hold, beside the queries and a key
    constexpr int N_CELLS = N_ROWS == 1 ? 8 : N_ROWS * 4 + N_ROWS < N_VECTORS ? 4 : 2;
    for (int cell = 0; cell < n_cells; cell += N_CELLS) {
        Vec sum[N_ROWS][N_CELLS];
        for (int r = 0; r < N_ROWS; ++r) {
            for (int c = 0; c < N_CELLS; ++c) {
                sum[r][c] = v_set(0.0f);
            }
        }
        for (int c = 0; ahead && c < N_CELLS; ++c) {
            prefetch(ahead + (cell + c) * row_size, row_size);
        }
        for (int b = 0; b < n_blocks; ++b) {
            typename Type::Block block[N_CELLS];
            for (int c = 0; c < N_CELLS; ++c) {
                block[c] = Type::block(k[cell + c], b);
            }
            for (int j = 0; j < N_PARTS; ++j) {
                Vec query[N_ROWS];
                for (int r = 0; r < N_ROWS; ++r) {
                    query[r] = v_load(q[r] + b * BLOCK + j * N_LANES);
                }
                for (int c = 0; c < N_CELLS; ++c) {
                    const Vec key = Type::scaled(Type::part(block[c], j), block[c]);
                    for (int r = 0; r < N_ROWS; ++r) {
                        sum[r][c] = v_fma(key, query[r], sum[r][c]);
                    }
                }
            }
        }
        if constexpr (N_CELLS == 2) {
            for (int r = 0; r < N_ROWS; r += 2) {
                float s[4];
                v_sum4(sum[r][0], sum[r][1], sum[r + 1][0], sum[r + 1][1], s);
                memcpy(&scores[r][cell], s, 2 * sizeof(float));
                memcpy(&scores[r + 1][cell], s + 2, 2 * sizeof(float));
            }
        } else {
            for (int r = 0; r < N_ROWS; ++r) {
                for (int c = 0; c < N_CELLS; c += 4) {
                    v_sum4(sum[r][c], sum[r][c + 1], sum[r][c + 2], sum[r][c + 3], &scores[r][cell + c]);
                }
            }
        }
    }
}

template <class Type, int N_ROWS>
void mix(const float (*weights)[TILE], const char * const * v, int n_cells, int n_blocks, size_t row_size,
         const char * ahead, float * const * out) {
    constexpr int PER_ROW = (N_VECTORS - 1 - N_ROWS) / N_ROWS; // sums that registers hold, beside weights and a value
    constexpr int N_SUMS  = PER_ROW >= N_PARTS ? N_PARTS : PER_ROW >= N_PARTS / 2 ? N_PARTS / 2 : N_PARTS / 4;
    static_assert(N_SUMS > 0, "too many rows for this many registers");
    for (int b = 0; b < n_blocks; ++b) {
        for (int first = 0; first < N_PARTS; first += N_SUMS) {
            const int at = b * BLOCK + first * N_LANES;
            Vec       sum[N_ROWS][N_SUMS];
            for (int r = 0; r < N_ROWS; ++r) {
                for (int j = 0; j < N_SUMS; ++j) {
                    sum[r][j] = v_load(out[r] + at + j * N_LANES);
                }
            }
            for (int c = 0; c < n_cells; ++c) {
                const typename Type::Block block = Type::block(v[c], b);
                if (ahead && b == 0 && first == 0) {
                    prefetch(ahead + c * row_size, row_size);
                }
                Vec weight[N_ROWS];
                for (int r = 0; r < N_ROWS; ++r) {
                    weight[r] = Type::scaled(v_set(weights[r][c]), block);
                }
                for (int j = 0; j < N_SUMS; ++j) {
                    const Vec value = Type::part(block, first + j);
                    for (int r = 0; r < N_ROWS; ++r) {
                        sum[r][j] = v_fma(value, weight[r], sum[r][j]);
                    }
                }
            }
            for (int r = 0; r < N_ROWS; ++r) {
                for (int j = 0; j < N_SUMS; ++j) {
                    v_store(out[r] + at + j * N_LANES, sum[r][j]);
                }
            }
        }
    }
}

template <class Type>
void unpack(const char * row, int n_blocks, float * out) {
    for (int b = 0; b < n_blocks; ++b) {
        const typename Type::Block block = Type::block(row, b);
        for (int j = 0; j < N_PARTS; ++j) {
            v_store(out + b * BLOCK + j * N_LANES, Type::scaled(Type::part(block, j), block));
        }
    }
}

// For prompts: out[row][c] (+)= sum over i of a[row][i] b[i][c], c below n_columns, a multiple of 32. b's rows are
// n_columns apart.
using Multiply = void (*)(const float * const * a, const float * b, int n, int n_columns, bool add,
                          float * const * out);

template <int N_ROWS>
void multiply(const float * const * a, const float * b, int n, int n_columns, bool add, float * const * out) {
    for (int c = 0; c < n_columns; c += 2 * N_LANES) {
        Vec sum[N_ROWS][2];
        for (int r = 0; r < N_ROWS; ++r) {
            sum[r][0] = add ? v_load(out[r] + c) : v_set(0.0f);
            sum[r][1] = add ? v_load(out[r] + c + N_LANES) : v_set(0.0f);
        }
        const float * p = b + c;
        for (int i = 0; i < n; ++i, p += n_columns) {
            const Vec b0 = v_load(p), b1 = v_load(p + N_LANES);
            for (int r = 0; r < N_ROWS; ++r) {
                const Vec x = v_set(a[r][i]);
                sum[r][0]   = v_fma(x, b0, sum[r][0]);
                sum[r][1]   = v_fma(x, b1, sum[r][1]);
            }
        }
        for (int r = 0; r < N_ROWS; ++r) {
            v_store(out[r] + c, sum[r][0]);
            v_store(out[r] + c + N_LANES, sum[r][1]);
        }
    }
}

template <int... N>
constexpr std::array<Multiply, MANY_ROWS> multiply_kernels(std::integer_sequence<int, N...>) {
    return { multiply<N + 1>... };
}
constexpr auto multiplies = multiply_kernels(std::make_integer_sequence<int, MANY_ROWS>()); // by rows, less 1

struct Kernels {
    Dot dot[MAX_ROWS]; // by number of rows, less 1
    Mix mix[MAX_ROWS];
    void (*unpack)(const char * row, int n_blocks, float * out);
};
template <class Type>
constexpr Kernels kernels = {
    { dot<Type, 1>, dot<Type, 2>, dot<Type, 3>, dot<Type, 4> },
    { mix<Type, 1>, mix<Type, 2>, mix<Type, 3>, mix<Type, 4> },
    unpack<Type>,
};

const Kernels * kernels_of(ggml_type type) {
    switch (type) {
    case GGML_TYPE_F32: return &kernels<F32>;
    case GGML_TYPE_F16: return &kernels<F16>;
    case GGML_TYPE_BF16: return &kernels<BF16>;
    case GGML_TYPE_Q8_0: return &kernels<Q8_0>;
    case GGML_TYPE_Q4_0: return &kernels<Q4_0>;
    default: return nullptr;
    }
}

//
// the work
//

// A cache tensor: head_size, n_cells, n_kv_heads, n_seqs.
struct Cache {
    const ggml_tensor * tensor;
    const Kernels *     kernels;
    int                 n_blocks;
    size_t              row_size; // bytes of a cell's head

    explicit Cache(const ggml_tensor * t)
        : tensor(t), kernels(kernels_of(t->type)), n_blocks((int) t->ne[0] / BLOCK),
          row_size(ggml_row_size(t->type, t->ne[0])) {}

    const char * row(int64_t cell, int64_t head, int64_t seq) const {
        return (const char *) tensor->data + cell * tensor->nb[1] + head * tensor->nb[2] + seq * tensor->nb[3];
    }
};

// What the op asks for. q: head_size, n_tokens, n_heads, n_seqs. Result: v's head_size, n_heads, n_tokens, n_seqs.
struct Job {
    const ggml_tensor *q, *mask, *sinks;
    Cache              k, v;
    int                n_tokens, n_heads, n_seqs, n_cells, n_kv_heads, group;
    float              scale, max_bias, softcap;

    explicit Job(const ggml_tensor * node)
        : q(node->src[0]), mask(node->src[3]), sinks(node->src[4]), k(node->src[1]), v(node->src[2]),
          n_tokens((int) q->ne[1]), n_heads((int) q->ne[2]), n_seqs((int) q->ne[3]), n_cells((int) k.tensor->ne[1]),
          n_kv_heads((int) k.tensor->ne[2]), group(n_heads / n_kv_heads) {
        memcpy(&scale, (const float *) node->op_params + 0, sizeof(float));
        memcpy(&max_bias, (const float *) node->op_params + 1, sizeof(float));
        memcpy(&softcap, (const float *) node->op_params + 2, sizeof(float));
    }

    bool takes() const {
        const auto fits = [&](const Cache & c) {
            const ggml_tensor * t = c.tensor;
            return c.kernels && t->ne[0] % BLOCK == 0 && t->ne[0] <= MAX_HEAD && t->nb[0] == ggml_type_size(t->type) &&
                   t->ne[1] == n_cells && t->ne[2] == n_kv_heads && n_seqs % t->ne[3] == 0;
        };
        const bool mask_fits = !mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(ggml_fp16_t) &&
                                         mask->ne[0] >= n_cells && mask->ne[2] == 1 && mask->ne[1] >= n_tokens);
        return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && fits(k) && fits(v) &&
               n_heads % n_kv_heads == 0 && mask_fits;
    }

    const float * query(int64_t seq, int64_t token, int64_t head) const {
        return (const float *) ((const char *) q->data + token * q->nb[1] + head * q->nb[2] + seq * q->nb[3]);
    }

    // Few tokens: threads share the cells. Many: they share the tokens.
    bool few() const { return n_tokens <= FEW_TOKENS; }

    // ALiBi's slope of a head; 1 without it
    float slope(int head) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int n = 1 << (int) std::floor(std::log2(n_heads));
        return head < n ? std::pow(2.0f, -max_bias * (head + 1) / n)
                        : std::pow(2.0f, -max_bias / 2.0f * (2 * (head - n) + 1) / n);
    }
};

// A thread's part of the work buffer, in floats. Of each row that it works on it has a sum over the cells that the
// thread has seen, the largest score there, and the sum of the weights, all relative to that score.
struct Scratch {
    int64_t keys, values, transposed, sums, size; // where each begins, and the whole
    int     row;                                  // from a row's sum to the next one's

    explicit Scratch(const Job & job) {
        row        = job.v.n_blocks * BLOCK + 16; // whole cache lines
        keys       = 0;
        values     = keys + TILE * job.k.n_blocks * BLOCK;
        transposed = values + TILE * job.v.n_blocks * BLOCK;
        sums       = transposed + (job.few() ? 0 : TILE * job.k.n_blocks * BLOCK);
        size       = sums + (job.few() ? (int64_t) job.n_seqs * job.n_tokens : MAX_TOKENS) * job.n_heads * row;
    }
};

struct Sum {
    float * out;
    float & largest;
    float & weight;
    Sum(float * p, int row) : out(p), largest(p[row - 16]), weight(p[row - 15]) {}
};

// Tokens of a sequence that are worked on together, and where their rows' sums are, all heads of a token in a row.
struct Tokens {
    int     seq, first, n;
    float * sums;
};

// TILE neighbouring cells, up to the last one that some token sees. Every cell has a place of its own, whoever else
// sees what, so that a token's sums are rounded alike alone and in a batch.
struct Tile {
    int          n; // cells, and n_padded
    int          n_padded;
    const char * k[TILE]; // head 0's rows; those that no token sees stand for the last cell's, and have no weight
    const char * v[TILE];
    float        bias[MAX_TOKENS][TILE]; // what the mask adds to scores; -inf from n on
    bool         sees[MAX_TOKENS];       // a token sees any of them
};

// The mask's rows for cells [at, at + TILE), as f16: masked beyond the last cell, 0 where there is no mask.
using MaskRows = uint16_t[MAX_TOKENS][TILE];

void read_mask(const Job & job, const Tokens & tokens, int at, MaskRows & rows) {
    const int n = std::min(TILE, job.n_cells - at);
    for (int t = 0; t < tokens.n; ++t) {
        if (job.mask) {
            const char * row = (const char *) job.mask->data + (tokens.first + t) * job.mask->nb[1] +
                               (tokens.seq % job.mask->ne[3]) * job.mask->nb[3];
            row += at * sizeof(uint16_t);
            n == TILE ? memcpy(rows[t], row, sizeof rows[t]) : memcpy(rows[t], row, n * sizeof(uint16_t));
        } else {
            memset(rows[t], 0, sizeof rows[t]);
        }
        std::fill(rows[t] + n, rows[t] + TILE, MASKED);
    }
}

// Which cells some token sees. Returns the end of the last one.
int seen_cells(const MaskRows & rows, int n_tokens, uint16_t (&seen)[TILE]) {
    for (int c = 0; c < TILE; ++c) {
        seen[c] = rows[0][c] != MASKED;
    }
    for (int t = 1; t < n_tokens; ++t) {
        for (int c = 0; c < TILE; ++c) {
            seen[c] |= rows[t][c] != MASKED;
        }
    }
    int n = 0;
    for (int c = 0; c < TILE; ++c) {
        n = seen[c] ? c + 1 : n;
    }
    return n;
}

// Fill `tile` with cells [at, at + TILE) of the tokens' sequence. False if none of them sees any.
bool read_tile(const Job & job, const Tokens & tokens, int at, Tile & tile) {
    MaskRows rows;
    uint16_t seen[TILE];
    read_mask(job, tokens, at, rows);
    tile.n = seen_cells(rows, tokens.n, seen);
    if (tile.n == 0) {
        return false;
    }
    const int64_t k_seq = tokens.seq / (job.n_seqs / job.k.tensor->ne[3]);
    const int64_t v_seq = tokens.seq / (job.n_seqs / job.v.tensor->ne[3]);
    for (int c = 0; c < tile.n; ++c) {
        const int cell = at + (seen[c] ? c : tile.n - 1);
        tile.k[c]      = job.k.row(cell, 0, k_seq);
        tile.v[c]      = job.v.row(cell, 0, v_seq);
    }
    tile.n_padded = (tile.n + 7) & ~7;
    std::fill(tile.k + tile.n, tile.k + tile.n_padded, tile.k[tile.n - 1]);
    for (int t = 0; t < tokens.n; ++t) {
        for (int c = 0; c < TILE; c += N_LANES) {
            v_store(tile.bias[t] + c, v_f16(rows[t] + c));
        }
        tile.sees[t] = std::any_of(rows[t], rows[t] + tile.n, [](uint16_t x) { return x != MASKED; });
    }
    return true;
}

// Scores of a row become its weights, relative to the largest score so far, and what it has summed follows.
void softmax(const Job & job, const float * bias, float slope, int n_sums, float * scores, Sum sum) {
    const Vec scale = v_set(job.softcap != 0.0f ? job.scale / job.softcap : job.scale);
    Vec       most  = v_set(-INFINITY);
    for (int c = 0; c < TILE; c += N_LANES) {
        Vec s = v_mul(v_load(scores + c), scale);
        if (job.softcap != 0.0f) {
            s = v_mul(v_tanh(s), v_set(job.softcap));
        }
        s = v_fma(v_load(bias + c), v_set(slope), s);
        v_store(scores + c, s);
        most = v_max(most, s);
    }
    const float largest = std::max(sum.largest, v_largest(most));
    if (largest > sum.largest) {
        const float shrink = std::exp(sum.largest - largest); // 0 at first
        for (int i = 0; i < n_sums; i += N_LANES) {
            v_store(sum.out + i, v_mul(v_load(sum.out + i), v_set(shrink)));
        }
        sum.weight *= shrink;
        sum.largest = largest;
    }
    Vec weight = v_set(0.0f);
    for (int c = 0; c < TILE; c += N_LANES) {
        const Vec w = v_exp(v_sub(v_load(scores + c), v_set(largest)));
        v_store(scores + c, w);
        weight = v_add(weight, w);
    }
    sum.weight += v_sum(weight);
}

// What a tile adds to the tokens' rows of the query heads that share a KV head.
// ahead: how far from it the thread's next tile is, in cells.
void attend(const Job & job, const Tokens & tokens, int kv_head, const Tile & tile, int ahead, const Scratch & scratch,
            float * work) {
    const int       n_rows   = tokens.n * job.group;
    const int       n_passes = (n_rows + MAX_ROWS - 1) / MAX_ROWS;
    const Kernels * kk       = job.k.kernels;
    const Kernels * vk       = job.v.kernels;
    const char *    k[TILE];
    const char *    v[TILE];
    const char *    k_ahead = tile.k[0] + ahead * job.k.tensor->nb[1] + kv_head * TILE * job.k.row_size;
    const char *    v_ahead = tile.v[0] + ahead * job.v.tensor->nb[1] + kv_head * TILE * job.v.row_size;
    for (int c = 0; c < tile.n_padded; ++c) {
        k[c] = tile.k[c] + kv_head * job.k.tensor->nb[2];
    }
    for (int c = 0; c < tile.n; ++c) {
        v[c] = tile.v[c] + kv_head * job.v.tensor->nb[2];
    }
    if (n_passes > 1) { // read the cache once
        for (int c = 0; c < tile.n; ++c) {
            float * key   = work + scratch.keys + c * job.k.n_blocks * BLOCK;
            float * value = work + scratch.values + c * job.v.n_blocks * BLOCK;
            prefetch(k_ahead + c * job.k.row_size, job.k.row_size);
            prefetch(v_ahead + c * job.v.row_size, job.v.row_size);
            kk->unpack(k[c], job.k.n_blocks, key);
            vk->unpack(v[c], job.v.n_blocks, value);
            k[c] = (const char *) key;
            v[c] = (const char *) value;
        }
        std::fill(k + tile.n, k + tile.n_padded, k[tile.n - 1]);
        kk = vk = &kernels<F32>;
        k_ahead = v_ahead = nullptr;
    }
    for (int pass = 0; pass < n_passes; ++pass) {
        const int     first = n_rows * pass / n_passes, n = n_rows * (pass + 1) / n_passes - first;
        const float * q[MAX_ROWS];
        float *       out[MAX_ROWS];
        float         scores[MAX_ROWS][TILE] = {};
        bool          sees                   = false;
        for (int r = 0; r < n; ++r) {
            const int token = (first + r) / job.group, head = kv_head * job.group + (first + r) % job.group;
            q[r]   = job.query(tokens.seq, tokens.first + token, head);
            out[r] = tokens.sums + ((int64_t) token * job.n_heads + head) * scratch.row;
            sees |= tile.sees[token];
        }
        if (!sees) {
            continue;
        }
        kk->dot[n - 1](q, k, tile.n_padded, job.k.n_blocks, job.k.row_size, k_ahead, scores);
        for (int r = 0; r < n; ++r) {
            const int token = (first + r) / job.group, head = kv_head * job.group + (first + r) % job.group;
            if (tile.sees[token]) {
                softmax(job, tile.bias[token], job.slope(head), job.v.n_blocks * BLOCK, scores[r],
                        Sum(out[r], scratch.row));
            } else {
                memset(scores[r], 0, sizeof scores[r]);
            }
        }
        vk->mix[n - 1](scores, v, tile.n, job.v.n_blocks, job.v.row_size, v_ahead, out);
    }
}

// The same for many rows: the tile is unpacked, its keys with a number of all cells side by side.
void attend_many(const Job & job, const Tokens & tokens, int kv_head, const Tile & tile, const Scratch & scratch,
                 float * work) {
    const int k_size = job.k.n_blocks * BLOCK, v_size = job.v.n_blocks * BLOCK;
    float *   keys = work + scratch.keys, *values = work + scratch.values, *transposed = work + scratch.transposed;
    for (int c = 0; c < tile.n; ++c) {
        job.k.kernels->unpack(tile.k[c] + kv_head * job.k.tensor->nb[2], job.k.n_blocks, keys + c * k_size);
        job.v.kernels->unpack(tile.v[c] + kv_head * job.v.tensor->nb[2], job.v.n_blocks, values + c * v_size);
    }
    // what a short tile lacks: any numbers, which the mask hides
    std::fill(keys + tile.n * k_size, keys + TILE * k_size, 0.0f);
    for (int c = 0; c < TILE; c += SQUARE) {
        for (int i = 0; i < k_size; i += SQUARE) {
            v_transpose(keys + c * k_size + i, k_size, transposed + i * TILE + c, TILE);
        }
    }
    const int n_rows   = tokens.n * job.group;
    const int n_passes = (n_rows + MANY_ROWS - 1) / MANY_ROWS;
    for (int pass = 0; pass < n_passes; ++pass) {
        const int     first = n_rows * pass / n_passes, end = n_rows * (pass + 1) / n_passes;
        const float * q[MANY_ROWS];
        float *       out[MANY_ROWS];
        float *       score[MANY_ROWS];
        const float * bias[MANY_ROWS];
        float         slope[MANY_ROWS];
        float         scores[MANY_ROWS][TILE];
        int           n = 0; // rows that see any of the tile
        for (int r = first; r < end; ++r) {
            const int token = r / job.group, head = kv_head * job.group + r % job.group;
            if (tile.sees[token]) {
                q[n]     = job.query(tokens.seq, tokens.first + token, head);
                out[n]   = tokens.sums + ((int64_t) token * job.n_heads + head) * scratch.row;
                score[n] = scores[n];
                bias[n]  = tile.bias[token];
                slope[n] = job.slope(head);
                ++n;
            }
        }
        if (n > 0) {
            multiplies[n - 1](q, transposed, k_size, TILE, false, score);
            for (int r = 0; r < n; ++r) {
                softmax(job, bias[r], slope[r], v_size, score[r], Sum(out[r], scratch.row));
            }
            multiplies[n - 1](score, values, tile.n, v_size, true, out);
        }
    }
}

// Nothing is summed yet in n_rows rows.
void clear(const Scratch & scratch, float * sums, int64_t n_rows) {
    for (int64_t r = 0; r < n_rows; ++r, sums += scratch.row) {
        memset(sums, 0, scratch.row * sizeof(float));
        Sum(sums, scratch.row).largest = -INFINITY;
    }
}

// Row r of the result from n sums of it, which are `apart` floats apart.
void write_row(const Job & job, const Scratch & scratch, float * sums, int64_t apart, int n, int64_t r,
               ggml_tensor * result) {
    const int   n_sums  = job.v.n_blocks * BLOCK;
    const float sink    = job.sinks ? ((const float *) job.sinks->data)[r % job.n_heads] : -INFINITY;
    float       largest = sink;
    for (int i = 0; i < n; ++i) {
        largest = std::max(largest, Sum(sums + i * apart, scratch.row).largest);
    }
    float * out    = (float *) ((char *) result->data + r * result->nb[1]);
    float   weight = sink > -INFINITY ? std::exp(sink - largest) : 0.0f;
    memset(out, 0, n_sums * sizeof(float));
    for (int i = 0; i < n; ++i) {
        const Sum sum(sums + i * apart, scratch.row);
        if (sum.weight != 0.0f) {
            const float factor = std::exp(sum.largest - largest);
            for (int j = 0; j < n_sums; j += N_LANES) {
                v_store(out + j, v_fma(v_load(sum.out + j), v_set(factor), v_load(out + j)));
            }
            weight += factor * sum.weight;
        }
    }
    const Vec share = v_set(weight != 0.0f ? 1.0f / weight : 0.0f); // 0 where a token sees nothing
    for (int j = 0; j < n_sums; j += N_LANES) {
        v_store(out + j, v_mul(v_load(out + j), share));
    }
}

// Few tokens: each thread sums over its share of the cells, then it merges all threads' sums of its share of the rows.
void few_tokens(const Job & job, const Scratch & scratch, const ggml_compute_params * params, float * all_work,
                ggml_tensor * result) {
    const int     ith = params->ith, nth = params->nth;
    const int64_t n_rows = (int64_t) job.n_seqs * job.n_tokens * job.n_heads;
    float *       work   = all_work + ith * scratch.size;
    clear(scratch, work + scratch.sums, n_rows);
    Tile tile;
    for (int seq = 0; seq < job.n_seqs; ++seq) {
        const Tokens tokens = { seq, 0, job.n_tokens,
                                work + scratch.sums + (int64_t) seq * job.n_tokens * job.n_heads * scratch.row };
        // in turns: which thread has a tile does not depend on what other tokens see
        for (int at = ith * TILE; at < job.n_cells; at += nth * TILE) {
            if (read_tile(job, tokens, at, tile)) {
                for (int kv_head = 0; kv_head < job.n_kv_heads; ++kv_head) {
                    attend(job, tokens, kv_head, tile, nth * TILE, scratch, work);
                }
            }
        }
    }
    ggml_barrier(params->threadpool);
    for (int64_t r = ith; r < n_rows; r += nth) {
        write_row(job, scratch, all_work + scratch.sums + r * scratch.row, scratch.size, nth, r, result);
    }
}

// Many tokens: threads take a few of them and a KV head as they come.
void many_tokens(const Job & job, const Scratch & scratch, const ggml_compute_params * params, float * work,
                 ggml_tensor * result) {
    const int n_parts = (job.n_tokens + MAX_TOKENS - 1) / MAX_TOKENS;
    const int n_items = job.n_seqs * job.n_kv_heads * n_parts;
    float *   sums    = work + scratch.sums;
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    Tile tile;
    for (int item = params->ith; item < n_items; item = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int    part = item % n_parts, kv_head = item / n_parts % job.n_kv_heads;
        const int    first  = (int) ((int64_t) job.n_tokens * part / n_parts);
        const int    end    = (int) ((int64_t) job.n_tokens * (part + 1) / n_parts);
        const Tokens tokens = { item / n_parts / job.n_kv_heads, first, end - first, sums };
        clear(scratch, sums, (int64_t) tokens.n * job.n_heads);
        for (int at = 0; at < job.n_cells; at += TILE) {
            if (read_tile(job, tokens, at, tile)) {
                attend_many(job, tokens, kv_head, tile, scratch, work);
            }
        }
        for (int t = 0; t < tokens.n; ++t) {
            for (int head = kv_head * job.group; head < (kv_head + 1) * job.group; ++head) {
                const int64_t r = ((int64_t) tokens.seq * job.n_tokens + first + t) * job.n_heads + head;
                write_row(job, scratch, sums + ((int64_t) t * job.n_heads + head) * scratch.row, 0, 1, r, result);
            }
        }
    }
}

bool wanted() {
    static const bool value = is_wanted("EDGE_STREAM_ATTENTION");
    return value;
}

} // namespace

size_t es_attention_work_size(const ggml_tensor * node, int n_threads) {
    const Job job(node);
    return wanted() && job.takes() ? Scratch(job).size * n_threads * sizeof(float) + 64 : 0;
}

bool es_attention(const ggml_compute_params * params, ggml_tensor * node) {
    const Job job(node);
    if (params->use_ref || !wanted() || !job.takes()) {
        return false;
    }
    const Scratch scratch(job);
    float *       work = (float *) (((uintptr_t) params->wdata + 63) & ~(uintptr_t) 63);
    GGML_ASSERT(es_attention_work_size(node, params->nth) <= params->wsize);
    if (job.few()) {
        few_tokens(job, scratch, params, work, node);
    } else {
        many_tokens(job, scratch, params, work + params->ith * scratch.size, node);
    }
    return true;
}

const char * es_attention_name(void) {
    return wanted() ? "edge-stream (" INSTRUCTIONS ")" : "stock";
}

#else // no vectors for this machine

size_t es_attention_work_size(const ggml_tensor *, int) {
    return 0;
}
bool es_attention(const ggml_compute_params *, ggml_tensor *) {
    return false;
}
const char * es_attention_name(void) {
    return "stock";
}

#endif
