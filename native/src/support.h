// What a model's metadata say about streaming it.
#pragma once

#include "llama.h"

#include <string>

std::string es_model_meta(const llama_model * model, const std::string & key); // empty if it has no such key

// What keeps the model from streaming without the bank, or null.
const char * es_model_needs_bank(const llama_model * model);
