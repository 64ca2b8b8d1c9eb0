// What a session keeps of a conversation beside the cache: JSON, the same as the Python package's.
#pragma once

#include "app_model.h"

#include <cstdint>
#include <deque>
#include <string>

class es_transcript {
public:
    struct message {
        std::string role, text;
    };

    std::string system;       // empty: none (null in the JSON)
    int64_t     n_answer = 0; // tokens of the last answer with the template's frame around it
    es_tokens   answer_start;
    bool        ended = false; // the model wrote an end-of-turn token that the template has yet to write

    const std::deque<message> & messages() const { return messages_; } // oldest first
    size_t                      n_dropped() const { return n_dropped_; }
    bool has_answer() const { return !messages_.empty() && messages_.back().role == "assistant"; }

    void    add(const char * role, const std::string & text); // what is no UTF-8 becomes U+FFFD
    void    trim();                                           // drops the oldest messages beyond a million bytes
    message take_last();
    void    clear(); // all but the system prompt

    // These set es_last_error.
    std::string to_json() const;
    int32_t     from_json(const std::string & json, const char * path);

    static size_t count_messages(const std::string & json); // 0 if it is not of a conversation

private:
    std::deque<message> messages_;
    size_t              n_dropped_ = 0, n_bytes_ = 0;
};
