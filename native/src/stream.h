// The stream behind the C API: a window, a sink mover, and a sequence of a llama_context or an es_decoder.
#pragma once

#include "batch.h"
#include "drafter.h"
#include "sampler_state.h"
#include "sink_mover.h"
#include "window.h"

#include <deque>
#include <memory>
#include <vector>

struct es_stream {
    es_stream(llama_context * ctx, const es_stream_params & params);
    es_stream(const llama_model * vocab, const es_decoder & decoder, const es_stream_params & params);
    ~es_stream();

    int32_t init();
    int32_t feed(const llama_token * tokens, size_t n_tokens, es_logits_callback on_logits, void * user);

    // Feeds one token to each of several streams of one context, in one decode.
    static int32_t feed_each(es_stream * const * streams, const llama_token * tokens, size_t n);

    int32_t rewind(size_t n);
    int32_t recall(const llama_token * tokens, size_t n);
    int32_t unrecall();
    bool    can_recall() const; // with this model and this way of moving sinks
    int32_t mark();
    int32_t rebase();
    int32_t reset();

    // Changes to the parameters and window of a session file; the caller restores the keys. Everything is checked
    // first: on failure nothing has changed.
    int32_t resize(const es_stream_params & wanted, const es_window::state & state);

    const llama_model *            model;
    llama_context *                ctx     = nullptr; // null: the decoder computes
    llama_memory_t                 mem     = nullptr;
    es_decoder                     decoder = {};
    es_stream_params               params; // as given; effective values are in window.params()
    es_window                      window;
    std::unique_ptr<es_sink_mover> mover;
    std::unique_ptr<es_batch>      batch;          // null: the decoder has its own
    bool                           broken = false; // the cache is undefined: only reset helps
    bool                           stateful;       // it has recurrent layers, whose state cannot be evicted or undone

    // [n_vocab] or empty; a copy, since other streams' decodes overwrite the context's
    std::vector<float> last_logits;

    // a session's sampler state, until es_sampler_restore takes it
    std::unique_ptr<es_sampler_state> saved_sampler;

    std::unique_ptr<es_drafter> drafter; // null: nothing is drafted
    int64_t                     n_drafts = 0, n_drafted = 0, n_accepted = 0;

    int32_t set_draft(es_stream * draft); // see es_stream_set_draft

    // Takes drafts out of the cache, which then holds what the stream does.
    void settle() const;

    const float *   logits() const; // null if there are none
    int32_t         n_vocab() const;
    es_decoder_step now() const; // what is cached, for the decoder

    int64_t n_slides = 0, n_rebases = 0;
    int64_t t_slide_us = 0, t_rebase_us = 0, t_decode_us = 0;

    // Keeps the current state of recurrent layers, for rewinds.
    int32_t keep_state();
    void    forget_states() { checkpoints.clear(); }

    bool state_lost = false; // a decode failed half-way: the recurrent state is undefined

private:
    // The recurrent state after n_past tokens.
    struct checkpoint {
        int64_t              n_past;
        llama_pos            pos; // of its last token, when it was taken
        std::vector<uint8_t> data;
    };
    std::deque<checkpoint> checkpoints; // ascending

    // Drafted tokens in the cache beyond the stream's end, of which n_used belong to it by now, and the logits after
    // each.
    struct drafts {
        std::vector<llama_token> tokens;
        std::vector<float>       rows; // [tokens.size()][n_vocab]
        size_t                   n_used = 0;
    };
    mutable drafts ahead;

    bool     can_draft() const;
    int32_t  feed_one(llama_token token); // and drafts
    uint32_t room_ahead() const;
    bool     take_draft(llama_token token);
    void     push(const llama_token * tokens, uint32_t m);

    // Recalled blocks' keys and values, the newest last.
    struct kept_block {
        std::vector<llama_token> tokens;
        std::vector<uint8_t>     copy;
    };
    std::deque<kept_block> kept_blocks;

    int32_t check_recall(size_t n) const;
    int32_t shift(llama_pos fall);
    int32_t read_recalled();
    void    keep_recalled();
    int32_t decode_recalled();

    int32_t to_state_of(int64_t n_past); // back to the first n_past tokens

    int32_t check(const es_stream_params & p, es_window_params & out) const;
    int32_t check_tokens(const llama_token * tokens, size_t n_tokens) const;
    int32_t make_room(uint32_t m);
    int32_t slide(uint32_t n_evict);
    void    add_to_batch(es_batch & out, const llama_token * tokens, uint32_t m, llama_pos pos, bool all_logits) const;
    int32_t decode(const llama_token * tokens, uint32_t m, bool all_logits) {
        return decode(tokens, m, window.pos_next(), now(), all_logits);
    }
    int32_t decode(const llama_token * tokens, uint32_t m, llama_pos pos, es_decoder_step step, bool all_logits);
    int32_t keep_logits(int32_t i);
    void    remove(llama_pos from, llama_pos to) const;

    const float * row(int32_t i) const; // of the last decode's logits; -1: the last row

    const float * rows   = nullptr; // the decoder's
    uint32_t      n_rows = 0;
};
