// es_stream over a real (tiny) model: what the sanitizers shall see of every path, and the properties that need no
// reference: exact counters, rewind, rebase, save and restore, damaged sessions. argv[1]: the model.
#include "edge_stream.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <unistd.h>
#include <vector>

namespace {

llama_model * model;

struct context {
    llama_context * ctx;
    ggml_type       type_k;
    context(uint32_t n_ctx, ggml_type k = GGML_TYPE_F32, bool flash = false, uint32_t n_seq_max = 2,
            bool unified = true)
        : type_k(k) {
        llama_context_params p = llama_context_default_params();
        p.n_ctx                = n_ctx;
        p.n_batch = p.n_ubatch = 64;
        p.n_seq_max            = n_seq_max;
        p.kv_unified           = unified;
        p.swa_full             = true;
        p.type_k               = k;
        p.type_v               = flash ? k : GGML_TYPE_F32;
        p.flash_attn_type      = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        p.n_threads = p.n_threads_batch = 1;
        ctx                             = llama_init_from_model(model, p);
        assert(ctx);
    }
    ~context() { llama_free(ctx); }
};

struct stream {
    es_stream * s = nullptr;
    stream(context & c, uint32_t n_ctx, uint32_t n_keep, int32_t move, int32_t rebase_at = 0, llama_seq_id seq_id = 0) {
        es_stream_params p = es_stream_default_params();
        p.n_ctx            = n_ctx;
        p.n_keep           = n_keep;
        p.n_slide          = 1;
        p.sink_move        = move;
        p.rebase_at        = rebase_at;
        p.seq_id           = seq_id;
        p.scratch_seq_id   = (llama_seq_id) llama_n_seq_max(c.ctx) - 1; // streams may share it
        const int32_t rc   = es_stream_init(c.ctx, p, &s);
        if (rc != ES_OK) {
            fprintf(stderr, "%s\n", es_last_error());
        }
        assert(rc == ES_OK);
    }
    stream(context & c, const es_stream_params & p) { assert(es_stream_init(c.ctx, p, &s) == ES_OK); }
    ~stream() { es_stream_free(s); }
    void feed(const std::vector<llama_token> & t) {
        const int32_t rc = es_stream_feed(s, t.data(), t.size(), nullptr, nullptr);
        if (rc != ES_OK) {
            fprintf(stderr, "%s\n", es_last_error());
        }
        assert(rc == ES_OK);
    }
    es_stream_stats stats() const {
        es_stream_stats out;
        assert(es_stream_get_stats(s, &out) == ES_OK);
        return out;
    }
    std::vector<float> logits() {
        const float * l = es_stream_logits(s);
        assert(l);
        return { l, l + llama_vocab_n_tokens(llama_model_get_vocab(model)) };
    }
};

std::vector<llama_token> text(size_t n, uint32_t seed = 1) {
    const uint32_t           n_vocab = (uint32_t) llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> out(n);
    for (auto & t : out) {
        seed = seed * 1664525u + 1013904223u;
        t    = (llama_token) ((seed >> 8) % n_vocab);
    }
    return out;
}

double max_diff(const std::vector<float> & a, const std::vector<float> & b) {
    double d = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        assert(std::isfinite(a[i]));
        d = std::max(d, (double) std::fabs(a[i] - b[i]));
    }
    return d;
}

// Both ways of moving the sinks, and a stream that rebases all the time, agree.
void moves_agree() {
    const auto t = text(400);
    context    c0(256), c1(256), c2(256);
    stream     bank(c0, 64, 4, ES_SINK_MOVE_BANK), again(c1, 64, 4, ES_SINK_MOVE_REDECODE),
        rebased(c2, 64, 4, ES_SINK_MOVE_BANK, 80);
    for (const llama_token x : t) {
        bank.feed({ x });
        again.feed({ x });
        rebased.feed({ x });
    }
    assert(bank.stats().n_slides == 400 - 64 && bank.stats().n_rebases == 0);
    assert(again.stats().n_slides == 400 - 64 && again.stats().sink_move == ES_SINK_MOVE_REDECODE);
    assert(rebased.stats().n_rebases > 10);
    assert(max_diff(bank.logits(), again.logits()) < 1e-3);
    assert(max_diff(bank.logits(), rebased.logits()) < 1e-3);
}

