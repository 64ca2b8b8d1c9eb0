// A conversation on a stream. The template renders the whole of it; the stream reads what it does not hold yet.
#pragma once

#include "answer.h"
#include "edge_stream.h"
#include "edge_stream_chat.h"
#include "recall.h"
#include "transcript.h"

#include <atomic>
#include <optional>

// How reading is watched, and stopped: between decodes by on_progress, within them where may_abort tells the context's
// abort callback that it may.
struct es_reading {
    es_chat_progress    on_progress = nullptr;
    void *              user        = nullptr;
    std::atomic<bool> * may_abort   = nullptr;
};

struct es_conversation {
    std::string result; // what the last call of the C API returned

    es_conversation(const es_chat & chat, es_stream * stream) : chat_(chat), stream_(stream) {}

    // See es_conversation_n_keep. Sets es_last_error, as everything below that returns an es_status.
    static int32_t find_n_keep(const es_chat & chat, const char * options, uint32_t n_ctx, int32_t n_keep,
                               uint32_t & out);

    // options: of a request, and "system". answer: of this answer, and "stop"; NULL: none.
    int32_t init(const char * options);
    int32_t say(const char * messages, const char * answer, const es_reading & reading);
    int32_t regenerate(const char * answer, const es_reading & reading);
    int32_t go_on(const char * answer, const es_reading & reading);

    bool                              is_open() const { return answer_ != nullptr; }
    es_answer &                       answer() { return *answer_; } // the open one
    std::vector<common_chat_msg_diff> push(const std::string & bytes, int32_t how);
    common_json                       info() const; // of the newest answer
    int32_t                           end(int32_t how);

    // See es_conversation_set_log.
    int32_t set_log(es_log * log, uint32_t n_tokens);

    int32_t     clear();
    common_json messages() const;
    int32_t     save(std::string & out) const;
    int32_t     load(const char * json, const char * name); // the stream has been loaded

    const es_transcript & transcript() const { return transcript_; }

private:
    int32_t attempt(const char * answer, const es_reading & reading, const std::string & written);
    int32_t open(const char * answer, const es_reading & reading, const std::string & written);
    int32_t read(es_chat_request & request, size_t from, const std::string & written, const es_reading & reading);
    int32_t read_plan(const common_json & plan, int64_t first, const std::string & written, const es_reading & reading);
    int32_t find_plan(es_chat_request & request, size_t from, common_json & out);
    int32_t feed(const es_tokens & tokens, const es_reading & reading);
    void    go_back();
    void    undo();
    void    forget_places(int64_t first, int64_t last, int64_t n_messages);
    size_t  first_near() const;

    es_stream_stats stats() const;

    const es_chat & chat_;
    es_stream *     stream_;
    std::string     system_;
    common_json     options_ = common_json::object();

    es_transcript         transcript_;
    std::vector<es_place> places_;     // ascending
    int64_t               known_  = 0; // the stream's tokens up to here are the conversation's
    bool                  is_cut_ = false;
    std::string           cut_; // if so, what the model wrote of the last answer

    std::unique_ptr<es_answer> answer_;
    size_t                     n_read_ = 0, n_done_ = 0; // tokens to read for the newest answer, and those read
    std::string                note_;

    int64_t   first_held_ = 0; // messages before this one have left the stream
    es_recall recall_;

    // what undo and go_back put back
    size_t                                n_added_ = 0;
    std::optional<es_transcript::message> taken_;
    es_tokens                             taken_tokens_; // the stream's newest, before a plan
    std::vector<es_place>                 taken_places_; // and the places then
};
