// llama-es-bank.h: what edge-stream adds to libllama. Internal: apps use edge_stream.h.
//
// The sink bank holds pristine float32 copies of the keys of pinned cells. A sequence has up to two blocks of them: its
// sinks, and what was recalled, which follows them. After pinned cells get new positions, the next llama_decode
// re-derives their keys from the bank within its own graph: rotated by the distance from the captured position,
// converted to the cache's type. Window keys are not touched, nothing is copied to the host, and errors do not
// accumulate.
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
    ES_BANK_PENDING_SHIFT = -4, // llama.cpp has yet to apply a K-shift to this memory
    ES_BANK_COMPUTE       = -5, // the backend failed
    ES_BANK_FORMAT        = -6, // a saved block does not fit this model
};

// 0 if ctx can have a bank; otherwise a code, and *why_not (unless NULL) says why, valid until the thread's next call
LLAMA_API int32_t llama_es_bank_check(struct llama_context * ctx, const char ** why_not);

enum es_bank_part {
    ES_BANK_SINKS    = 0,
    ES_BANK_RECALLED = 1,
};

// Allocates a block of n_rows pinned rows for a part of seq, replacing an older one, to be filled by captures.
LLAMA_API int32_t llama_es_bank_alloc(struct llama_context * ctx, llama_seq_id seq, int32_t part, uint32_t n_rows);
LLAMA_API void    llama_es_bank_free(struct llama_context * ctx, llama_seq_id seq, int32_t part);

// The next llama_decode must be exactly n tokens of seq at positions pos, pos+1, ..., in one ubatch: their keys become
// the next n rows. Rows are captured in order at consecutive positions. capture_end fails if there was no such decode.
// keep = false: the decode failed, and the rows will be captured again.
LLAMA_API int32_t llama_es_bank_capture_begin(struct llama_context * ctx, llama_seq_id seq, int32_t part, uint32_t n,
                                              llama_pos pos);
LLAMA_API int32_t llama_es_bank_capture_end(struct llama_context * ctx, llama_seq_id seq, int32_t part, bool keep);

// Gives the block's cells the positions pos, pos+1, ... This changes metadata only; every llama_decode until
// llama_es_bank_move_end writes the keys (again is harmless; not writing them makes the graph smaller).
LLAMA_API int32_t llama_es_bank_move(struct llama_context * ctx, llama_seq_id seq, int32_t part, llama_pos pos);
LLAMA_API int32_t llama_es_bank_move_end(struct llama_context * ctx, llama_seq_id seq, int32_t part);

// Takes the cells of seq at positions >= from out of it, or puts them back: in between, tokens before them can be
// decoded, as llama_decode only takes tokens that follow all others of their sequence.
LLAMA_API int32_t llama_es_bank_hide(struct llama_context * ctx, llama_seq_id seq, llama_pos from);
LLAMA_API int32_t llama_es_bank_unhide(struct llama_context * ctx, llama_seq_id seq);

// Adds delta to the position of every cell of seq that is not pinned, rotating its key in place, and to the position of
// a recurrent state of seq. If the backend fails half-way, the keys of seq are undefined: clear the sequence.
LLAMA_API int32_t llama_es_bank_shift_window(struct llama_context * ctx, llama_seq_id seq, llama_pos delta);

// The blocks of seq as bytes, for session files. Returns the size; dst may be NULL.
LLAMA_API size_t llama_es_bank_state_get(struct llama_context * ctx, llama_seq_id seq, uint8_t * dst, size_t size);
// Restores blocks whose cells llama_state_seq_set_data has restored.
LLAMA_API int32_t llama_es_bank_state_set(struct llama_context * ctx, llama_seq_id seq, const uint8_t * src,
                                          size_t size);

// A block with its values as bytes (0: it cannot be copied), and such a block in free cells at positions pos, pos+1,
// ...
LLAMA_API size_t  llama_es_bank_copy(struct llama_context * ctx, llama_seq_id seq, int32_t part, uint8_t * dst,
                                     size_t size);
LLAMA_API int32_t llama_es_bank_paste(struct llama_context * ctx, llama_seq_id seq, int32_t part, llama_pos pos,
                                      const uint8_t * src, size_t size);

// The position from which on the model's attention depends on absolute positions, and *what: the property that does;
// or the largest llama_pos and NULL.
LLAMA_API llama_pos llama_es_position_limit(const struct llama_model * model, const char ** what);

// Bytes per token in the model's cache (ggml_type of K and V), all attention layers together.
LLAMA_API uint64_t llama_es_bytes_per_token(const struct llama_model * model, int32_t type_k, int32_t type_v);

// Adds delta to the position of the recurrent state of seq only, as needed after llama_state_seq_set_data_ext.
LLAMA_API void llama_es_state_add(struct llama_context * ctx, llama_seq_id seq, llama_pos delta);

// Whether seq has exactly one cell at each of the positions p0 to p1 - 1 in every cache (where sliding-window layers
// have a smaller one: no two at one position, the last at p1 - 1), and its recurrent state, if any, is at p1 - 1:
// llama_state_seq_set_data takes any positions.
LLAMA_API bool llama_es_has_positions(struct llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1);

// Bytes of all keys and values, and of recurrent layers' states.
LLAMA_API void llama_es_memory_use(struct llama_context * ctx, uint64_t * cache, uint64_t * state);

// For tests of es_stream_prove: contexts learn a wrong rotation from now on. Process-wide.
enum es_bank_fault {
    ES_BANK_FAULT_NONE = 0,
    ES_BANK_FAULT_SIGN = 1, // turned the other way
    ES_BANK_FAULT_BASE = 2, // another base
    ES_BANK_FAULT_NOPE = 3, // layers without rotation are rotated
};
LLAMA_API void llama_es_bank_fault(int32_t kind);

// The address of a remote device of ctx (RPC) that stopped answering, or NULL. Results since then, and the cache, are
// invalid; ctx and the model can still be freed. Call it after llama_synchronize or llama_get_logits_ith.
LLAMA_API const char * llama_es_lost_device(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
