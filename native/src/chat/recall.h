// A conversation's log: what is said goes in, and what belongs to a new message comes back. See
// es_conversation_set_log.
#pragma once

#include "edge_stream_recall.h"
#include "template.h"
#include "transcript.h"

#include <algorithm>

class es_recall {
public:
    // log: may be null. ES_ERR_FORMAT: it is of another conversation; nothing of it changed, and there is none then.
    int32_t use(es_log * log, uint32_t n_tokens, const es_transcript & transcript);

    // Gives the newest message what belongs to it, of the messages before first_held.
    void find(const es_chat & chat, es_transcript & transcript, int64_t first_held);

    // Messages from the n-th on may become others: they are written again.
    void retract(int64_t n) { n_written_ = std::min(n_written_, n); }

    // Brings the log up to the transcript. If that fails, the conversation goes on without.
    void write(const es_transcript & transcript);

    common_json found() const { return found_; } // for the newest message, or null
    common_json error() const { return error_.empty() ? common_json() : common_json(error_); }

private:
    es_log *    log_       = nullptr;
    uint32_t    n_tokens_  = 0; // of an entry that comes back
    int64_t     n_written_ = 0; // messages that the log has
    common_json found_;
    std::string error_;
};
