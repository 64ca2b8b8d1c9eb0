#include "request.h"

#include "error.h"
#include "es-template-budget.h"
#include "generic_tools.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace {

constexpr size_t n_params_known = 64;
constexpr size_t n_turns_near   = 2; // whole turns before the new messages that are rendered with them

bool is_given(const common_json & j, const char * name) {
    return j.contains(name) && !j.at(name).is_null();
}

size_t common_prefix(const std::string & a, const std::string & b) {
    const size_t n = std::min(a.size(), b.size());
    return (size_t) (std::mismatch(a.begin(), a.begin() + (ptrdiff_t) n, b.begin()).first - a.begin());
}

std::invalid_argument invalid(const std::string & text) {
    return std::invalid_argument(text);
}

// A message with what was recalled for it, at the start of its own words: most templates have no place for another
// message there. A small model answered 21 of 30 questions with this wording, of others that were tried 12 to 22.
void make_remark(common_json & m) {
    const common_json found = m.at("recalled");
    m.erase("recalled");
    const std::string remark = std::string(found.value("role", "user") == "user" ? "The user" : "You") + " said: \"" +
                               found.value("text", "") + "\" Use this to answer.\n\n";
    common_json & content = m["content"];
    if (content.is_array()) {
        common_json parts = common_json::array();
        parts.push_back({ { "type", "text" }, { "text", remark } });
        for (const common_json & part : content) {
            parts.push_back(part);
        }
        content = parts;
    } else {
        content = remark + content.get<std::string>();
    }
}

// common's parser drops what it does not know, and answers oddly to what it does not expect.
common_json checked_messages(const common_json & given) {
    if (!given.is_array() || given.empty()) {
        throw invalid("messages must be a list of at least one message");
    }
    common_json out = common_json::array();
    for (const common_json & message : given) {
        if (!message.is_object() || !is_given(message, "role") || !message.at("role").is_string()) {
            throw invalid("a message must have a role");
        }
        common_json m = common_json::object();
        for (const auto & [name, value] : message.items()) {
            if (!value.is_null()) {
                m[name] = value;
            }
        }
        if (!m.contains("content")) {
            m["content"] = "";
        }
        if (m.contains("recalled")) {
            make_remark(m);
        }
        if (m.contains("tool_calls")) {
            if (!m.at("tool_calls").is_array()) {
                throw invalid("tool_calls must be a list");
            }
            if (m.at("tool_calls").empty()) {
                m.erase("tool_calls");
            }
        }
        for (common_json & call : m.contains("tool_calls") ? m.at("tool_calls") : common_json::array()) {
            if (!is_given(call, "type")) {
                call["type"] = "function";
            }
            if (is_given(call, "function") && !is_given(call.at("function"), "arguments")) {
                call.at("function")["arguments"] = "{}";
            }
        }
        out.push_back(m);
    }
    return out;
}

void read_tools(const common_json & body, common_chat_templates_inputs & inputs) {
    if (!is_given(body, "tools")) {
        return;
    }
    common_json tools = body.at("tools");
    for (common_json & tool : tools) {
        if (is_given(tool, "function") && is_given(tool.at("function"), "description")) {
            continue;
        }
        if (is_given(tool, "function")) {
            tool.at("function").erase("description");
        }
    }
    inputs.tools = common_chat_tools_parse_oaicompat(tools);
    if (!is_given(body, "tool_choice")) {
        return;
    }
    const common_json & choice = body.at("tool_choice");
    if (choice.is_string()) {
        inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(choice);
        return;
    }
    const std::string name  = choice.at("function").at("name");
    const auto        named = [&](const common_chat_tool & tool) { return tool.name == name; };
    if (std::none_of(inputs.tools.begin(), inputs.tools.end(), named)) {
        throw invalid("tool_choice names no tool that was sent: " + name.substr(0, 64));
    }
    inputs.tools.erase(std::remove_if(inputs.tools.begin(), inputs.tools.end(),
                                      [&](const common_chat_tool & tool) { return !named(tool); }),
                       inputs.tools.end());
    inputs.tool_choice = COMMON_CHAT_TOOL_CHOICE_REQUIRED;
}

