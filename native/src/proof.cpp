// Checks with a few tokens of the model itself that moving sinks gives what decoding them at their new positions gives:
// docs/models.md.
#include "aborts.h"
#include "bank.h"
#include "batch.h"
#include "error.h"
#include "llama-cpp.h"
#include "logits.h"
#include "stream.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int n_sinks = 4, n_probes = 4, n_tokens = n_sinks + n_probes;

// What counts as exact; docs/architecture.md has the measurements.
constexpr double bound_min = 1e-3, noise_factor = 5, spread_most = 0.2;

// the sequences of the proof's context
enum { AT_ZERO, AT_D, MOVED, TWICE, N_SEQ };

// The decodes that are compared. Keys and values are float32, so that the only noise is that of the model's arithmetic.
class prover {
public:
    prover(llama_context * like, llama_pos d, bool bank)
        : model(llama_get_model(like)), n_vocab(llama_vocab_n_tokens(llama_model_get_vocab(model))), d(d), bank(bank) {
        llama_context_params p = llama_context_default_params();
        p.n_ctx                = 64;
        p.n_batch = p.n_ubatch = 64;
        p.n_seq_max            = N_SEQ;
        p.kv_unified           = true;
        p.swa_full             = true;
        p.type_k = p.type_v = GGML_TYPE_F32;
        p.flash_attn_type   = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        p.n_threads = p.n_threads_batch = llama_n_threads(like);
        p.no_perf                       = true;
        ctx.reset(es_context_init(const_cast<llama_model *>(model), p));
    }

    int32_t run(es_proof & out) {
        if (!ctx || !batch.allocated()) {
            return es_fail(ES_ERR_MEMORY, "out of memory while verifying that the model streams exactly");
        }
        if (bank) {
            // from now on no cell is freed for being outside the SWA, and the rotation of keys is known
            const int32_t rc = es_bank_supported(ctx.get());
            if (rc != ES_OK) {
                return rc;
            }
        }
        // All sequences in one batch, which reads the weights once. Some of llama.cpp's graphs mix up sequences: then
        // they are decoded one by one, and the model can only serve one stream at a time. With quantised weights one
        // sample of noise says little, so a failure is repeated with other tokens: a wrong rotation fails with all.
        for (const bool together : { true, false }) {
            const int n_tries = together && rounding() > 0 ? 3 : 1;
            for (int i = 0; i < n_tries; ++i) {
                choose_tokens((uint32_t) i);
                if (!compare(out, together)) {
                    return failed();
                }
                out.parallel = together;
                if (std::max({ out.positions, out.move, out.rebase }) <= out.bound) {
                    return ES_OK;
                }
            }
        }
        return ES_OK;
    }

private:
    const llama_model * model;
    int32_t             n_vocab;
    llama_pos           d;
    bool                bank;
    llama_context_ptr   ctx;
    es_batch            batch{ 64 };
    llama_token         tokens[n_tokens + 1];
    bool                no_logits  = false;
    bool                no_numbers = false; // before any key is moved

    // Tokens first..last of a sequence, from position pos on; out gets the logits of those after the sinks.
    struct part {
        llama_seq_id         seq;
        int                  first, last;
        llama_pos            pos;
        std::vector<float> * out;
    };

    bool compare(es_proof & out, bool together) {
        llama_memory_clear(llama_get_memory(ctx.get()), true);
        if (!sinks(MOVED, bank ? 0 : d, bank) || !sinks(TWICE, 0, false) || !there_and_back() || (bank && !move())) {
            return false;
        }
        std::vector<float> zero, at_d, moved, twice, next, rebased;
        const int          probe = n_tokens - 1;
        if (!decode({ { AT_ZERO, 0, probe, 0, &zero },
                      { AT_D, 0, probe, d, &at_d },
                      { MOVED, n_sinks, probe, d + n_sinks, &moved },
                      { TWICE, n_sinks, probe, n_sinks, &twice } },
                    together)) {
            return false;
        }
        // rebase the window
        if (bank) {
            if (!shift(AT_D, -d)) {
                return false;
            }
        } else {
            llama_memory_seq_add(llama_get_memory(ctx.get()), AT_D, -1, -1, -d); // the next decode does it
        }
        if (!decode(
                { { AT_ZERO, n_tokens, n_tokens, n_tokens, &next }, { AT_D, n_tokens, n_tokens, n_tokens, &rebased } },
                together)) {
            return false;
        }
        out.distance  = d;
        out.noise     = difference(zero, twice);
        out.positions = difference(zero, at_d);
        out.move      = difference(at_d, moved);
        out.rebase    = difference(next, rebased);
        out.spread    = spread(zero);
        out.bound     = std::max(bound_min, std::min(noise_factor * out.noise, spread_most * out.spread));
        out.bound     = std::max(out.bound, rounding() * out.spread);
        return true;
    }

