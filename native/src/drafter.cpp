#include "drafter.h"

#include "draft_model.h"

#include <algorithm>

namespace {

constexpr size_t   n_text   = 1 << 15; // tokens searched, at least; at most twice as many
constexpr uint32_t n_slots  = 1 << 16;
constexpr uint32_t n_places = 16; // earlier places that are compared
constexpr uint32_t n_far    = 64; // tokens that are compared

constexpr double   row_cost  = 0.4;  // what one more row of a batch is expected to cost, until it is measured
constexpr double   gain      = 1.15; // expected, for a draft to be made
constexpr uint32_t n_timings = 4;    // of single tokens, before the first draft

} // namespace

es_drafter::es_drafter(uint32_t n_max, uint32_t n_min, uint32_t n_match)
    : n_max_(n_max), n_min_(n_min), n_match_(n_match), newest_(n_slots), before_(2 * n_text) {
    text_.reserve(2 * n_text);
    for (uint32_t i = 0; i < n_lengths; ++i) {
        // before anything is known: the longer a repetition, the likelier that it goes on
        scores_[i] = { 4 * std::min(0.9, 0.1 + 0.1 * i), 4 };
    }
    for (uint32_t i = 0; i <= n_max + 1; ++i) {
        costs_.push_back(1 + row_cost * (i - 1.0));
    }
}

es_drafter::~es_drafter() = default;

void es_drafter::use(std::unique_ptr<es_draft_model> model) {
    model_ = std::move(model);
}

uint32_t es_drafter::slot(size_t end) const {
    uint64_t hash = 0;
    for (size_t i = end - n_match_; i < end; ++i) {
        hash = (hash + (uint32_t) text_[i] + 1) * 0x9e3779b97f4a7c15u;
    }
    return (uint32_t) (hash >> 48);
}

void es_drafter::index(size_t end) {
    if (end >= n_match_) {
        uint32_t & newest = newest_[slot(end)];
        uint32_t   older  = newest;
        while (older >= end) { // it was taken back
            older = before_[older - 1];
        }
        before_[end - 1] = older;
        newest           = (uint32_t) end;
    }
}

void es_drafter::push(const int32_t * tokens, size_t n) {
    if (model_) {
        model_->push(tokens, n);
    }
    if (n == 1) {
        seek();
        if (next_ > 0) {
            const bool hit = text_[next_] == tokens[0];
            score &    s   = score_of(n_equal_);
            s              = { 0.97 * s.hits + hit, 0.97 * s.n + 1 };
            next_          = hit ? next_ + 1 : 0;
            n_equal_ += hit;
        }
    } else {
        next_ = 0;
    }
    sought_ = next_ > 0;
    for (size_t i = 0; i < n; ++i) {
        if (text_.size() == 2 * n_text) {
            // the older half is forgotten
            text_.erase(text_.begin(), text_.begin() + n_text);
            std::fill(newest_.begin(), newest_.end(), 0);
            for (size_t end = 1; end <= text_.size(); ++end) {
                index(end);
            }
            next_ = next_ > n_text ? next_ - (uint32_t) n_text : 0;
        }
        text_.push_back(tokens[i]);
        index(text_.size());
    }
}

void es_drafter::rewind(size_t n) {
    if (model_) {
        model_->rewind(n);
    }
    text_.resize(text_.size() - std::min(n, text_.size()));
    next_   = 0;
    sought_ = false;
}

void es_drafter::clear() {
    text_.clear();
    next_   = 0;
    sought_ = false;
    if (model_) {
        model_->clear();
    }
}

// Finds the earlier place that has most tokens in common with the text's end.
void es_drafter::seek() {
    const size_t size = text_.size();
    if (sought_ || size < n_match_) {
        return;
    }
    sought_      = true;
    n_equal_     = 0;
    uint32_t end = newest_[slot(size)];
    // an index beyond the end is of tokens that were taken back
    for (uint32_t i = 0; i < n_places && end > 0; ++i) {
        uint32_t n = 0;
        while (end < size && n < std::min(n_far, end) && text_[end - 1 - n] == text_[size - 1 - n]) {
            ++n;
        }
        if (n >= n_match_ && n > n_equal_) {
            next_    = end;
            n_equal_ = n;
        }
        end = before_[end - 1];
    }
}

void es_drafter::draft(uint32_t n_room, std::vector<int32_t> & out) {
    const size_t   first = out.size();
    const uint32_t n     = std::min(n_room, n_max_);
    seek();
    if (next_ > 0) {
        const uint32_t n_looked_up = worth(n);
        for (uint32_t i = 0; i < n_looked_up; ++i) {
            // a repetition that reaches the text's end goes on with itself
            const size_t at = next_ + i;
            out.push_back(at < text_.size() ? text_[at] : out[first + at - text_.size()]);
        }
    }
    if (model_ && out.size() == first && n > 0) {
        const bool measured = n_single_ >= n_timings;
        model_->draft(n_min_ > 0 ? (n < n_min_ ? 0 : n) : measured ? model_->worth(n, gain, costs_, single_) : 0, out);
    }
}

// How much of the lookup's guess, at most n tokens.
uint32_t es_drafter::worth(uint32_t n) {
    if (n_min_ > 0) {
        return n < n_min_ ? 0 : n;
    }
    if (n_single_ < n_timings) {
        return 0;
    }
    const auto chance = [&](uint32_t k) {
        const score & s = score_of(n_equal_ + k - 1);
        return s.hits / s.n;
    };
    return es_best_length(n, gain, chance, [&](uint32_t k) { return costs_[k + 1]; });
}

void es_drafter::timed(uint32_t n_rows, int64_t us) {
    if (n_rows == 1) {
        const double weight = std::max(0.1, 1.0 / ++n_single_);
        const double bound  = n_single_ > 1 ? 3 * single_ : (double) us; // a delay of the machine's
        single_ += weight * (std::min((double) us, bound) - single_);
        // what was measured long ago is tried again
        for (size_t i = 2; i < costs_.size(); ++i) {
            costs_[i] += 0.002 * (1 + row_cost * ((double) i - 1) - costs_[i]);
        }
    } else if (single_ > 0) {
        double & cost = costs_[n_rows];
        cost += 0.2 * (std::clamp((double) us / single_, 1.0, 3 * cost) - cost);
    }
}
