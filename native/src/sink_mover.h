// How the sinks' keys reach new positions (es_sink_move).
#pragma once

#include "edge_stream.h"

#include <cstdint>
#include <memory>
#include <vector>

// This base class moves nothing; it is used with an es_decoder, whose sinks need no move.
class es_sink_mover {
public:
    virtual ~es_sink_mover() = default;

    // Called around the decode of n of the sinks at position pos.
    virtual int32_t before_sinks(uint32_t /*n*/, llama_pos /*pos*/) { return ES_OK; }
    virtual int32_t after_sinks(const llama_token * /*tokens*/, uint32_t /*n*/) { return ES_OK; }

    // Around the decode of n of the n_block tokens that are recalled, at position pos; window: where it begins. Failed:
    // n = 0. forget_recalled: their cells are freed by the caller.
    virtual bool    can_recall() const { return false; }
    virtual int32_t before_recalled(uint32_t /*n_block*/, uint32_t /*n*/, llama_pos /*pos*/, llama_pos /*window*/) {
        return ES_OK;
    }
    virtual int32_t after_recalled(uint32_t /*n*/) { return ES_OK; }
    virtual void    forget_recalled() {}

    // The recalled tokens' keys and values (empty: not to be had), and putting them in free cells at position pos.
    virtual std::vector<uint8_t> copy_recalled() { return {}; }
    virtual int32_t paste_recalled(const std::vector<uint8_t> & /*copy*/, llama_pos /*pos*/) { return ES_OK; }

    // Moving the sinks, and what is recalled, from position `from` to `to`: prepare may decode, and changes nothing if
    // it fails; then the caller frees the target positions; commit completes the move.
    virtual int32_t prepare(llama_pos /*to*/) { return ES_OK; }
    virtual int32_t commit(llama_pos /*from*/, llama_pos /*to*/) { return ES_OK; }

    // A decode of the stream succeeded: moved keys are in the cache.
    virtual void decoded() {}

    // False while the cache cannot be saved, because keys are only updated by the next decode.
    virtual bool can_save() const { return true; }

    // True if rebase() does its work at once rather than in the next decode.
    virtual bool can_rebase_idle() const { return false; }

    // The next decode needs no move: stop writing the sinks' keys.
    virtual void end_move() {}

    // Lowers every position of the sequence by delta, including those of the sinks (at from).
    virtual int32_t rebase(llama_pos /*from*/, llama_pos /*delta*/) { return ES_OK; }

    // Forgets the sinks.
    virtual int32_t reset() { return ES_OK; }

    // For sessions: bytes to save besides the cache (none for redecode).
    virtual int32_t get_state(std::vector<uint8_t> & out) {
        out.clear();
        return ES_OK;
    }
    virtual int32_t set_state(const std::vector<uint8_t> & /*state*/, const std::vector<llama_token> & /*sinks*/,
                              uint32_t /*n_recalled*/) {
        return ES_OK;
    }
};

// Sets es_last_error and returns null on failure (status in *status).
std::unique_ptr<es_sink_mover> es_sink_mover_init(llama_context * ctx, const es_stream_params & params,
                                                  int32_t * status);
