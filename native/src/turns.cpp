#include "turns.h"

#include "error.h"
#include "llama.h"

#include <algorithm>

namespace {

const std::string placeholder = "Answer-7f3a91.";

// The common prefix, without a control token such as <|end|> that is only partly in it.
std::string common_prefix(const std::string & one, const std::string & two) {
    size_t n = 0;
    while (n < std::min(one.size(), two.size()) && one[n] == two[n]) {
        ++n;
    }
    if (n == one.size()) {
        return one;
    }
    while (n > 0 && ((unsigned char) one[n] & 0xc0) == 0x80) { // not inside a UTF-8 character
        --n;
    }
    const size_t open = one.substr(0, n).find_last_of(" \t\r\n<>[]");
    if (open != std::string::npos && (one[open] == '<' || one[open] == '[')) {
        n = open;
    }
    return one.substr(0, n);
}

std::string trim(const std::string & s) {
    const size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
    return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

bool starts_with(const std::string & s, const std::string & prefix) {
    return s.compare(0, prefix.size(), prefix) == 0;
}

// alone: a message; both: the message and the start of its answer.
void split(const std::string & alone, const std::string & both, es_turns::turn & out) {
    out.message = common_prefix(alone, both);
    out.answer  = both.substr(out.message.size());
}

std::string after_placeholder(const std::string & whole) {
    const size_t at = whole.rfind(placeholder);
    return at == std::string::npos ? whole : whole.substr(at + placeholder.size());
}

} // namespace

int32_t es_turns::init(std::string tmpl, std::string system) {
    tmpl_   = std::move(tmpl);
    system_ = std::move(system);
    head_   = find_head();
    return find_closing(closing_);
}

std::string es_turns::render(const messages & past, bool open_answer) const {
    std::vector<llama_chat_message> chat;
    for (const auto & [role, text] : past) {
        chat.push_back({ role, text.c_str() });
    }
    const auto apply = [&](char * buf, int32_t size) {
        return llama_chat_apply_template(tmpl_.c_str(), chat.data(), chat.size(), open_answer, buf, size);
    };
    std::string out((size_t) std::max(0, apply(nullptr, 0)), '\0');
    apply(out.data(), (int32_t) out.size());
    return out;
}

es_turns::messages es_turns::with_system(messages rest) const {
    if (!system_.empty()) {
        rest.insert(rest.begin(), { "system", system_ });
    }
    return rest;
}

std::string es_turns::find_head() const {
    const std::string one = render(with_system({ { "user", "One" } }), true);
    const std::string two = render(with_system({ { "user", "two" } }), true);
    if (!system_.empty()) {
        const std::string alone = render({ { "system", system_ } }, false);
        if (alone.find(trim(system_)) != std::string::npos && starts_with(one, alone)) {
            return alone;
        }
    }
    std::string head = common_prefix(one, two);
    while (!head.empty() && head.back() == ' ') { // a space is part of the next word's token
        head.pop_back();
    }
    return head;
}

int32_t es_turns::find_closing(std::string & out) const {
    const messages    past   = { { "user", "Hello" }, { "assistant", placeholder } };
    const messages    more   = { past[0], past[1], { "user", "Good" } };
    const std::string before = render(past, false), after = render(more, true);
    if (before.find(placeholder) == std::string::npos || after.find(placeholder) == std::string::npos) {
        return es_fail(ES_ERR_UNSUPPORTED, "the chat template cannot be used on a stream: it does not keep the "
                                           "assistant's answers as they were written");
    }
    out = common_prefix(after_placeholder(before), after_placeholder(after));
    return ES_OK;
}

int32_t es_turns::first(const std::string & text, turn & out) const {
    const messages    past = with_system({ { "user", text } });
    const std::string both = render(past, true), alone = render(past, false);
    if (!starts_with(both, head_) || !starts_with(alone, head_)) {
        return es_fail(ES_ERR_UNSUPPORTED, "the chat template cannot be used on a stream: what it writes before the "
                                           "first message depends on the message");
    }
    split(alone.substr(head_.size()), both.substr(head_.size()), out);
    return ES_OK;
}

int32_t es_turns::next(const std::string & text, turn & out) const {
    const messages    past = { { "user", "Hello" }, { "assistant", placeholder }, { "user", text } };
    const std::string both = after_placeholder(render(past, true)), alone = after_placeholder(render(past, false));
    if (text.find(placeholder) != std::string::npos || !starts_with(both, closing_) || !starts_with(alone, closing_)) {
        return es_fail(ES_ERR_UNSUPPORTED, "the chat template cannot be used on a stream: what it writes between two "
                                           "turns depends on the text of the turns");
    }
    split(alone.substr(closing_.size()), both.substr(closing_.size()), out);
    return ES_OK;
}
