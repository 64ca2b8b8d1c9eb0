// What a chat turn adds to a stream, as text, for llama.cpp's built-in templates.
//
// A template renders whole conversations; a stream only needs what is new. So it is rendered with a placeholder for the
// last answer, and the text after the placeholder is what the turn adds (the Python package does the same with Jinja).
#pragma once

#include "edge_stream_app.h"

#include <string>
#include <utility>
#include <vector>

class es_turns {
public:
    struct turn {
        std::string message; // the user's message as the template writes it
        std::string answer;  // the start of the answer
    };

    // tmpl: a name or a Jinja source that llama.cpp recognises. Sets es_last_error.
    int32_t init(std::string tmpl, std::string system);

    const std::string & head() const { return head_; }       // before the first user message: the system prompt
    const std::string & closing() const { return closing_; } // after an answer

    int32_t first(const std::string & text, turn & out) const;
    int32_t next(const std::string & text, turn & out) const;

private:
    using messages = std::vector<std::pair<const char *, std::string>>;

    std::string render(const messages & past, bool open_answer) const;
    messages    with_system(messages rest) const;
    std::string find_head() const;
    int32_t     find_closing(std::string & out) const;

    std::string tmpl_, system_, head_, closing_;
};
