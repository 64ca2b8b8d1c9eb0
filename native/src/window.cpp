#include "window.h"

#include <algorithm>
#include <cassert>

es_window::es_window(const es_window_params & params) : params_(params) {
    assert(params.n_keep < params.n_ctx);
    assert(params.n_chunk >= 1 && params.n_chunk <= params.n_ctx - params.n_keep);
    assert(params.rebase_at > 0 && (uint32_t) params.rebase_at > params.n_ctx);
    sinks_.reserve(params.n_keep);
}

uint32_t es_window::next_chunk(size_t n_left) const {
    const auto at_most = [&](uint32_t n) { return (uint32_t) std::min<size_t>(n_left, std::max(n, 1u)); };

    if (n_sinks() < params_.n_keep) {
        // the sinks are decoded on their own, to be captured by the bank
        return at_most(std::min(params_.n_keep - n_sinks(), params_.n_batch));
    }
    if (n_left <= n_free() || n_free() >= params_.n_chunk) {
        return at_most(std::min(n_free(), params_.n_batch)); // fits without an eviction
    }
    return at_most(params_.n_chunk);
}

uint32_t es_window::to_evict(uint32_t m) const {
    if (m <= n_free()) {
        return 0;
    }
    assert(m <= params_.n_ctx - params_.n_keep - n_recalled());
    uint32_t e = std::min(std::max(m - n_free(), params_.n_slide), n_window());

    if (params_.n_boundary > 0) {
        // index of the first token to stay; a mark shortly after it is a better place
        const int64_t first = n_past_ - n_window() + e;
        const auto    it    = std::lower_bound(marks_.begin(), marks_.end(), first);
        if (it != marks_.end() && *it - first <= (int64_t) params_.n_boundary && *it < n_past_) {
            e += (uint32_t) (*it - first);
        }
    }
    return e;
}

bool es_window::must_rebase(uint32_t m) const {
    return base_ > 0 && (int64_t) pos_next() + m > params_.rebase_at;
}

void es_window::evict(uint32_t e) {
    assert(e <= n_window());
    window_.erase(window_.begin(), window_.begin() + e);
    base_ += (int32_t) e;
    const int64_t first = n_past_ - n_window();
    while (!marks_.empty() && marks_.front() < first) {
        marks_.pop_front();
    }
}

void es_window::push(const int32_t * tokens, uint32_t m) {
    assert(m <= n_free());
    for (uint32_t i = 0; i < m; ++i) {
        if (n_sinks() < params_.n_keep) {
            sinks_.push_back(tokens[i]);
        } else {
            window_.push_back(tokens[i]);
        }
    }
    n_past_ += m;
}

void es_window::rewind(uint32_t n) {
    assert(n <= n_window());
    window_.erase(window_.end() - n, window_.end());
    n_past_ -= n;
    while (!marks_.empty() && marks_.back() > n_past_) {
        marks_.pop_back();
    }
}

void es_window::recall(const int32_t * tokens, uint32_t n) {
    assert(n <= n_free() && recalled_.empty() && base_ >= (int32_t) n);
    recalled_.assign(tokens, tokens + n);
    base_ -= (int32_t) n;
}

void es_window::forget_recalled() {
    base_ += (int32_t) n_recalled();
    recalled_.clear();
}

int32_t es_window::rebase() {
    const int32_t fall = base_;
    base_              = 0;
    return fall;
}

void es_window::age(int64_t n) {
    assert(n >= 0 && n_sinks() == params_.n_keep);
    n_past_ += n;
    for (int64_t & mark : marks_) {
        mark += n;
    }
}

void es_window::mark() {
    if (marks_.empty() || marks_.back() < n_past_) {
        marks_.push_back(n_past_);
    }
}

void es_window::clear() {
    n_past_ = 0;
    base_   = 0;
    sinks_.clear();
    recalled_.clear();
    window_.clear();
    marks_.clear();
}

es_window::state es_window::get_state() const {
    state s = { n_past_, base_, sinks_, { marks_.begin(), marks_.end() }, recalled_ };
    s.tokens.insert(s.tokens.end(), window_.begin(), window_.end());
    return s;
}

bool es_window::set_state(const state & s) {
    const size_t n_cached = s.tokens.size();
    const size_t n_used   = n_cached + s.recalled.size();
    const size_t n_sinks  = std::min<size_t>(n_cached, params_.n_keep);
    // after an eviction all sinks must be present
    const bool ok = n_used <= params_.n_ctx && s.n_past >= (int64_t) n_cached && s.base >= 0 &&
                    (int64_t) s.base + (int64_t) n_used <= params_.rebase_at &&
                    (s.recalled.empty() || (s.recalled.size() <= n_recall_max() && n_sinks == params_.n_keep)) &&
                    (s.n_past == (int64_t) n_cached || n_sinks == params_.n_keep) &&
                    std::is_sorted(s.marks.begin(), s.marks.end()) &&
                    (s.marks.empty() || (s.marks.front() >= 0 && s.marks.back() <= s.n_past));
    if (!ok) {
        return false;
    }
    n_past_ = s.n_past;
    base_   = s.base;
    sinks_.assign(s.tokens.begin(), s.tokens.begin() + n_sinks);
    recalled_ = s.recalled;
    window_.assign(s.tokens.begin() + n_sinks, s.tokens.end());
    marks_.assign(s.marks.begin(), s.marks.end());
    return true;
}