// Two sequences of one context slide independently, in a unified cache and in separate ones.
void two_sequences(bool unified) {
    const auto t0 = text(250, 3), t1 = text(250, 4);
    context    c(512, GGML_TYPE_F32, false, 2, unified), alone0(256), alone1(256);
    stream     a(c, 64, 4, ES_SINK_MOVE_BANK, 100, 0), b(c, 80, 7, ES_SINK_MOVE_BANK, 130, 1);
    stream     x(alone0, 64, 4, ES_SINK_MOVE_BANK), y(alone1, 80, 7, ES_SINK_MOVE_BANK);
    for (size_t i = 0; i < t0.size(); ++i) {
        a.feed({ t0[i] });
        const auto got = a.logits();
        b.feed({ t1[i] });
        x.feed({ t0[i] });
        y.feed({ t1[i] });
        if (i % 50 == 49) {
            assert(max_diff(got, x.logits()) < 1e-3);
            assert(max_diff(b.logits(), y.logits()) < 1e-3);
        }
    }
    assert(es_stream_reset(a.s) == ES_OK);
    b.feed({ 5 });
    y.feed({ 5 });
    assert(max_diff(b.logits(), y.logits()) < 1e-3);
}

// Streams that are decoded together, also with gaps between their sequences, are as they are alone; each keeps its
// logits while others are decoded.
void fed_together(bool unified, int32_t move) {
    const size_t n = 3;
    context      c(512, GGML_TYPE_F32, false, 4, unified), alone0(256), alone1(256), alone2(256);
    stream       a(c, 64, 4, move, 100, 0), b(c, 80, 7, move, 130, 1), d(c, 40, 5, move, 0, 2);
    stream       x(alone0, 64, 4, move), y(alone1, 80, 7, move), z(alone2, 40, 5, move);
    stream *     together[n] = { &a, &b, &d };
    stream *     alone[n]    = { &x, &y, &z };
    for (size_t i = 0; i < n; ++i) {
        const auto prompt = text(10 + 30 * i, 20 + (uint32_t) i);
        together[i]->feed(prompt);
        alone[i]->feed(prompt);
    }
    const auto t = text(3 * 300, 5);
    for (size_t k = 0; k < 300; ++k) {
        std::vector<es_stream *> streams;
        std::vector<llama_token> tokens;
        for (size_t i = 0; i < n; ++i) {
            if (k % 7 == 3 && i == 1) {
                continue; // sequences 0 and 2 only
            }
            streams.push_back(together[i]->s);
            tokens.push_back(t[n * k + i]);
            alone[i]->feed({ tokens.back() });
        }
        const int32_t rc = es_streams_feed(streams.data(), tokens.data(), streams.size());
        if (rc != ES_OK) {
            fprintf(stderr, "%s\n", es_last_error());
        }
        assert(rc == ES_OK);
        if (k % 40 == 39 || k % 7 == 3) {
            for (size_t i = 0; i < n; ++i) {
                assert(max_diff(together[i]->logits(), alone[i]->logits()) < 1e-3);
                assert(together[i]->stats().n_past == alone[i]->stats().n_past);
                assert(together[i]->stats().n_slides == alone[i]->stats().n_slides);
            }
        }
    }
    assert(a.stats().n_rebases > 0 && b.stats().n_rebases > 0);

    es_stream *       s[2]   = { a.s, a.s };
    const llama_token bad[2] = { 5, -1 };
    const auto        before = a.stats().n_past;
    assert(es_streams_feed(s, bad, 0) == ES_ERR_INVALID && es_streams_feed(nullptr, bad, 1) == ES_ERR_INVALID);
    assert(es_streams_feed(s, t.data(), 2) == ES_ERR_INVALID); // the same stream twice
    s[1] = b.s;
    assert(es_streams_feed(s, bad, 2) == ES_ERR_INVALID); // no such token
    s[1] = x.s;
    assert(es_streams_feed(s, t.data(), 2) == ES_ERR_INVALID); // another context
    s[1] = b.s;
    assert(es_stream_reset(b.s) == ES_OK && es_streams_feed(s, t.data(), 2) == ES_ERR_INVALID); // no sinks yet
    assert(a.stats().n_past == before && es_streams_feed(s, t.data(), 1) == ES_OK);
}

