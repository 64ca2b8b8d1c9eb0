// Tools for templates that know none: described in the system prompt, called in the way of Hermes and Qwen.
#pragma once

#include "chat.h"

// Messages in which tools, calls and results are text that every template takes. tools: to be described; empty: none.
std::vector<common_chat_msg> es_generic_messages(const std::vector<common_chat_msg> &  messages,
                                                 const std::vector<common_chat_tool> & tools);

// Grammar and parser of answers to such messages.
common_chat_params es_generic_params(const common_chat_templates_inputs & inputs);
