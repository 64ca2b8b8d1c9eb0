// A model's metadata, what they say about streaming, and its tokens' bytes.
#pragma once

#include "llama.h"

#include <string>

std::string es_model_meta(const llama_model * model, const std::string & key); // empty if it has no such key

// A token's bytes; empty for control tokens unless special.
std::string es_piece(const llama_vocab * vocab, llama_token token, bool special);

// What keeps the model from streaming without the bank, or null.
const char * es_model_needs_bank(const llama_model * model);
