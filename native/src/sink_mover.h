// How the sinks' keys reach new positions: one interface, two ways (es_sink_move).
#pragma once

#include "edge_stream.h"

#include <cstdint>
#include <memory>
#include <vector>

class es_sink_mover {
public:
    virtual ~es_sink_mover() = default;

    // Around the decode of the sinks themselves: n of them at position pos.
    virtual int32_t before_sinks(uint32_t n, llama_pos pos)             = 0;
    virtual int32_t after_sinks(const llama_token * tokens, uint32_t n) = 0;

    // A move from position from to position to: prepare may decode, and may fail with nothing changed; then the
    // caller frees the target positions; commit completes.
    virtual int32_t prepare(llama_pos to)                = 0;
    virtual int32_t commit(llama_pos from, llama_pos to) = 0;

    // A decode of the stream succeeded: moved keys are in the cache now.
    virtual void decoded() = 0;

    // False while the cache holds positions whose keys only the next decode brings: it cannot be saved then.
    virtual bool can_save() const = 0;

    // True if rebase() may be called without a decode following at once.
    virtual bool can_rebase_idle() const = 0;

    // The last decode needed no move: stop writing the sinks' keys.
    virtual void settle() = 0;

    // Let every position of the sequence fall by delta, the sinks (at from) included.
    virtual int32_t rebase(llama_pos from, llama_pos delta) = 0;

    // Forget the sinks.
    virtual int32_t reset() = 0;

    // For sessions: bytes beyond the cache's own state (empty for redecode).
    virtual int32_t get_state(std::vector<uint8_t> & out)                                                 = 0;
    virtual int32_t set_state(const std::vector<uint8_t> & state, const std::vector<llama_token> & sinks) = 0;
};

// ES_ERR_DECODE (and es_last_error) if a remote device of ctx (NULL: none) stopped answering. Call it when the backends
// are done.
int32_t es_check_devices(llama_context * ctx);

// The bank (libllama carries the patch) and its support by ctx. Sets es_last_error if not.
int32_t es_bank_supported(llama_context * ctx);

// What keeps the model from streaming without the bank, or null.
const char * es_model_needs_bank(const llama_model * model);

// The position that no token of the model may reach, and why (null: there is no such bound).
int32_t es_position_limit(const llama_model * model, const char ** why);

// Give a restored recurrent state of seq its position.
void es_state_add(llama_context * ctx, llama_seq_id seq, llama_pos delta);

// Of a decoder, whose sinks stay where they are.
std::unique_ptr<es_sink_mover> es_sink_mover_none();

// Sets es_last_error and returns null on failure (status in *status).
std::unique_ptr<es_sink_mover> es_sink_mover_init(llama_context * ctx, const es_stream_params & params,
                                                  int32_t * status);