// More sinks than fit one decode are captured in several.
void many_sinks() {
    const auto t = text(500, 5);
    context    c0(512), c1(512);
    stream     bank(c0, 200, 150, ES_SINK_MOVE_BANK, 300), again(c1, 200, 150, ES_SINK_MOVE_REDECODE);
    for (size_t i = 0; i < t.size(); i += 10) {
        bank.feed({ t.begin() + i, t.begin() + i + 10 });
        again.feed({ t.begin() + i, t.begin() + i + 10 });
    }
    assert(bank.stats().n_sinks == 150 && bank.stats().n_rebases > 0);
    assert(max_diff(bank.logits(), again.logits()) < 1e-3);
}

void all_cache_types() {
    const auto t = text(300);
    for (const bool flash : { false, true }) {
        for (const ggml_type k : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            context c(256, k, flash);
            stream  s(c, 64, 5, ES_SINK_MOVE_BANK, 128);
            s.feed(t);
            const auto st = s.stats();
            assert(st.n_past == 300 && st.n_sinks == 5 && st.n_window <= 59 && st.n_rebases > 0);
            max_diff(s.logits(), s.logits());
        }
    }
}

void rewind_goes_back() {
    const auto t = text(200);
    context    c0(256), c1(256);
    stream     a(c0, 64, 4, ES_SINK_MOVE_BANK), b(c1, 64, 4, ES_SINK_MOVE_BANK);
    a.feed({ t.begin(), t.begin() + 150 });
    b.feed({ t.begin(), t.begin() + 150 });
    // nothing is evicted for the 9 tokens, so taking them back leaves no trace
    a.feed(text(3, 7));
    assert(es_stream_rewind(a.s, 1000) == ES_ERR_INVALID);
    assert(es_stream_rewind(a.s, 3) == ES_OK);
    assert(!es_stream_logits(a.s) && a.stats().n_past == 150);
    assert(es_stream_reset(b.s) == ES_OK && b.stats().n_past == 0);
    b.feed(t);
    assert(b.stats().n_past == 200);
}

bool stop_after_3(void * user, int64_t index, const float *) {
    *(int64_t *) user = index;
    return index < 2;
}

void stopping() {
    const auto t = text(30);
    context    c(256);
    stream     s(c, 64, 0, ES_SINK_MOVE_BANK);
    int64_t    last = -1;
    assert(es_stream_feed(s.s, t.data(), t.size(), stop_after_3, &last) == ES_ERR_STOPPED);
    assert(last == 2 && s.stats().n_past == 3);
    const llama_token bad[] = { 1, -1 };
    assert(es_stream_feed(s.s, bad, 2, nullptr, nullptr) == ES_ERR_INVALID && s.stats().n_past == 3);
    assert(es_stream_feed(s.s, bad, 0, nullptr, nullptr) == ES_ERR_INVALID);
}

void bad_parameters() {
    context     c(256);
    es_stream * s       = nullptr;
    const auto  refused = [&](auto change) {
        es_stream_params p = es_stream_default_params();
        change(p);
        const int32_t rc = es_stream_init(c.ctx, p, &s);
        assert(s == nullptr && strlen(es_last_error()) > 0);
        return rc;
    };
    assert(refused([](auto & p) { p.n_keep = 1000; }) == ES_ERR_INVALID);
    assert(refused([](auto & p) {
               p.n_ctx  = 64;
               p.n_keep = 64;
           }) == ES_ERR_INVALID);
    assert(refused([](auto & p) {
               p.n_ctx  = 64;
               p.n_keep = 62;
           }) == ES_ERR_INVALID);
    assert(refused([](auto & p) { p.n_ctx = 100000; }) == ES_ERR_INVALID);
    assert(refused([](auto & p) { p.seq_id = -1; }) == ES_ERR_INVALID);
    assert(refused([](auto & p) { p.seq_id = 7; }) == ES_ERR_INVALID);
    assert(refused([](auto & p) { p.rebase_at = 10; }) == ES_ERR_INVALID);
    assert(refused([](auto & p) { p.sink_move = 9; }) == ES_ERR_INVALID);
    assert(refused([](auto & p) {
               p.sink_move      = ES_SINK_MOVE_REDECODE;
               p.scratch_seq_id = 0;
               p.n_ctx          = 64;
           }) == ES_ERR_INVALID);
}

