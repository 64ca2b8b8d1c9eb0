// What a sampler may choose at all: a grammar, from the start or from a trigger on, and the length of thinking.
#pragma once

#include "llama-cpp.h"
#include "llama.h"

#include <string>
#include <vector>

class es_rules {
public:
    // grammar: GBNF, or null; chat: es_chat_request_info's "sampling", or null. Throws std::invalid_argument.
    es_rules(const llama_vocab * vocab, const char * grammar, const char * root, const char * chat);

    bool has_grammar() const { return grammar_ != nullptr; }

    // Whether the grammar has a say here (before its trigger it has it, too: it waits).
    bool applies() const;
    bool allows(llama_token token) const;
    void apply_grammar(llama_token_data_array & candidates) const { llama_sampler_apply(grammar_.get(), &candidates); }
    void apply_budget(llama_token_data_array & candidates) const;
    void accept(llama_token token);

private:
    llama_sampler_ptr grammar_, budget_;
    bool              is_lazy_ = false;
};
