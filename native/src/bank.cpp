#include "bank.h"

#include "error.h"

#include <limits>

bool es_bank_available(void) {
    return llama_es_bank_check != nullptr;
}

int32_t es_check_devices(llama_context * ctx) {
    const char * lost = ctx && llama_es_lost_device ? llama_es_lost_device(ctx) : nullptr;
    return lost ? es_fail(
                      ES_ERR_DECODE,
                      "the RPC server at %s stopped answering: its part of the stream is lost (saved sessions are not)",
                      lost)
                : (int32_t) ES_OK;
}

int32_t es_position_limit(const llama_model * model, const char ** why) {
    *why = nullptr;
    return llama_es_position_limit ? llama_es_position_limit(model, why) : std::numeric_limits<int32_t>::max();
}

bool es_has_positions(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1, bool stateful) {
    const llama_memory_t mem = llama_get_memory(ctx);
    return (stateful || llama_memory_seq_pos_min(mem, seq) == p0) && llama_memory_seq_pos_max(mem, seq) + 1 == p1 &&
           (!llama_es_has_positions || llama_es_has_positions(ctx, seq, p0, p1));
}

void es_state_add(llama_context * ctx, llama_seq_id seq, llama_pos delta) {
    if (llama_es_state_add) {
        llama_es_state_add(ctx, seq, delta);
    } else {
        llama_memory_seq_add(llama_get_memory(ctx), seq, -1, -1, delta); // its memory holds only states
    }
}

uint64_t es_model_bytes_per_token(const llama_model * model, int32_t type_k, int32_t type_v) {
    return model && llama_es_bytes_per_token ? llama_es_bytes_per_token(model, type_k, type_v) : 0;
}

void es_context_memory(llama_context * ctx, uint64_t * cache, uint64_t * state) {
    *cache = *state = 0;
    if (ctx && llama_es_memory_use) {
        llama_es_memory_use(ctx, cache, state);
    }
}

int32_t es_bank_supported(llama_context * ctx) {
    if (!es_bank_available()) {
        return es_fail(ES_ERR_UNSUPPORTED, "the loaded libllama does not carry edge-stream's sink bank");
    }
    const char * why = nullptr;
    if (llama_es_bank_check(ctx, &why) != ES_BANK_OK) {
        return es_fail(ES_ERR_UNSUPPORTED, "the model cannot stream: %s", why);
    }
    return ES_OK;
}