std::vector<llama_token> generate(stream & s, es_sampler * sampler, int n) {
    std::vector<llama_token> out;
    for (int i = 0; i < n; ++i) {
        llama_token t;
        assert(es_sampler_sample(sampler, s.s, &t, nullptr) == ES_OK);
        s.feed({ t });
        out.push_back(t);
    }
    return out;
}

std::string read_file(const std::string & path) {
    FILE * f = fopen(path.c_str(), "rb");
    assert(f);
    std::string out;
    char        buf[65536];
    for (size_t n; (n = fread(buf, 1, sizeof(buf), f)) > 0;) {
        out.append(buf, n);
    }
    fclose(f);
    return out;
}

void write_file(const std::string & path, const std::string & data) {
    FILE * f = fopen(path.c_str(), "wb");
    assert(f && fwrite(data.data(), 1, data.size(), f) == data.size());
    fclose(f);
}

void sessions(int32_t move) {
    const std::string path = "test_stream-" + std::to_string(getpid()) + ".session";
    const auto        t    = text(150);

    es_sampler_params sp = es_sampler_default_params();
    sp.seed              = 42;
    sp.repeat_penalty    = 1.1f;
    es_sampler *s0, *s1;
    assert(es_sampler_init(model, sp, &s0) == ES_OK && es_sampler_init(model, sp, &s1) == ES_OK);

    context c0(256), c1(256);
    stream  a(c0, 64, 6, move);
    a.feed(t);
    generate(a, s0, 20);
    const char user[] = "bytes of mine";
    assert(es_session_save(a.s, s0, c0.type_k, GGML_TYPE_F32, path.c_str(), user, sizeof(user)) == ES_OK);
    const auto at_save = a.logits();
    const auto want    = generate(a, s0, 100);

    // another stream, of other dimensions, becomes the saved one
    stream b(c1, 100, 2, move);
    b.feed(text(130, 9));
    assert(es_session_load(b.s, c1.type_k, GGML_TYPE_F32, path.c_str()) == ES_OK);
    assert(b.stats().n_ctx == 64 && b.stats().n_keep == 6 && b.stats().n_past == 170);
    assert(b.logits() == at_save);
    assert(es_sampler_restore(s1, b.s) && !es_sampler_restore(s1, b.s));

    es_session_info info;
    char            back[sizeof(user)];
    assert(es_session_peek(path.c_str(), &info, back, sizeof(back)) == ES_OK);
    assert(info.n_past == 170 && info.n_user == sizeof(user) && memcmp(back, user, sizeof(user)) == 0);

    assert(es_stream_tokens(b.s, nullptr, 0) == 64);
    assert(generate(b, s1, 100) == want);

    // other cache type, damage at every place, a newer version: refused, and the stream stays what it was
    const auto before = b.stats().n_past;
    assert(es_session_load(b.s, GGML_TYPE_F16, GGML_TYPE_F32, path.c_str()) == ES_ERR_MODEL);
    const std::string good   = read_file(path);
    const std::string broken = path + ".broken";
    for (size_t i = 0; i < good.size(); i += std::max<size_t>(1, good.size() / 97)) {
        std::string bad = good;
        bad[i]          = (char) (bad[i] ^ 0x5a);
        write_file(broken, bad);
        const int32_t rc = es_session_load(b.s, c1.type_k, GGML_TYPE_F32, broken.c_str());
        assert(rc == ES_ERR_FORMAT || rc == ES_ERR_VERSION);
        write_file(broken, good.substr(0, i));
        assert(es_session_load(b.s, c1.type_k, GGML_TYPE_F32, broken.c_str()) == ES_ERR_FORMAT);
    }
    write_file(broken, good + "x");
    assert(es_session_load(b.s, c1.type_k, GGML_TYPE_F32, broken.c_str()) == ES_ERR_FORMAT);
    std::string newer = good;
    newer[8]          = 4;
    write_file(broken, newer);
    assert(es_session_load(b.s, c1.type_k, GGML_TYPE_F32, broken.c_str()) == ES_ERR_VERSION);
    assert(b.stats().n_past == before);
    generate(b, s1, 5);
    assert(es_session_save(b.s, nullptr, 0, 0, "/does/not/exist/x", nullptr, 0) == ES_ERR_IO);

    unlink(path.c_str());
    unlink(broken.c_str());
    es_sampler_free(s0);
    es_sampler_free(s1);
}

