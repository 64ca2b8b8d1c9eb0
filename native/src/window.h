// Which tokens are in the cache and at which positions: pure bookkeeping, no tensors, no llama.cpp.
//
// The only place that decides what is evicted and when. Absolute positions are those that RoPE sees: the sinks from
// base on, then what was recalled, then the window. An eviction of e tokens moves base up by e; a
// rebase moves it back to 0. In-cache positions are absolute positions minus base. What is recalled is not part of the
// stream: it takes cells and positions, but is in none of the counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

struct es_window_params {
    uint32_t n_ctx      = 0; // sinks + window
    uint32_t n_keep     = 0; // sinks
    uint32_t n_slide    = 1; // least tokens per eviction
    uint32_t n_chunk    = 1; // most tokens per decode once eviction began
    uint32_t n_batch    = 1; // most tokens per decode before
    uint32_t n_boundary = 0; // how far an eviction may be extended to end at a mark
    int32_t  rebase_at  = 0; // no absolute position may reach this
};

class es_window {
public:
    es_window() = default;
    explicit es_window(const es_window_params & params);

    // Number of tokens to decode next, of n_left > 0.
    uint32_t next_chunk(size_t n_left) const;

    // Number of tokens to evict before m tokens are decoded. Precondition: m is at most what next_chunk returned.
    uint32_t to_evict(uint32_t m) const;

    // True if m tokens would reach rebase_at.
    bool must_rebase(uint32_t m) const;

    // Evict the e oldest window tokens. Precondition: e <= n_window().
    void evict(uint32_t e);

    // Append tokens, first the sinks, then the window. Precondition: they fit.
    void push(const int32_t * tokens, uint32_t m);

    // Drop the newest n tokens. Precondition: n <= n_window().
    void rewind(uint32_t n);

    // Put tokens between sinks and window, which stays where it is: base falls by their number. Precondition: they fit,
    // there are none, and base is no less than n. forget_recalled closes the gap again.
    void recall(const int32_t * tokens, uint32_t n);
    void forget_recalled();

    // Raises all positions by n.
    void raise(uint32_t n) { base_ += (int32_t) n; }

    // Sets base to 0; returns by how much positions fell.
    int32_t rebase();

    // Adds n to the number of tokens seen, as if they had been evicted. Precondition: all sinks are present.
    void age(int64_t n);

    // Marks a boundary before the next token.
    void mark();

    void clear();

    // For sessions: everything but the parameters.
    struct state {
        int64_t              n_past;
        int32_t              base;
        std::vector<int32_t> tokens; // sinks, then window
        std::vector<int64_t> marks;
        std::vector<int32_t> recalled;
    };
    state get_state() const;
    bool  set_state(const state & s); // false (and unchanged) if it contradicts the parameters

    int64_t  n_past() const { return n_past_; }
    int64_t  n_evicted() const { return n_past_ - n_cached(); }
    uint32_t n_sinks() const { return (uint32_t) sinks_.size(); }
    uint32_t n_window() const { return (uint32_t) window_.size(); }
    uint32_t n_cached() const { return n_sinks() + n_window(); }
    uint32_t n_recalled() const { return (uint32_t) recalled_.size(); }
    uint32_t n_used() const { return n_cached() + n_recalled(); } // cells
    uint32_t n_free() const { return params_.n_ctx - n_used(); }
    uint32_t n_recall_max() const { return (params_.n_ctx - params_.n_keep) / 4; }
    int32_t  pos_sinks() const { return base_; }
    int32_t  pos_recalled() const { return base_ + (int32_t) n_sinks(); }
    int32_t  pos_window() const { return pos_recalled() + (int32_t) n_recalled(); }
    int32_t  pos_next() const { return base_ + (int32_t) n_used(); }

    const std::vector<int32_t> & sinks() const { return sinks_; }
    const std::vector<int32_t> & recalled() const { return recalled_; }
    const std::deque<int32_t> &  window() const { return window_; }
    const es_window_params &     params() const { return params_; }

private:
    es_window_params     params_;
    int64_t              n_past_ = 0;
    int32_t              base_   = 0;
    std::vector<int32_t> sinks_;
    std::vector<int32_t> recalled_;
    std::deque<int32_t>  window_;
    std::deque<int64_t>  marks_; // ascending stream indices, within the window or at its end
};