    int32_t failed() const {
        if (no_numbers) {
            return es_fail(ES_ERR_UNSUPPORTED, "this model computes no numbers (NaN or infinity)");
        }
        return no_logits ? es_fail(ES_ERR_UNSUPPORTED, "it predicts no tokens (an embedding model)")
                         : es_fail(ES_ERR_DECODE, "verifying that the model streams exactly failed");
    }

    // BOS if the model expects one, then tokens from all over the vocabulary; reproducible for the same i
    void choose_tokens(uint32_t i) {
        const llama_vocab * vocab = llama_model_get_vocab(model);
        uint32_t            x     = 2463534242u + i * 0x9e3779b9u; // xorshift32, Marsaglia 2003
        for (auto & token : tokens) {
            for (int tries = 0; tries < 1000; ++tries) {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                token = (llama_token) (x % (uint32_t) n_vocab);
                if (!llama_vocab_is_control(vocab, token) && !llama_vocab_is_eog(vocab, token)) {
                    break;
                }
            }
        }
        if (llama_vocab_get_add_bos(vocab)) {
            tokens[0] = llama_vocab_bos(vocab);
        }
    }

    void add(llama_seq_id seq, int token, llama_pos pos, bool logits) { batch.add(tokens[token], pos, seq, logits); }

    bool decode(const std::vector<part> & parts, bool together) {
        for (size_t i = 0; i < parts.size(); ++i) {
            if (i == 0 || !together) {
                batch.clear();
            }
            const part & p = parts[i];
            for (int t = p.first; t <= p.last; ++t) {
                add(p.seq, t, p.pos + t - p.first, t >= n_sinks);
            }
            if ((i + 1 == parts.size() || !together) && !decode_batch(parts)) {
                return false;
            }
        }
        return true;
    }

    bool decode_batch(const std::vector<part> & parts) {
        if (batch.decode(ctx.get()) != 0) {
            return false;
        }
        llama_synchronize(ctx.get());
        for (int32_t k = 0; k < batch.size(); ++k) {
            if (batch.has_logits(k)) {
                const float * row = llama_get_logits_ith(ctx.get(), k);
                const auto    p =
                    std::find_if(parts.begin(), parts.end(), [&](const part & q) { return q.seq == batch.seq(k); });
                if (!row) {
                    no_logits = true;
                    return false;
                }
                p->out->insert(p->out->end(), row, row + n_vocab);
            }
        }
        return true;
    }

    // Decodes the first n_sinks tokens on their own, as a stream does.
    bool sinks(llama_seq_id seq, llama_pos pos, bool capture) {
        if (capture && (llama_es_bank_alloc(ctx.get(), seq, ES_BANK_SINKS, n_sinks) != ES_BANK_OK ||
                        llama_es_bank_capture_begin(ctx.get(), seq, ES_BANK_SINKS, n_sinks, pos) != ES_BANK_OK)) {
            return false;
        }
        batch.clear();
        for (int i = 0; i < n_sinks; ++i) {
            add(seq, i, pos + i, i + 1 == n_sinks); // some graphs (Chameleon) need an output
        }
        const bool ok = batch.decode(ctx.get()) == 0;
        if (const float * row = ok ? llama_get_logits_ith(ctx.get(), n_sinks - 1) : nullptr) {
            no_numbers = !es_are_numbers(row, n_vocab);
        }
        return (!capture || llama_es_bank_capture_end(ctx.get(), seq, ES_BANK_SINKS, ok) == ES_BANK_OK) && ok &&
               !no_numbers;
    }