// A block comes back from its copy, or from a session, as it was decoded; beside another stream with one of its own.
void recalled(ggml_type type, bool flash, bool unified) {
    const std::string path = "test_recalled-" + std::to_string(getpid()) + ".session";
    const auto        t = text(400), first = text(9, 8), second = text(14, 9);
    context           c0(512, type, flash, 2, unified), c1(512, type, flash, 2, unified);
    es_stream_params  p = es_stream_default_params();
    p.n_ctx             = 64;
    p.rebase_at         = 150;
    stream a(c0, p);
    p.n_recall_bytes = 0;
    stream b(c1, p);
    p.seq_id = 1;
    stream     other(c0, p);
    const auto recall = [](stream & s, const std::vector<llama_token> & block) {
        assert(es_stream_recall(s.s, block.data(), block.size()) == ES_OK && s.stats().n_recalled == block.size());
    };
    other.feed(text(100, 3));
    recall(other, second);
    for (stream * s : { &a, &b }) {
        s->feed({ t.begin(), t.begin() + 30 });
        for (size_t i = 30; i < 300; ++i) {
            if (i % 30 == 0) {
                recall(*s, i % 60 ? first : second);
            }
            s->feed({ t[i] });
        }
        assert(s->stats().n_rebases > 0 && s->stats().n_window == 64 - 4 - s->stats().n_recalled);
        assert(es_stream_recall(s->s, t.data(), 16) == ES_ERR_INVALID && s->stats().n_recalled == first.size());
    }
    const double rounding = type == GGML_TYPE_F32 && !flash ? 1e-4 : 0.1;
    assert(max_diff(a.logits(), b.logits()) < rounding);
    assert(es_session_save(a.s, nullptr, type, type, path.c_str(), nullptr, 0) == ES_OK);
    a.feed({ t[300], t[301] });
    const auto want = a.logits();
    assert(es_session_load(a.s, type, type, path.c_str()) == ES_OK && a.stats().n_recalled == first.size());
    a.feed({ t[300], t[301] });
    assert(max_diff(a.logits(), want) < rounding);
    other.feed({ t[5] });
    assert(es_stream_unrecall(a.s) == ES_OK && es_stream_unrecall(a.s) == ES_OK && a.stats().n_recalled == 0);
    a.feed({ t.begin() + 302, t.end() });
    assert(a.stats().n_window == 60 && other.stats().n_recalled == second.size());
    unlink(path.c_str());
}

void samplers() {
    es_sampler *      s = nullptr;
    es_sampler_params p = es_sampler_default_params();
    p.grammar           = "root ::= \"";
    assert(es_sampler_init(model, p, &s) == ES_ERR_INVALID && !s);
    p                = es_sampler_default_params();
    p.repeat_penalty = 0;
    assert(es_sampler_init(model, p, &s) == ES_ERR_INVALID && !s);
    p                        = es_sampler_default_params();
    const es_logit_bias bias = { 100000000, 1.0f };
    p.logit_bias             = &bias;
    p.n_logit_bias           = 1;
    assert(es_sampler_init(model, p, &s) == ES_ERR_INVALID && !s);

    context     c(256);
    stream      st(c, 64, 4, ES_SINK_MOVE_BANK);
    llama_token token;
    p         = es_sampler_default_params();
    p.grammar = "root ::= \"ab\"";
    assert(es_sampler_init(model, p, &s) == ES_OK);
    assert(es_sampler_sample(s, st.s, &token, nullptr) == ES_ERR_INVALID); // nothing fed yet
    st.feed(text(10));
    float logprob = 1;
    assert(es_sampler_sample(s, st.s, &token, &logprob) == ES_OK && logprob <= 0);
    char          piece[16];
    const int32_t n = llama_token_to_piece(llama_model_get_vocab(model), token, piece, sizeof(piece), 0, false);
    assert(n >= 1 && piece[0] == 'a');
    es_sampler_free(s);
}

//
// drafts
//