void read_thinking(const common_json & body, common_chat_templates_inputs & inputs) {
    inputs.reasoning_format = common_reasoning_format_from_name(
        is_given(body, "reasoning_format") ? body.at("reasoning_format").get<std::string>() : "auto");
    if (is_given(body, "chat_template_kwargs")) {
        for (const auto & [name, value] : body.at("chat_template_kwargs").items()) {
            inputs.chat_template_kwargs[name] = value.dump();
        }
    }
    auto & kwargs = inputs.chat_template_kwargs;
    if (is_given(body, "enable_thinking")) {
        kwargs["enable_thinking"] = body.at("enable_thinking").dump();
    }
    const auto flag = kwargs.find("enable_thinking");
    if (flag != kwargs.end()) {
        if (flag->second != "true" && flag->second != "false") {
            throw invalid("enable_thinking must be true or false");
        }
        inputs.enable_thinking = flag->second == "true";
    }
    if (is_given(body, "reasoning_effort")) {
        if (body.at("reasoning_effort") == "none") {
            inputs.enable_thinking = false;
            kwargs.erase("reasoning_effort");
        } else {
            kwargs["reasoning_effort"] = body.at("reasoning_effort").dump();
        }
    }
}

} // namespace

int32_t es_chat_request::init(const char * json) {
    if (es_json_deep(json)) {
        return es_fail(ES_ERR_INVALID, "the request's JSON is nested too deeply");
    }
    common_json body;
    try {
        body = common_json::parse(json);
    } catch (const std::exception & e) {
        return es_fail(ES_ERR_INVALID, "the request is not JSON: %s", e.what());
    }
    return es_with_template(strlen(json) + chat.source.size(), [&] {
        try {
            read(body);
        } catch (const common_json_error & e) {
            throw invalid(e.what());
        } catch (const std::runtime_error & e) { // common's, about messages and tools
            throw invalid(e.what());
        }
        params = find_params();
    });
}

void es_chat_request::read(const common_json & body) {
    if (!is_given(body, "messages")) {
        throw invalid("messages is missing");
    }
    inputs.messages = common_chat_msgs_parse_oaicompat(checked_messages(body.at("messages")));
    for (common_chat_msg & m : inputs.messages) {
        for (const auto & part : m.content_parts) {
            if (part.type != "text") {
                throw invalid("content may only have parts of type text, not " + part.type.substr(0, 64));
            }
        }
        // many templates leave parts out, or print them as lists, in some of the roles; a text they all render
        const bool is_begun = &m == &inputs.messages.back() && m.role == "assistant"; // joined as llama-server does
        m.content           = is_begun ? m.render_content() : m.render_content("\n");
        m.content_parts.clear();
    }
    while (n_system < n_messages() &&
           (inputs.messages[n_system].role == "system" || inputs.messages[n_system].role == "developer")) {
        ++n_system;
    }
    if (n_system == n_messages()) {
        throw invalid("there is nothing to answer: messages has system messages only");
    }
    read_tools(body, inputs);
    read_thinking(body, inputs);
    const auto caps            = common_chat_templates_get_caps(chat.templates.get());
    inputs.use_jinja           = !chat.is_builtin;
    inputs.add_bos             = chat.add_bos;
    inputs.add_eos             = llama_vocab_get_add_eos(chat.vocab);
    inputs.parallel_tool_calls = is_given(body, "parallel_tool_calls") ? body.at("parallel_tool_calls").get<bool>()
                                                                       : caps.at("supports_parallel_tool_calls");
    one_call                   = is_given(body, "parallel_tool_calls") && !body.at("parallel_tool_calls").get<bool>();
    if (is_given(body, "json_schema")) {
        es_schema_grammar(body.at("json_schema")); // refuses what cannot be expressed
        inputs.json_schema = body.at("json_schema").dump();
    }
    if (is_given(body, "grammar")) {
        own_grammar = body.at("grammar").get<std::string>();
        if (has_calls() && inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED) {
            throw invalid("a tool call cannot be required together with a grammar");
        }
    }
    for (const common_chat_tool & tool : inputs.tools) {
        es_schema_grammar(common_json::parse(tool.parameters));
    }
    inputs.add_generation_prompt =
        !is_given(body, "add_generation_prompt") || body.at("add_generation_prompt").get<bool>();
    if (is_given(body, "continue_final_message")) {
        inputs.continue_final_message = common_chat_continuation_parse(body.at("continue_final_message"));
    } else if (is_answer(n_messages() - 1) && inputs.messages.back().tool_calls.empty()) {
        inputs.continue_final_message = COMMON_CHAT_CONTINUATION_AUTO;
    }
    if (is_continued() && (!is_answer(n_messages() - 1) || !inputs.messages.back().tool_calls.empty())) {
        throw invalid("only an assistant's message without tool calls can be continued, and only the last one");
    }
    inputs.add_generation_prompt = inputs.add_generation_prompt && !is_continued();
    for (const char * name : { "reasoning_budget_tokens", "thinking_budget_tokens" }) {
        thinking_budget = is_given(body, name) ? body.at(name).get<int>() : thinking_budget;
    }
    if (is_given(body, "reasoning_budget_message")) {
        thinking_message = body.at("reasoning_budget_message").get<std::string>();
    }
}

