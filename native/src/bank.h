// What edge-stream adds to libllama. A stock libllama has none of it, so every reference is weak: null there.
#pragma once

#include "llama-es-bank.h"

#pragma weak llama_es_bank_check
#pragma weak llama_es_bank_alloc
#pragma weak llama_es_bank_free
#pragma weak llama_es_bank_capture_begin
#pragma weak llama_es_bank_capture_end
#pragma weak llama_es_bank_move
#pragma weak llama_es_bank_move_end
#pragma weak llama_es_bank_hide
#pragma weak llama_es_bank_unhide
#pragma weak llama_es_bank_copy
#pragma weak llama_es_bank_paste
#pragma weak llama_es_bank_shift_window
#pragma weak llama_es_bank_state_get
#pragma weak llama_es_bank_state_set
#pragma weak llama_es_lost_device
#pragma weak llama_es_position_limit
#pragma weak llama_es_bytes_per_token
#pragma weak llama_es_state_add
#pragma weak llama_es_has_positions
#pragma weak llama_es_memory_use

// ES_ERR_DECODE (and es_last_error) if a remote device of ctx (may be null) stopped answering. Call it when the
// backends are done.
int32_t es_check_devices(llama_context * ctx);

// Whether libllama has the bank and ctx supports it. Sets es_last_error if not.
int32_t es_bank_supported(llama_context * ctx);

// The position that no token of the model may reach, and why (null: there is no such limit).
int32_t es_position_limit(const llama_model * model, const char ** why);

// Whether the cells of seq are at the positions p0 to p1 - 1, one at each. A stock libllama only tells the first and
// last; a recurrent state (stateful) only has its last.
bool es_has_positions(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1, bool stateful);

// Adds delta to the position of the recurrent state of seq.
void es_state_add(llama_context * ctx, llama_seq_id seq, llama_pos delta);
