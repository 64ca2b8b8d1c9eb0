// llama-es-bank.h: what edge-stream's patch adds to libllama. Internal to edge-stream: apps use edge_stream.h.
//
// The sink bank holds pristine float32 copies of the keys of pinned cells, one block per sequence. When the
// pinned cells get new positions, the next llama_decode re-derives their keys from the bank (rotate by the
// distance from the captured position, convert to the cache's type) inside its own graph. Window keys are
// never touched, nothing is copied to the host, and since a key is always derived from the pristine copy,
// error does not accumulate.
//
// Return codes: 0 success, negative enum es_bank_status. On failure nothing changed unless stated otherwise.
#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

enum es_bank_status {
    ES_BANK_OK            = 0,
    ES_BANK_UNSUPPORTED   = -1, // this kind of memory has no bank (recurrent, indexed, partial SWA cache, ...)
    ES_BANK_INVALID       = -2, // no such block, cell or row
    ES_BANK_NO_MEMORY     = -3,
    ES_BANK_PENDING_SHIFT = -4, // the memory has a pending K-shift that llama.cpp has not applied yet
    ES_BANK_COMPUTE       = -5, // the backend failed
    ES_BANK_FORMAT        = -6, // a saved block does not fit this model
};

// 0 if ctx can hold a bank; otherwise a code, and why_not (may be NULL) points to a static sentence
LLAMA_API int32_t llama_es_bank_check(struct llama_context * ctx, const char ** why_not);

// Allocate a block of n_rows pinned rows for seq (replacing an older one), to be filled by captures.
LLAMA_API int32_t llama_es_bank_alloc(struct llama_context * ctx, llama_seq_id seq, uint32_t n_rows);
LLAMA_API void    llama_es_bank_free(struct llama_context * ctx, llama_seq_id seq);

// The next llama_decode must be exactly n tokens of seq at positions pos, pos+1, ..., in one ubatch: their keys
// become the next n rows. Rows must be captured in order at consecutive positions. capture_end ends the
// capture; it fails if no such decode came. keep = false: the decode failed, the rows are captured again later.
LLAMA_API int32_t llama_es_bank_capture_begin(struct llama_context * ctx, llama_seq_id seq, uint32_t n, llama_pos pos);
LLAMA_API int32_t llama_es_bank_capture_end(struct llama_context * ctx, llama_seq_id seq, bool keep);

// Give the block's cells the positions pos, pos+1, ... Metadata only: the keys follow in every llama_decode from
// now on until llama_es_bank_move_end (writing them again is harmless; leaving them out makes the graph smaller).
LLAMA_API int32_t llama_es_bank_move(struct llama_context * ctx, llama_seq_id seq, llama_pos pos);
LLAMA_API int32_t llama_es_bank_move_end(struct llama_context * ctx, llama_seq_id seq);

// Add delta to the position of every cell of seq that is not pinned and rotate its key in place, once; a recurrent
// state of seq gets the position too.
// If the backend fails half-way the keys of seq are undefined: the caller must clear the sequence.
LLAMA_API int32_t llama_es_bank_shift_window(struct llama_context * ctx, llama_seq_id seq, llama_pos delta);

// The block of seq as bytes, for session files. state_get returns the size (with dst NULL, only the size).
LLAMA_API size_t llama_es_bank_state_get(struct llama_context * ctx, llama_seq_id seq, uint8_t * dst, size_t size);
// Restores a block whose cells were already restored by llama_state_seq_set_data.
LLAMA_API int32_t llama_es_bank_state_set(struct llama_context * ctx, llama_seq_id seq, const uint8_t * src,
                                          size_t size);

// The position from which on the model's attention depends on where a token stands, not only on distances (and *what:
// which property), or the largest llama_pos and NULL.
LLAMA_API llama_pos llama_es_position_limit(const struct llama_model * model, const char ** what);

// Bytes that a token takes in the cache of such a model (ggml_type of K and V), all attention layers together.
LLAMA_API uint64_t llama_es_bytes_per_token(const struct llama_model * model, int32_t type_k, int32_t type_v);

// Add delta to the position of the state of seq alone (recurrent layers), as after llama_state_seq_set_data_ext.
LLAMA_API void llama_es_state_add(struct llama_context * ctx, llama_seq_id seq, llama_pos delta);

// Bytes of all cells' keys and values, and of the states of recurrent layers.
LLAMA_API void llama_es_memory_use(struct llama_context * ctx, uint64_t * cache, uint64_t * state);

// For tests of the proof (es_stream_prove): from now on contexts learn a wrong rotation. Process-wide.
enum es_bank_fault {
    ES_BANK_FAULT_NONE = 0,
    ES_BANK_FAULT_SIGN = 1, // turned the other way
    ES_BANK_FAULT_BASE = 2, // another base
    ES_BANK_FAULT_NOPE = 3, // layers without rotation are rotated
};
LLAMA_API void llama_es_bank_fault(int32_t kind);

// NULL, or the address of a remote device of ctx (RPC) that stopped answering: what was computed since is not valid,
// and neither is the cache. Call it after llama_synchronize or llama_get_logits_ith. Freeing ctx and the model still
// works.
LLAMA_API const char * llama_es_lost_device(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