    bool move() {
        // without a window this moves only the position of a recurrent state
        return llama_es_bank_shift_window(ctx.get(), MOVED, d) == ES_BANK_OK &&
               llama_es_bank_move(ctx.get(), MOVED, ES_BANK_SINKS, d) == ES_BANK_OK;
    }

    // Keys rotated to D in two steps and back in one: the same keys up to the precision of float32 angles there. The
    // effect on the logits is the noise; quantised weights, which round their inputs, amplify it.
    bool there_and_back() {
        const llama_pos half = (llama_pos) (0.618 * d);
        return shift(TWICE, half) && shift(TWICE, d - half) && shift(TWICE, -d);
    }

    bool shift(llama_seq_id seq, llama_pos delta) {
        if (bank) {
            return llama_es_bank_shift_window(ctx.get(), seq, delta) == ES_BANK_OK;
        }
        // llama.cpp's own way, done at the next decode
        llama_memory_t mem = llama_get_memory(ctx.get());
        llama_memory_seq_add(mem, seq, -1, -1, delta);
        batch.clear();
        add(AT_ZERO, 0, 0, true);
        const bool ok = batch.decode(ctx.get()) == 0;
        llama_memory_seq_rm(mem, AT_ZERO, -1, -1);
        return ok;
    }

    // root mean square: the maximum of 10^5 differences is mostly chance
    static double difference(const std::vector<float> & a, const std::vector<float> & b) {
        double sum = a.size() == b.size() && !a.empty() ? 0.0 : INFINITY;
        for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
            const double x = (double) a[i] - (double) b[i];
            sum += x * x;
        }
        return std::isfinite(sum) ? std::sqrt(sum / a.size()) : INFINITY;
    }

    // Noise to expect of quantised weights, as a share of the spread: activations are rounded before each product, so
    // that a tiny difference becomes a larger one or none, and one sample of noise may miss it.
    double rounding() const {
        const double bits = 8.0 * (double) llama_model_size(model) / (double) llama_model_n_params(model);
        return bits > 31 ? 0.0 : bits > 15 ? 0.01 : 0.1;
    }

    static double spread(const std::vector<float> & a) {
        double sum = 0, squares = 0;
        for (const float x : a) {
            sum += x;
            squares += (double) x * x;
        }
        const double mean = sum / a.size();
        return std::sqrt(std::max(0.0, squares / a.size() - mean * mean));
    }
};

int32_t verdict(const es_proof & p, bool bank) {
    const std::pair<double, const char *> checks[] = {
        { p.positions, "this model's attention depends on absolute positions" },
        { bank ? 0.0 : std::max(p.move, p.rebase),
          "llama.cpp's own shift does not bring its keys back exactly (the sink bank is needed)" },
        { p.move, "its sinks cannot be moved exactly" },
        { p.rebase, "its keys cannot be brought back exactly" },
    };
    for (const auto & [off, what] : checks) {
        if (!(off <= p.bound)) { // NaN fails
            return es_fail(ES_ERR_UNSUPPORTED, "%s: off by %.2g at %d, where %.2g is noise", what, off, p.distance,
                           p.bound);
        }
    }
    return ES_OK;
}

} // namespace

int32_t es_stream_proof_distance(const es_stream * stream) {
    return stream && stream->ctx && !llama_model_is_recurrent(stream->model)
               ? stream->window.params().rebase_at - n_tokens
               : 0;
}

int32_t es_stream_prove(const es_stream * stream, es_proof * out) {
    ES_REQUIRE(stream);
    ES_REQUIRE(out);
    *out            = {};
    const int32_t d = es_stream_proof_distance(stream);
    if (d <= 0) {
        return ES_OK; // no key is moved
    }
    return es_guard([&]() -> int32_t {
        const es_abort_scope scope;

        const bool    bank = stream->params.sink_move == ES_SINK_MOVE_BANK;
        const int32_t rc   = prover(stream->ctx, d, bank).run(*out);
        return rc == ES_OK ? verdict(*out, bank) : rc;
    });
}
