// A graph takes the model's memory for the kind that its architecture knows; metadata decide which kind it is.
#pragma once

#include "ggml.h"
#include "llama-memory.h"

template <typename Context>
const Context * es_memory_kind(const llama_memory_context_i * memory) {
    const auto * found = dynamic_cast<const Context *>(memory);
    GGML_ASSERT(found && "the model's metadata ask for a memory that its architecture does not know");
    return found;
}
