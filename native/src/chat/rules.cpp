#include "rules.h"

#include "edge_stream.h"

#include "common.h"
#include "json.h"
#include "reasoning-budget.h"
#include "support.h"

#include <algorithm>
#include <cctype>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace {

constexpr uint64_t n_repeated = 1 << 20; // elements that repetitions may come to

// llama.cpp's parser writes x{2,5} out. It counts rules, not the characters of one, and takes {5,2} for 2^64 times.
void check_repeats(const std::string & text) {
    uint64_t   total = 0, item = 0; // characters of the last item
    const auto until = [&](size_t i, char end) {
        while (i < text.size() && text[i] != end) {
            i += text[i] == '\\' ? 2 : 1;
        }
        return std::min(i, text.size());
    };
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '"' || c == '[') {
            const size_t end = until(i + 1, c == '"' ? '"' : ']');
            item             = end - i;
            i                = end;
        } else if (c == '#') {
            i = std::min(text.find('\n', i), text.size());
        } else if (c == '{') {
            char *         end   = nullptr;
            const uint64_t least = strtoull(text.c_str() + i + 1, &end, 10);
            uint64_t       most  = least;
            end += strspn(end, " \t\r\n");
            if (*end == ',') {
                ++end;
                end += strspn(end, " \t\r\n");
                most = isdigit((unsigned char) *end) ? strtoull(end, nullptr, 10) : least + 1;
            }
            if (most < least) {
                throw std::invalid_argument("the grammar repeats something at least " + std::to_string(least) +
                                            " times and at most " + std::to_string(most));
            }
            if (most > n_repeated || (total += most * std::max<uint64_t>(item, 1)) > n_repeated) {
                throw std::invalid_argument("the grammar repeats too much");
            }
        } else if (!isspace((unsigned char) c)) {
            item = 1;
        }
    }
}

llama_sampler * whole_grammar(const llama_vocab * vocab, const std::string & grammar, const char * root) {
    check_repeats(grammar);
    return llama_sampler_init_grammar(vocab, grammar.c_str(), root);
}

[[noreturn]] void no_grammar() {
    const std::string why = es_log_last_error();
    throw std::invalid_argument("the grammar cannot be parsed" + (why.empty() ? why : ": " + why));
}

// As llama_sampler_init_grammar_lazy_patterns wants them.
std::string pattern_of(const common_json & trigger) {
    const std::string value = trigger.at("value");
    switch ((common_grammar_trigger_type) trigger.at("type").get<int>()) {
    case COMMON_GRAMMAR_TRIGGER_TYPE_WORD: return regex_escape(value);
    case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL:
        return "^" + value.substr(value.substr(0, 1) == "^" ? 1 : 0) +
               (value.empty() || value.back() != '$' ? "$" : "");
    default: return value;
    }
}

// The tokens of a text that stands inside others: without the space that some tokenizers begin with.
llama_tokens tokens_within(const llama_vocab * vocab, const std::string & text) {
    llama_tokens tokens = common_tokenize(vocab, text, false, true);
    if (!tokens.empty() && text.substr(0, 1) != " " && es_piece(vocab, tokens[0], true) == " ") {
        tokens.erase(tokens.begin());
    }
    return tokens;
}

llama_sampler * lazy_grammar(const llama_vocab * vocab, const std::string & grammar, const common_json & triggers) {
    std::vector<std::string> patterns;
    std::vector<llama_token> tokens;
    for (const common_json & trigger : triggers) {
        const std::string value = trigger.at("value");
        const auto        made  = tokens_within(vocab, value);
        if (trigger.at("type").get<int>() == COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN) {
            tokens.push_back(trigger.at("token").get<int>());
        } else if (trigger.at("type").get<int>() == COMMON_GRAMMAR_TRIGGER_TYPE_WORD && made.size() == 1) {
            tokens.push_back(made[0]); // one token, which may be a control token without text
        } else {
            patterns.push_back(pattern_of(trigger));
        }
    }
    std::vector<const char *> texts;
    for (const std::string & pattern : patterns) {
        texts.push_back(pattern.c_str());
    }
    check_repeats(grammar);
    return llama_sampler_init_grammar_lazy_patterns(vocab, grammar.c_str(), "root", texts.data(), texts.size(),
                                                    tokens.data(), tokens.size());
}

} // namespace