es_stream_params drafting(uint32_t n_draft, int32_t move = ES_SINK_MOVE_BANK, int32_t rebase_at = 100) {
    es_stream_params p = es_stream_default_params();
    p.n_ctx            = 64;
    p.n_slide          = 8;
    p.sink_move        = move;
    p.rebase_at        = rebase_at;
    p.n_draft          = n_draft;
    p.n_draft_min      = n_draft ? 1 : 0; // whether they pay or not
    return p;
}

// Lines that are written again and again, with changes: drafts of any length come true.
std::vector<llama_token> copies(size_t n) {
    auto                     line = text(23, 11);
    const auto               news = text(n, 12);
    std::vector<llama_token> out;
    for (size_t i = 0; out.size() < n; ++i) {
        line[(i * 7) % line.size()] = news[i];
        out.insert(out.end(), line.begin(), line.end());
    }
    out.resize(n);
    return out;
}

// Two tokens, then always another one: hardly a draft comes true.
std::vector<llama_token> traps(size_t n) {
    const auto               start = text(2, 13), news = text(n, 14);
    std::vector<llama_token> out;
    for (size_t i = 0; out.size() < n; ++i) {
        out.insert(out.end(), start.begin(), start.end());
        out.push_back(news[i]);
    }
    out.resize(n);
    return out;
}

// With and without drafts everything is the same, but for rounding.
void same(stream & a, stream & b, double rounding = 1e-4) {
    const es_stream_stats x = a.stats(), y = b.stats();
    assert(x.n_past == y.n_past && x.n_evicted == y.n_evicted && x.n_slides == y.n_slides);
    assert(x.n_rebases == y.n_rebases && x.n_sinks == y.n_sinks && x.n_window == y.n_window);
    assert(x.n_slide == y.n_slide && x.pos_next == y.pos_next && x.pos_sinks == y.pos_sinks);
    std::vector<llama_token> t(64), u(64);
    assert(es_stream_tokens(a.s, t.data(), 64) == es_stream_tokens(b.s, u.data(), 64) && t == u);
    const float *l = es_stream_logits(a.s), *m = es_stream_logits(b.s);
    assert(!l == !m && (!l || max_diff(a.logits(), b.logits()) < rounding));
}

void drafts_leave_no_trace(int32_t move, bool flash) {
    for (const auto & t : { copies(700), traps(300) }) {
        context c0(256, GGML_TYPE_F32, flash), c1(256, GGML_TYPE_F32, flash);
        stream  a(c0, drafting(6, move)), b(c1, drafting(0, move));
        for (const llama_token x : t) {
            a.feed({ x });
            b.feed({ x });
            same(a, b, flash ? 1e-2 : 1e-4); // flash attention rounds to float16
        }
        const es_stream_stats s = a.stats();
        assert(s.n_slides > 20 && s.n_rebases > 1);
        assert(t.size() == 300 ? s.n_drafted > 8 * s.n_accepted : s.n_accepted > 200);
    }
}

