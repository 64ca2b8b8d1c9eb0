// A conversation on a stream: each turn adds its own tokens, nothing before it is read again. The system prompt is
// pinned.
#pragma once

#include "app_stream.h"
#include "transcript.h"
#include "turns.h"

class es_conversation {
public:
    // Sets es_last_error, as everything below that returns an es_status.
    static int32_t   make_turns(const es_loaded_model & model, const char * chat_template, const std::string & system,
                                es_turns & out);
    static es_tokens head_tokens(const es_loaded_model & model, const es_turns & turns); // what is pinned

    es_conversation(es_app_stream & stream, es_turns turns, es_transcript transcript);

    int32_t say(const std::string & text, const es_app_answer_params & params, es_app_progress on_progress,
                void * user);
    int32_t regenerate(const es_app_answer_params & params);
    int32_t next(es_app_token & out);
    int32_t end();
    int32_t clear();

    const es_transcript & transcript() const { return transcript_; }

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

    es_app_stream & stream_;
    es_turns        turns_;
    es_transcript   transcript_;
    es_tokens       head_, close_;

    std::string answer_;        // bytes of the open answer so far
    int64_t     answer_at_ = 0; // n_past where it began
    bool        closed_ = false, complete_ = false;
};
