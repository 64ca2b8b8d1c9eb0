// Guesses the tokens that come next: those that stood after the newest few where these stood before; where these never
// did, a draft model's, if there is one.
//
// Drafts are made only where they pay: it counts how often guesses come true, for which nothing is decoded, and takes
// the time of batches.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

class es_draft_model;

// How many tokens of at most n to draft: as many as give the most tokens expected per time, 0 if that is not above
// least. chance(k): that the k-th comes true if those before did. cost(k): of drafting and verifying k, in single
// tokens.
template <class Chance, class Cost>
uint32_t es_best_length(uint32_t n, double least, Chance && chance, Cost && cost) {
    double   best = least, all = 1, tokens = 1;
    uint32_t most = 0;
    for (uint32_t k = 1; k <= n; ++k) {
        all *= chance(k);
        tokens += all;
        if (tokens / cost(k) > best) {
            best = tokens / cost(k);
            most = k;
        }
    }
    return most;
}

class es_drafter {
public:
    // n_max: most tokens of a draft. n_min: 0, or draft all there is, if that is so many tokens, whether it pays or
    // not. n_match: least tokens that must have stood there before.
    es_drafter(uint32_t n_max, uint32_t n_min, uint32_t n_match);
    ~es_drafter();

    void use(std::unique_ptr<es_draft_model> model);

    void push(const int32_t * tokens, size_t n); // the text goes on; a single token is judged by what was guessed
    void rewind(size_t n);                       // it is shorter by its newest n tokens
    void clear();

    // Appends to out a draft of at most n_room tokens, or nothing.
    void draft(uint32_t n_room, std::vector<int32_t> & out);

    // A batch of n_rows tokens, one of which was not drafted, took so long.
    void timed(uint32_t n_rows, int64_t us);

private:
    uint32_t n_max_, n_min_, n_match_;

    std::unique_ptr<es_draft_model> model_;

    // The newest tokens, and for each, how the tokens up to it are found: the newest index of their hash, and the
    // one before. Indices may be out of date, so what they lead to is compared.
    std::vector<int32_t>  text_;
    std::vector<uint32_t> newest_, before_;

    uint32_t next_    = 0; // the token at this index of text_ is the guess; 0: there is none
    uint32_t n_equal_ = 0; // tokens before it that equal the text's newest, as far as they were compared
    bool     sought_  = true;

    // Of guesses after 1, 2, ... equal tokens: how many came true, and how many there were; old ones count less.
    static constexpr uint32_t n_lengths = 24;
    struct score {
        double hits, n;
    };
    std::array<score, n_lengths> scores_;

    double              single_   = 0; // microseconds of a single token
    uint32_t            n_single_ = 0;
    std::vector<double> costs_; // of batches of 0, 1, 2, ... tokens, relative to a single token

    uint32_t slot(size_t end) const; // of newest_, for the n_match_ tokens before end
    void     index(size_t end);
    void     seek();
    uint32_t worth(uint32_t n);
    score &  score_of(uint32_t n_equal) { return scores_[(n_equal < n_lengths ? n_equal : n_lengths) - 1]; }
};
