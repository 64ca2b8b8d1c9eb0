// A conversation on a stream: each turn adds its own tokens, nothing before it is read again. The system prompt is
// pinned. What it keeps beside the cache goes into session files as JSON, the same as the Python package's.
#pragma once

#include "app_stream.h"
#include "turns.h"

#include <deque>

class es_conversation {
public:
    struct message {
        std::string role, text;
    };

    // Sets es_last_error, as everything below that returns an es_status.
    static int32_t   make_turns(const es_loaded_model & model, const char * chat_template, const std::string & system,
                                es_turns & out);
    static es_tokens head_tokens(const es_loaded_model & model, const es_turns & turns); // what is pinned

    es_conversation(es_app_stream & stream, es_turns turns, std::string system);

    int32_t say(const std::string & text, const es_app_answer_params & params, es_app_progress on_progress,
                void * user);
    int32_t regenerate(const es_app_answer_params & params);
    int32_t next(es_app_token & out);
    int32_t end();
    int32_t clear();

    const std::deque<message> & messages() const { return messages_; }
    size_t                      n_dropped() const { return n_dropped_; }

    // For sessions. A null system in the JSON is an empty string here.
    std::string    to_json() const;
    int32_t        from_json(const std::string & json, const char * path);
    static int32_t read_system(const std::string & json, const char * path, std::string & out);
    static size_t  count_messages(const std::string & json); // 0 if it is not of a conversation

private:
    struct tokens_of_turn {
        es_tokens message, answer;
    };
    int32_t   turn(const std::string & text, bool first, tokens_of_turn & out) const;
    int32_t   feed_message(es_tokens tokens, bool heed_stop, es_app_progress on_progress, void * user);
    int32_t   open_answer(const es_app_answer_params & params);
    int32_t   take_back(int64_t n);
    int32_t   refeed();
    es_tokens after_end(const es_tokens & tokens) const;
    void      trim();

    es_app_stream & stream_;
    es_turns        turns_;
    std::string     system_;
    es_tokens       head_, close_;

    std::deque<message> messages_;
    size_t              n_dropped_ = 0, n_bytes_ = 0;

    int64_t     n_answer_ = 0; // tokens of the last answer with the template's frame around it
    es_tokens   answer_start_;
    bool        ended_ = false; // the model wrote an end-of-turn token that the template has yet to write
    std::string answer_;        // bytes written so far
    int64_t     answer_at_ = 0; // n_past where the open answer began
    bool        closed_ = false, complete_ = false;
};
