#include "draft_model.h"

#include "drafter.h"
#include "stream.h"

#include <algorithm>

namespace {

constexpr int64_t  nap_first = 512, nap_last = 1 << 20;
constexpr size_t   n_recent = 256; // of a long text that it has slept through, it reads so much
constexpr int      n_trials = 3;   // drafts after waking, from which it learns whether guessing pays
constexpr uint32_t n_trial  = 3;   // guesses of each

} // namespace

es_draft_model::es_draft_model(es_stream * stream, int32_t n_vocab)
    : stream_(stream), n_vocab_(std::min(n_vocab, stream->n_vocab())), nap_(nap_first) {
    begin();
}

es_draft_model::~es_draft_model() {
    delete stream_;
}

// Before anything is known.
void es_draft_model::begin() {
    hits_   = 1.4;
    n_      = 2;
    trials_ = n_trials;
}

void es_draft_model::clear() {
    stream_->reset();
    unread_.clear();
    guesses_.clear();
    gap_ = false;
}

// The last guess is not in the stream.
void es_draft_model::drop_guesses() {
    if (!guesses_.empty()) {
        const size_t n = guesses_.size() - 1;
        guesses_.clear();
        take_back(n);
    }
}

void es_draft_model::take_back(size_t n) {
    if (n > 0 && stream_->rewind(n) != 0) { // it slid too far, or has a state: it begins again with what follows
        stream_->reset();
        gap_ = true;
    }
}

void es_draft_model::push(const int32_t * tokens, size_t n) {
    if (asleep_ > 0) {
        asleep_ -= std::min((int64_t) n, asleep_);
        if (asleep_ == 0) {
            begin();
        }
    }
    for (size_t i = 0; i < n; ++i) {
        if (!guesses_.empty()) {
            const bool hit = guesses_.front() == tokens[i];
            hits_          = 0.97 * hits_ + hit;
            n_             = 0.97 * n_ + 1;
            if (hit) {
                const bool last = guesses_.size() == 1;
                guesses_.erase(guesses_.begin());
                if (!last) {
                    continue; // the stream has it
                }
            } else {
                drop_guesses();
            }
        }
        unread_.push_back(tokens[i]);
    }
    const size_t n_most = asleep_ > 0 ? n_recent : stream_->window.params().n_ctx;
    if (unread_.size() > 2 * n_most) { // bounded, however long the text is
        unread_.erase(unread_.begin(), unread_.end() - (std::ptrdiff_t) n_most);
        gap_ = true;
    }
}

void es_draft_model::rewind(size_t n) {
    drop_guesses();
    const size_t k = std::min(n, unread_.size());
    unread_.resize(unread_.size() - k);
    take_back(gap_ ? 0 : n - k);
}

// Whether the stream has the whole text, and logits after it.
bool es_draft_model::read() {
    if (!guesses_.empty()) {
        drop_guesses();
    }
    if (gap_) {
        stream_->reset();
        gap_ = false;
    }
    if (unread_.empty()) { // its logits are of what was dropped
        if (stream_->window.n_window() == 0) {
            return false;
        }
        unread_.push_back(stream_->window.window().back());
        take_back(1);
        if (gap_) {
            return false;
        }
    }
    if (stream_->feed(unread_.data(), unread_.size(), nullptr, nullptr) != 0) {
        stream_->reset();
        gap_ = true;
        return false;
    }
    unread_.clear();
    return stream_->logits() != nullptr;
}

uint32_t es_draft_model::worth(uint32_t n, double gain, const std::vector<double> & costs, double single_us) {
    if (asleep_ > 0) {
        return 0;
    }
    if (trials_ > 0) {
        --trials_;
        return std::min(n, n_trial);
    }
    const double   cost = cost_us_ / single_us;
    const uint32_t most = es_best_length(
        n, gain, [&](uint32_t) { return hits_ / n_; }, [&](uint32_t k) { return costs[k + 1] + k * cost; });
    if (most == 0 && n > 1) { // not for want of room
        drop_guesses();
        asleep_ = nap_;
        nap_    = std::min(2 * nap_, nap_last);
    } else if (most > 0 && n_ > 20) {
        nap_ = nap_first;
    }
    return most;
}

void es_draft_model::draft(uint32_t n, std::vector<int32_t> & out) {
    if (n == 0 || !read()) {
        return;
    }
    const int64_t t0 = llama_time_us();
    for (uint32_t i = 0; i < n; ++i) {
        const float * logits = stream_->logits();
        const auto    best   = (int32_t) (std::max_element(logits, logits + n_vocab_) - logits);
        guesses_.push_back(best);
        if (i + 1 < n && stream_->feed(&best, 1, nullptr, nullptr) != 0) {
            stream_->reset();
            gap_ = true;
            break;
        }
    }
    out.insert(out.end(), guesses_.begin(), guesses_.end());
    if (n > 1) {
        const double us = (double) (llama_time_us() - t0) / (n - 1);
        cost_us_ += (cost_us_ > 0 ? 0.1 : 1.0) * (std::min(us, cost_us_ > 0 ? 3 * cost_us_ : us) - cost_us_);
    }
}