es_rules::es_rules(const llama_vocab * vocab, const char * grammar, const char * root, const char * chat) {
    if (grammar && chat) {
        throw std::invalid_argument("give a grammar or a chat's rules, not both");
    }
    if (grammar) {
        grammar_.reset(whole_grammar(vocab, grammar, root ? root : "root"));
        if (!grammar_) {
            no_grammar();
        }
    }
    if (!chat) {
        return;
    }
    const common_json rules  = common_json::parse(chat);
    const std::string text   = rules.at("grammar");
    const auto        before = tokens_within(vocab, rules.at("before").get<std::string>());
    is_lazy_                 = rules.at("is_lazy").get<bool>();
    if (!text.empty()) {
        grammar_.reset(is_lazy_ ? lazy_grammar(vocab, text, rules.at("triggers")) : whole_grammar(vocab, text, "root"));
        if (!grammar_) {
            no_grammar();
        }
        // what the template wrote of the answer is part of its format
        for (size_t i = 0; !is_lazy_ && i < before.size(); ++i) {
            llama_sampler_accept(grammar_.get(), before[i]);
        }
    }
    const int         budget = rules.at("budget").get<int>();
    const std::string start  = rules.at("thinking_start");
    const common_json ends   = rules.at("thinking_ends");
    if (start.empty() || ends.empty() || (budget < 0 && !(is_lazy_ && grammar_))) {
        return;
    }
    std::vector<llama_tokens> end_tokens;
    for (const common_json & end : ends) {
        end_tokens.push_back(tokens_within(vocab, end.get<std::string>()));
    }
    const std::string forced = rules.at("budget_message").get<std::string>() + ends.at((size_t) 0).get<std::string>();
    budget_.reset(common_reasoning_budget_init(vocab, { tokens_within(vocab, start) }, end_tokens,
                                               tokens_within(vocab, forced), budget < 0 ? INT_MAX : budget));
    for (const llama_token token : before) {
        llama_sampler_accept(budget_.get(), token);
    }
}

bool es_rules::applies() const {
    if (!grammar_ || !budget_ || !is_lazy_) {
        return grammar_ != nullptr;
    }
    const auto state = common_reasoning_budget_get_state(budget_.get()); // no calls while thinking
    return state == REASONING_BUDGET_IDLE || state == REASONING_BUDGET_DONE;
}

bool es_rules::allows(llama_token token) const {
    llama_token_data       one = { token, 0.0f, 0.0f };
    llama_token_data_array arr = { &one, 1, -1, false };
    llama_sampler_apply(grammar_.get(), &arr);
    return std::isfinite(one.logit);
}

void es_rules::apply_budget(llama_token_data_array & candidates) const {
    if (budget_) {
        llama_sampler_apply(budget_.get(), &candidates);
    }
}

void es_rules::accept(llama_token token) {
    const bool applied = applies();
    if (budget_) {
        llama_sampler_accept(budget_.get(), token);
        // the end of thinking may be what the grammar waits for
        const bool           is_done = common_reasoning_budget_get_state(budget_.get()) == REASONING_BUDGET_DONE;
        const llama_tokens * end     = is_done ? common_reasoning_budget_get_end_match(budget_.get()) : nullptr;
        for (size_t i = 0; grammar_ && !applied && end && i < end->size(); ++i) {
            llama_sampler_accept(grammar_.get(), (*end)[i]);
        }
    }
    if (applied) {
        llama_sampler_accept(grammar_.get(), token);
    }
}
