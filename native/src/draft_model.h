// A smaller model with the same vocabulary guesses the tokens that come next: a stream of its own, with sinks and a
// window, which reads the text and writes on.
//
// It guesses only where that pays: it counts how often its guesses come true, and takes its own time. Where it does not
// pay it sleeps, and is tried again after a while; each time that this was in vain it sleeps twice as long.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

struct es_stream;

class es_draft_model {
public:
    // Takes the stream. n_vocab: tokens that may be guessed.
    es_draft_model(es_stream * stream, int32_t n_vocab);
    ~es_draft_model();

    void push(const int32_t * tokens, size_t n); // the text goes on
    void rewind(size_t n);                       // it is shorter by its newest n tokens
    void clear();

    // How many tokens to guess, at most n: those with the most tokens expected per time, if these are more than
    // without by a factor of gain. costs[r]: of a batch of r tokens, in those of a single one, which takes so long.
    uint32_t worth(uint32_t n, double gain, const std::vector<double> & costs, double single_us);

    // Appends n guesses to out; fewer, or none, where its stream fails.
    void draft(uint32_t n, std::vector<int32_t> & out);

private:
    es_stream *          stream_;
    int32_t              n_vocab_;
    std::vector<int32_t> unread_;  // the text's end
    std::vector<int32_t> guesses_; // what was guessed to follow the text; all but the last are in the stream, after it
    bool                 gap_ = false; // text before unread_ was dropped unread

    // Of guesses: how many came true, and how many there were; old ones count less.
    double hits_, n_;
    double cost_us_ = 0; // of a guess
    int    trials_;      // drafts that are made to find out

    int64_t asleep_ = 0; // tokens to sleep
    int64_t nap_;        // the next sleep

    void begin();
    void drop_guesses();
    void take_back(size_t n);
    bool read();
};