// The analysis behind them takes tens of renderings, and gives the same for every turn of a conversation.
common_chat_params es_chat_request::find_params() {
    const size_t first = first_near(n_messages()), n = n_messages();
    if (!is_generic() && (!chat.is_plain || is_continued())) {
        return render(first, n, true, true);
    }
    std::string key = text(first, n, true).substr(common_prefix(text(first, n, true), text(first, n, false)));
    for (const common_chat_tool & tool : inputs.tools) {
        key += '\0' + tool.name + '\0' + tool.description + '\0' + tool.parameters;
    }
    for (const auto & [name, value] : inputs.chat_template_kwargs) {
        key += '\0' + name + '\0' + value;
    }
    key += '\0' + inputs.json_schema + '\0' +
           std::to_string(inputs.tool_choice * 100 + inputs.reasoning_format * 10 + inputs.parallel_tool_calls * 2 +
                          inputs.enable_thinking);
    {
        const std::lock_guard<std::mutex> lock(chat.mutex);
        const auto                        known = chat.params.find(key);
        if (known != chat.params.end()) {
            return known->second;
        }
    }
    const common_chat_params          made = is_generic() ? es_generic_params(inputs) : render(first, n, true, true);
    const std::lock_guard<std::mutex> lock(chat.mutex);
    if (chat.params.size() >= n_params_known) {
        chat.params.clear();
    }
    return chat.params[key] = made;
}

size_t es_chat_request::n_input() const {
    size_t n = chat.source.size();
    for (const common_chat_msg & m : inputs.messages) {
        n += m.content.size() + m.reasoning_content.size();
        for (const auto & call : m.tool_calls) {
            n += call.arguments.size();
        }
    }
    for (const common_chat_tool & tool : inputs.tools) {
        n += tool.parameters.size() + tool.description.size();
    }
    return n;
}

common_chat_params es_chat_request::render(size_t first, size_t last, bool open, bool with_format) const {
    common_chat_templates_inputs in = inputs;
    const auto                   at = [&](size_t i) { return inputs.messages.begin() + (ptrdiff_t) i; };
    in.messages.assign(at(0), at(n_system));
    in.messages.insert(in.messages.end(), at(first), at(last));
    if (is_generic()) {
        in.messages = es_generic_messages(in.messages, in.tools);
        in.tools.clear();
        in.json_schema.clear();
    }
    in.add_generation_prompt = open && inputs.add_generation_prompt;
    if (!open || last < n_messages()) {
        in.continue_final_message = COMMON_CHAT_CONTINUATION_NONE;
    }
    // the analysis of a template for its tools costs many renderings; without a handler's changes it is not needed here
    in.force_pure_content = !with_format && chat.is_plain && in.continue_final_message == COMMON_CHAT_CONTINUATION_NONE;
    return common_chat_templates_apply(chat.templates.get(), in);
}

const std::string & es_chat_request::text(size_t first, size_t last, bool open) {
    const auto key = std::make_pair(std::make_pair(first, last), open);
    auto       it  = texts_.find(key);
    if (it == texts_.end()) {
        std::string made = render(first, last, open, false).prompt;
        // some templates end the text where no answer is asked for
        const std::string & eos = chat.eos_text;
        if (!open && !eos.empty() && made.size() > eos.size() &&
            made.compare(made.size() - eos.size(), eos.size(), eos) == 0 &&
            text(first, last, true).compare(0, made.size(), made) != 0) {
            made.resize(made.size() - eos.size());
        }
        it = texts_.emplace(key, std::move(made)).first;
    }
    return it->second;
}

