// A llama_batch of tokens that belong to one sequence each.
#pragma once

#include "llama.h"

class es_batch {
public:
    explicit es_batch(uint32_t n_max = 0) {
        if (n_max > 0) {
            batch = llama_batch_init((int32_t) n_max, 0, 1);
        }
    }
    es_batch(const es_batch &)             = delete;
    es_batch & operator=(const es_batch &) = delete;
    ~es_batch() {
        if (batch.token) {
            llama_batch_free(batch);
        }
    }

    bool    allocated() const { return batch.token != nullptr; }
    int32_t size() const { return batch.n_tokens; }
    void    clear() { batch.n_tokens = 0; }
    void    add(llama_token token, llama_pos pos, llama_seq_id seq, bool logits) {
        const int32_t i    = batch.n_tokens++;
        batch.token[i]     = token;
        batch.pos[i]       = pos;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = seq;
        batch.logits[i]    = logits;
    }
    llama_seq_id seq(int32_t i) const { return batch.seq_id[i][0]; }
    bool         has_logits(int32_t i) const { return batch.logits[i]; }
    int32_t      decode(llama_context * ctx) const { return llama_decode(ctx, batch); } // what llama_decode returns

private:
    llama_batch batch = {};
};
