// How the sinks' keys reach new positions (es_sink_move).
#pragma once

#include "edge_stream.h"

#include <cstdint>
#include <memory>
#include <vector>

// As it is, for a decoder, whose sinks stay where they are.
class es_sink_mover {
public:
    virtual ~es_sink_mover() = default;

    // Around the decode of the sinks themselves: n of them at position pos.
    virtual int32_t before_sinks(uint32_t /*n*/, llama_pos /*pos*/) { return ES_OK; }
    virtual int32_t after_sinks(const llama_token * /*tokens*/, uint32_t /*n*/) { return ES_OK; }

    // A move from position from to position to: prepare may decode, and may fail with nothing changed; then the
    // caller frees the target positions; commit completes.
    virtual int32_t prepare(llama_pos /*to*/) { return ES_OK; }
    virtual int32_t commit(llama_pos /*from*/, llama_pos /*to*/) { return ES_OK; }

    // A decode of the stream succeeded: moved keys are in the cache now.
    virtual void decoded() {}

    // False while the cache holds positions whose keys only the next decode brings: it cannot be saved then.
    virtual bool can_save() const { return true; }

    // True if rebase() is worth calling without a decode that follows at once.
    virtual bool can_rebase_idle() const { return false; }

    // The last decode needed no move: stop writing the sinks' keys.
    virtual void end_move() {}

    // Let every position of the sequence fall by delta, the sinks (at from) included.
    virtual int32_t rebase(llama_pos /*from*/, llama_pos /*delta*/) { return ES_OK; }

    // Forget the sinks.
    virtual int32_t reset() { return ES_OK; }

    // For sessions: bytes beyond the cache's own state (empty for redecode).
    virtual int32_t get_state(std::vector<uint8_t> & out) {
        out.clear();
        return ES_OK;
    }
    virtual int32_t set_state(const std::vector<uint8_t> & /*state*/, const std::vector<llama_token> & /*sinks*/) {
        return ES_OK;
    }
};

// Sets es_last_error and returns null on failure (status in *status).
std::unique_ptr<es_sink_mover> es_sink_mover_init(llama_context * ctx, const es_stream_params & params,
                                                  int32_t * status);
