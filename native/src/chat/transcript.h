// The messages of a conversation, and the JSON that a session stores of it besides the cache.
#pragma once

#include "json.h"

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

class es_transcript {
public:
    struct message {
        common_json json;                        // as in a request
        std::string role, text, thinking, calls; // of it; calls: JSON, or empty

        explicit message(const common_json & m);  // throws unless it is a message
        void   recall(const common_json & found); // what this message is to be read with: see es_conversation_info
        size_t n_bytes() const { return text.size() + thinking.size() + calls.size(); }
    };

    const std::deque<message> & messages() const { return messages_; } // oldest first, without the system prompt
    size_t                      n_dropped() const { return n_dropped_; }
    int64_t count() const { return (int64_t) (n_dropped_ + messages_.size()); } // dropped ones included
    bool    has_answer() const { return !messages_.empty() && messages_.back().role == "assistant"; }
    bool    is_start(size_t i) const; // a history may begin with message i

    void    add(message m);
    message take_last();
    void    trim(); // drops the oldest turns beyond a million bytes
    void    clear(size_t n_dropped = 0);

    // The messages from the i-th on, behind a system prompt unless it is empty.
    common_json to_json(size_t i, const std::string & system) const;

private:
    std::deque<message> messages_;
    size_t              n_dropped_ = 0, n_bytes_ = 0;
};

// Where the stream has read which messages: n_messages of all that there were, at n_past.
struct es_place {
    int64_t n_messages, n_past;
};

// A conversation in a session.
struct es_saved_conversation {
    std::string           system;
    common_json           tools; // null: none
    es_transcript         transcript;
    std::vector<es_place> places;     // n_past: tokens before the stream's end, at most 0
    int64_t               n_left = 0; // messages before this one have left the stream
    bool                  is_cut = false;
    std::string           cut; // if so, what the model wrote of the last answer

    common_json to_json() const;
    // Also reads what edge-stream 1 wrote. name: of the file, for messages. Sets es_last_error.
    int32_t from_json(const std::string & json, const char * name);
};
