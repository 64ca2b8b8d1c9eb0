// The part of libllama that edge-stream adds, as this library sees it: a stock libllama has none of it, so that every
// reference is weak and null there.
#pragma once

#include "llama-es-bank.h"

#pragma weak llama_es_bank_check
#pragma weak llama_es_bank_alloc
#pragma weak llama_es_bank_free
#pragma weak llama_es_bank_capture_begin
#pragma weak llama_es_bank_capture_end
#pragma weak llama_es_bank_move
#pragma weak llama_es_bank_move_end
#pragma weak llama_es_bank_shift_window
#pragma weak llama_es_bank_state_get
#pragma weak llama_es_bank_state_set
#pragma weak llama_es_lost_device
#pragma weak llama_es_position_limit
#pragma weak llama_es_bytes_per_token
#pragma weak llama_es_state_add
#pragma weak llama_es_memory_use

// ES_ERR_DECODE (and es_last_error) if a remote device of ctx (NULL: none) stopped answering. Call it when the backends
// are done.
int32_t es_check_devices(llama_context * ctx);

// The bank (libllama carries the patch) and its support by ctx. Sets es_last_error if not.
int32_t es_bank_supported(llama_context * ctx);

// The position that no token of the model may reach, and why (null: there is no such bound).
int32_t es_position_limit(const llama_model * model, const char ** why);

// Give a restored recurrent state of seq its position.
void es_state_add(llama_context * ctx, llama_seq_id seq, llama_pos delta);