// Whatever else is done while drafts are in the cache takes them back first.
void drafts_are_taken_back() {
    const std::string path = "test_drafts-" + std::to_string(getpid()) + ".session";
    const auto        t    = copies(900);
    context           c0(256, GGML_TYPE_F32, false, 2), c1(256, GGML_TYPE_F32, false, 2);
    stream            a(c0, drafting(6)), b(c1, drafting(0));
    es_stream_params  other = drafting(6);
    other.seq_id            = 1;
    stream a2(c0, other);
    other.n_draft = other.n_draft_min = 0;
    stream     b2(c1, other);
    size_t     i      = 100;
    int64_t    n_left = 0; // drafts that were in the cache when something else was done
    int64_t    before = 0;
    const auto both   = [&](auto work) {
        for (int k = 0; k < 11; ++k, ++i) {
            a.feed({ t[i] });
            b.feed({ t[i] });
        }
        n_left += a.stats().n_drafted - a.stats().n_accepted > before;
        work(a);
        work(b);
        same(a, b);
        before = a.stats().n_drafted - a.stats().n_accepted;
    };
    for (stream * s : { &a, &b, &a2, &b2 }) {
        s->feed({ t.begin(), t.begin() + 100 });
    }
    for (int round = 0; round < 4; ++round) {
        both([](stream & s) { assert(es_stream_rewind(s.s, 5) == ES_OK); });
        both([](stream & s) { assert(es_stream_rewind(s.s, 0) == ES_OK && es_stream_mark(s.s) == ES_OK); });
        both([](stream & s) { assert(es_stream_rebase(s.s) == ES_OK); });
        both([&](stream & s) { assert(es_stream_recall(s.s, t.data() + round, 5) == ES_OK); });
        both([](stream & s) { assert(es_stream_unrecall(s.s) == ES_OK); });
        both([&](stream & s) { s.feed({ t.begin() + i, t.begin() + i + 30 }); });
        both([&](stream & s) {
            es_stream *       streams[] = { s.s, &s == &a ? a2.s : b2.s };
            const llama_token tokens[]  = { t[i], t[i + 3] };
            assert(es_streams_feed(streams, tokens, 2) == ES_OK);
        });
        both([&](stream & s) {
            assert(es_session_save(s.s, nullptr, GGML_TYPE_F32, GGML_TYPE_F32, path.c_str(), nullptr, 0) == ES_OK);
        });
        const std::string saved = read_file(path);
        both([&](stream & s) { assert(es_session_load(s.s, GGML_TYPE_F32, GGML_TYPE_F32, path.c_str()) == ES_OK); });
        assert(saved.size() == read_file(path).size());
        both([&](stream & s) { assert(es_stream_unloop(s.s, { 3, 20 }, (size_t *) &before) == ES_OK); });
    }
    assert(n_left > 10);
    both([&](stream & s) { assert(es_stream_reset(s.s) == ES_OK); });
    both([](stream &) {});
    unlink(path.c_str());
}

// Where no draft comes true, none is made.
void drafts_that_do_not_pay() {
    context          c(256);
    es_stream_params p = drafting(6);
    p.n_draft_min      = 0;
    stream a(c, p);
    for (const llama_token x : text(1500)) {
        a.feed({ x });
    }
    assert(a.stats().n_drafted < 100 && a.stats().n_accepted < 10);

    es_stream * s = nullptr;
    p.n_draft     = 65;
    assert(es_stream_init(c.ctx, p, &s) == ES_ERR_INVALID && !s);
    p             = drafting(6);
    p.n_draft_min = 7;
    assert(es_stream_init(c.ctx, p, &s) == ES_ERR_INVALID && !s);
    p         = drafting(6);
    p.n_match = 65;
    assert(es_stream_init(c.ctx, p, &s) == ES_ERR_INVALID && !s);
    p         = drafting(6);
    p.n_slide = 0;
    stream b(c, p);
    assert(b.stats().n_slide == 15); // a quarter of the window: at most 16
}

void quiet(ggml_log_level, const char *, void *) {}

} // namespace

int main(int argc, char ** argv) {
    assert(argc == 2);
    llama_log_set(quiet, nullptr);
    llama_backend_init();
    llama_model_params p = llama_model_default_params();
    model                = llama_model_load_from_file(argv[1], p);
    assert(model && es_model_can_stream(model, nullptr, 0) && es_bank_available());
    moves_agree();
    two_sequences(true);
    two_sequences(false);
    fed_together(true, ES_SINK_MOVE_BANK);
    fed_together(false, ES_SINK_MOVE_BANK);
    fed_together(true, ES_SINK_MOVE_REDECODE);
    many_sinks();
    all_cache_types();
    rewind_goes_back();
    stopping();
    bad_parameters();
    sessions(ES_SINK_MOVE_BANK);
    sessions(ES_SINK_MOVE_REDECODE);
    recalled(GGML_TYPE_F32, false, false);
    recalled(GGML_TYPE_F32, false, true);
    recalled(GGML_TYPE_F16, true, true);
    recalled(GGML_TYPE_Q8_0, true, false);
    samplers();
    drafts_leave_no_trace(ES_SINK_MOVE_BANK, false);
    drafts_leave_no_trace(ES_SINK_MOVE_BANK, true);
    drafts_leave_no_trace(ES_SINK_MOVE_REDECODE, false);
    drafts_are_taken_back();
    drafts_that_do_not_pay();
    llama_model_free(model);
    llama_backend_free();
    printf("ok\n");
    return 0;
}
