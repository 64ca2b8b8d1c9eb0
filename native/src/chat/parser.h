#pragma once

#include "request.h"

struct es_chat_parser {
    std::string result; // what the last call returned

    // before: what was written of the answer. May throw.
    es_chat_parser(const es_chat_request & request, const char * before);

    std::vector<common_chat_msg_diff> push(const std::string & bytes, bool is_last);
    const common_chat_msg &           message() const { return message_; }

private:
    common_chat_msg parse(bool is_partial);

    common_chat_parser_params params_;
    size_t                    n_call_id_;
    bool                      is_parsed_;
    common_chat_msg           message_;
    std::string               text_, held_; // held_: an incomplete character
    size_t                    n_new_ = 0;   // bytes not parsed yet
    std::vector<std::string>  ids_;
};