size_t es_chat_request::first_near(size_t n_known) const {
    size_t n_turns = 0;
    for (size_t i = std::min(n_known, n_messages()); i > n_system; --i) {
        if (inputs.messages[i - 1].role == "user" && (i == n_system + 1 || inputs.messages[i - 2].role != "user") &&
            ++n_turns > n_turns_near) {
            return i - 1;
        }
    }
    return n_system;
}

std::string es_chat_request::head() {
    const auto with_question = [&](const char * question) {
        es_chat_request other(chat);
        other.inputs                        = inputs;
        other.inputs.continue_final_message = COMMON_CHAT_CONTINUATION_NONE;
        other.inputs.messages.resize(n_system + 1);
        other.inputs.messages.back()         = {};
        other.inputs.messages.back().role    = "user";
        other.inputs.messages.back().content = question;
        other.n_system                       = n_system;
        return other.text(n_system, n_system + 1, false);
    };
    const std::string one = with_question("One"), two = with_question("two");
    size_t            n = common_prefix(one, two);
    while (n > 0 && ((unsigned char) one[n] & 0xc0) == 0x80) { // not inside a character
        --n;
    }
    while (n > 0 && one[n - 1] == ' ') { // a space belongs to the token of the word after it
        --n;
    }
    return one.substr(0, n);
}

bool es_chat_request::is_generic() const {
    return !inputs.tools.empty() && !chat.supports_tools;
}

bool es_chat_request::has_calls() const {
    return !inputs.tools.empty() && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE;
}

bool es_chat_request::is_parsed() const {
    const bool thinks = inputs.reasoning_format != COMMON_REASONING_FORMAT_NONE && params.supports_thinking;
    return has_calls() || thinks || !(chat.is_plain || chat.is_builtin);
}

std::string es_chat_request::grammar() const {
    if (!own_grammar.empty()) {
        return own_grammar;
    }
    if (!inputs.json_schema.empty() && !is_parsed()) {
        return es_schema_grammar(common_json::parse(inputs.json_schema));
    }
    std::string text = params.grammar;
    // JSON has no control characters in strings
    string_replace_all(text, R"(json-string ::= "\"" ( [^"\\])", R"(json-string ::= "\"" ( [^"\\\x7F\x00-\x1F])");
    // common lets calls that have markers of their own be repeated in any case
    const size_t all  = one_call ? text.find("\ntool-calls ::= (") : std::string::npos;
    const size_t last = all == std::string::npos ? all : text.find('\n', all + 1) - 1;
    if (all != std::string::npos && text.compare(last - 1, 2, ")+") == 0) {
        text.erase(last, 1);
    }
    // a call, not a text that may go on for ever before it
    const size_t root =
        inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED ? text.find("\nroot ::= ") : std::string::npos;
    const size_t end   = root == std::string::npos ? root : text.find('\n', root + 1);
    const size_t calls = root == std::string::npos ? root : text.find("? tool-calls", root);
    const size_t until = calls == std::string::npos || calls > end ? std::string::npos : text.rfind("until-", calls);
    if (until != std::string::npos && until > root &&
        text.find_first_not_of("0123456789", until + strlen("until-")) == calls) {
        text.erase(until, calls + strlen("? ") - until);
    }
    return text;
}

common_json es_chat_request::info() const {
    common_json       sampling;
    const bool        has_budget = thinking_budget >= 0 && !params.thinking_end_tags.empty();
    const std::string rules      = grammar();
    const bool        is_format  = own_grammar.empty() && is_parsed(); // with a place for the start of the answer
    if (!rules.empty() || has_budget) {
        common_json triggers = common_json::array();
        for (const common_grammar_trigger & t : params.grammar_triggers) {
            triggers.push_back({ { "type", (int) t.type }, { "value", t.value }, { "token", t.token } });
        }
        sampling = common_json{
            { "grammar", rules },
            { "is_lazy", is_format && params.grammar_lazy },
            { "triggers", triggers },
            { "before", is_format ? params.generation_prompt : "" },
            { "budget", has_budget ? thinking_budget : -1 },
            { "budget_message", thinking_message },
            { "thinking_start", params.thinking_start_tag },
            { "thinking_ends", params.thinking_end_tags },
        };
    }
    return common_json{
        { "sampling", sampling.is_null() ? common_json() : common_json(sampling.dump()) },
        { "stop", params.additional_stops },
        { "is_parsed", is_parsed() },
        { "thinks", params.supports_thinking },
    };
}
