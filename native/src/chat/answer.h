// The answer that is being written: split into what it consists of, up to a text that ends it.
#pragma once

#include "edge_stream_chat.h"
#include "parser.h"

#include <deque>
#include <memory>

class es_answer {
public:
    // before: what was written of it earlier. May throw.
    es_answer(std::unique_ptr<es_chat_request> request, std::vector<std::string> stops, const std::string & before,
              const es_stream_stats & stream);

    // Adds a token's bytes, after which the stream is at n_past. how: es_answer_end. Returns what they add. A stream
    // that is further back than one token on has taken a loop back (es_stream_unloop): the message has it no longer.
    std::vector<common_chat_msg_diff> push(const std::string & bytes, int32_t how, int64_t n_past);
    bool                              is_ended() const { return is_ended_; } // nothing more belongs to it

    // The message. Of an answer that was cut: what is whole of it, which was written up to n_past(); raw() is that as
    // the model wrote it.
    common_json         message();
    int64_t             n_past() const { return n_past_; }
    const std::string & raw() const { return raw_; }
    common_json         info() const; // see es_chat_request_info

private:
    void take_back(size_t n_tokens);

    std::unique_ptr<es_chat_request> request_;
    std::unique_ptr<es_chat_parser>  parser_;
    std::vector<std::string>         stops_;
    const std::string                before_;
    std::string                      raw_;                 // up to the last whole character
    std::string                      part_;                // of a character
    size_t                           n_said_;              // bytes of raw_ that the parser has
    int64_t                          n_past_ = 0, n_seen_; // n_seen_: of the stream
    std::deque<size_t>               ends_;                // of raw_ after the newest tokens
    const size_t                     n_ends_;              // a loop is no longer than the cache
    bool                             is_ended_ = false;
};
