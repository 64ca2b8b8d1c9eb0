// An answer, split into content, thinking and tool calls while it is written.
#pragma once

#include "request.h"

struct es_chat_parser {
    std::string result; // what the last call returned

    // before: what was written of the answer. May throw.
    es_chat_parser(const es_chat_request & request, const char * before);

    // now: even where it would cost too much to do so after every token.
    std::vector<common_chat_msg_diff> push(const std::string & bytes, bool is_last, bool now = false);
    const common_chat_msg &           message() const { return message_; }

private:
    using diffs = std::vector<common_chat_msg_diff>;

    common_chat_msg parse(const std::string & text, bool is_partial);
    diffs           changed(common_chat_msg m, const std::string & more);
    diffs           broken();
    std::string     lost(const std::string & text);

    common_chat_parser_params params_;
    size_t                    n_call_id_;
    bool                      is_parsed_, is_plain_; // is_plain_: without calls, all of it is content
    common_chat_msg           message_;
    std::string               text_, held_; // held_: an incomplete character
    size_t                    n_new_ = 0;   // bytes not parsed yet
    std::vector<std::string>  ids_;
};

// As in OpenAI's chunks, without what is empty.
common_json es_delta_json(const std::vector<common_chat_msg_diff> & diffs);

// As it should come back in the next request.
common_json es_message_json(const common_chat_msg & message);
