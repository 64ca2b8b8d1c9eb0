// es_window against a naive model: a list of (stream index) for what is cached, evicted from the front behind the
// sinks. Random feeds, rewinds, marks and rebases; and the same far beyond 2^33 tokens.
#include "window.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <random>

namespace {

struct naive {
    es_window_params     p;
    std::vector<int64_t> cached; // stream indices
    int64_t              n_past = 0;

    void push(uint32_t m) {
        for (uint32_t i = 0; i < m; ++i) {
            cached.push_back(n_past++);
        }
    }
    void evict(uint32_t e) { cached.erase(cached.begin() + p.n_keep, cached.begin() + p.n_keep + e); }
    void rewind(uint32_t n) {
        cached.resize(cached.size() - n);
        n_past -= n;
    }
};

// tokens are the low bits of their stream index, so that contents can be compared
std::vector<int32_t> tokens_of(int64_t first, uint32_t m) {
    std::vector<int32_t> out(m);
    for (uint32_t i = 0; i < m; ++i) {
        out[i] = (int32_t) ((first + i) & 0x7fffffff);
    }
    return out;
}

void compare(const es_window & w, const naive & n, int64_t offset) {
    assert(w.n_past() == n.n_past + offset);
    assert(w.n_cached() == n.cached.size());
    assert(w.n_cached() <= n.p.n_ctx);
    assert(w.n_evicted() == w.n_past() - (int64_t) n.cached.size());
    assert(w.pos_next() <= n.p.rebase_at);
    assert(w.pos_next() - w.pos_sinks() == (int32_t) w.n_cached());
    for (uint32_t i = 0; i < w.n_cached(); ++i) {
        const int32_t token = i < w.n_sinks() ? w.sinks()[i] : w.window()[i - w.n_sinks()];
        const int64_t index = n.cached[i] + (n.cached[i] >= (int64_t) n.p.n_keep ? offset : 0);
        assert(token == (int32_t) (index & 0x7fffffff));
    }
}

void feed(es_window & w, naive & n, size_t n_left) {
    while (n_left > 0) {
        const uint32_t m = w.next_chunk(n_left);
        assert(m >= 1 && m <= n_left && m <= n.p.n_batch);
        const bool     sinks = w.n_sinks() < n.p.n_keep;
        const uint32_t e     = w.to_evict(m);
        if (e > 0) {
            assert(!sinks && m <= n.p.n_chunk);
            assert(w.n_cached() - e + m <= n.p.n_ctx); // as much as needed
            // as little as needed: less would not fit, unless the step or a mark asked for more
            assert(w.n_cached() - e + m == n.p.n_ctx ||
                   e <= std::max(n.p.n_slide, w.n_cached() + m - n.p.n_ctx) + n.p.n_boundary);
            w.evict(e);
            n.evict(e);
        }
        if (w.must_rebase(m)) {
            const int32_t before = w.pos_sinks();
            assert(before > 0 && w.rebase() == before && w.pos_sinks() == 0);
        }
        w.push(tokens_of(w.n_past(), m).data(), m);
        n.push(m);
        n_left -= m;
    }
}

void random_run(unsigned seed, bool far) {
    std::mt19937 rng(seed);
    const auto   draw = [&](uint32_t a, uint32_t b) { return std::uniform_int_distribution<uint32_t>(a, b)(rng); };

    es_window_params p;
    p.n_keep     = draw(0, 20);
    p.n_ctx      = p.n_keep + draw(4, 100);
    p.n_slide    = draw(1, p.n_ctx - p.n_keep);
    p.n_batch    = draw(1, 64);
    p.n_chunk    = std::min(draw(1, (p.n_ctx - p.n_keep + 3) / 4), p.n_batch);
    p.n_boundary = draw(0, 1) ? draw(0, 30) : 0;
    p.rebase_at  = (int32_t) (p.n_ctx + draw(1, 400));

    es_window w(p);
    naive     n{ p, {}, 0 };
    int64_t   offset = 0;
    feed(w, n, p.n_ctx);
    compare(w, n, 0);

    if (far) {
        // carry on as if 2^33 + something tokens had passed: every index but the sinks' grows
        offset = ((int64_t) 1 << 33) + draw(0, 1000);
        auto s = w.get_state();
        s.n_past += offset;
        for (size_t i = p.n_keep; i < s.tokens.size(); ++i) {
            s.tokens[i] = (int32_t) (((int64_t) i + offset) & 0x7fffffff);
        }
        s.marks.clear();
        assert(w.set_state(s));
    }
    for (int i = 0; i < 60; ++i) {
        switch (draw(0, 5)) {
        case 0: w.mark(); break;
        case 1: {
            const uint32_t k = draw(0, w.n_window());
            w.rewind(k);
            n.rewind(k);
        } break;
        default: feed(w, n, draw(1, 150)); break;
        }
        compare(w, n, offset);
        const auto s = w.get_state();
        es_window  copy(p);
        assert(copy.set_state(s));
        compare(copy, n, offset);
        assert(copy.next_chunk(37) == w.next_chunk(37));
    }
}

// An eviction that would cut a message ends at its start instead.
void boundaries() {
    es_window_params p{ 20, 2, 1, 4, 64, 6, 1000 };
    es_window        w(p);
    w.push(tokens_of(0, 8).data(), 8);
    w.mark(); // index 8
    w.push(tokens_of(8, 12).data(), 12);
    assert(w.to_evict(1) == 6); // 1 needed: index 3 would be first; the mark at 8 is 5 further
    w.evict(6);
    assert(w.window().front() == 8);
    p.n_boundary = 4;
    es_window v(p);
    v.push(tokens_of(0, 8).data(), 8);
    v.mark();
    v.push(tokens_of(8, 12).data(), 12);
    assert(v.to_evict(1) == 1); // too far away
}

void refusals() {
    const es_window_params p{ 20, 4, 1, 4, 64, 0, 100 };
    es_window              w(p);
    const auto             tokens = tokens_of(0, 20);
    assert(w.set_state({ 20, 0, tokens, {} }));
    assert(!w.set_state({ 19, 0, tokens, {} }));           // more cached than seen
    assert(!w.set_state({ 20, -1, tokens, {} }));          // negative position
    assert(!w.set_state({ 20, 81, tokens, {} }));          // beyond rebase_at
    assert(!w.set_state({ 20, 0, tokens_of(0, 21), {} })); // larger than the cache
    assert(!w.set_state({ 20, 0, tokens_of(0, 2), {} }));  // evicted without sinks
    assert(!w.set_state({ 20, 0, tokens, { 7, 5 } }));     // marks out of order
    assert(!w.set_state({ 20, 0, tokens, { 21 } }));       // mark in the future
    assert(w.n_past() == 20 && w.n_cached() == 20);
}

} // namespace

int main() {
    for (unsigned seed = 0; seed < 3000; ++seed) {
        random_run(seed, seed % 2 == 1);
    }
    boundaries();
    refusals();
    printf("ok\n");
    return 0;
}
