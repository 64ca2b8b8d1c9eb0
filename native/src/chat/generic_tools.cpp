#include "generic_tools.h"

namespace {

// Only for its answers: common finds out how calls are written in it.
const char * const answers = R"({%- if tools %}<|im_start|>system
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %})";

std::string description(const std::vector<common_chat_tool> & tools) {
    std::string out = "You can call these functions:\n";
    for (const common_chat_tool & tool : tools) {
        const common_json about = { { "name", tool.name },
                                    { "description", tool.description },
                                    { "parameters", common_json::parse(tool.parameters) } };
        out += about.dump() + "\n";
    }
    return out + "To call one, write its name and arguments as JSON, in this way:\n<tool_call>\n"
                 "{\"name\": NAME, \"arguments\": ARGUMENTS}\n</tool_call>\n"
                 "The result comes back inside <tool_response></tool_response>.";
}

void append(std::string & text, const std::string & more) {
    text += (text.empty() ? "" : "\n\n") + more;
}

} // namespace

std::vector<common_chat_msg> es_generic_messages(const std::vector<common_chat_msg> &  messages,
                                                 const std::vector<common_chat_tool> & tools) {
    std::vector<common_chat_msg> out;
    bool                         after_result = false;
    for (common_chat_msg m : messages) {
        for (const common_chat_tool_call & call : m.tool_calls) {
            m.content += (m.content.empty() ? "" : "\n") + std::string("<tool_call>\n{\"name\": ") +
                         common_json::make(call.name).dump() + ", \"arguments\": " + call.arguments + "}\n</tool_call>";
        }
        m.tool_calls.clear();
        const bool is_result = m.role == "tool";
        if (is_result) {
            m.role    = "user";
            m.content = "<tool_response>\n" + m.content + "\n</tool_response>";
            m.tool_name.clear();
            m.tool_call_id.clear();
        }
        if (is_result && after_result) { // templates want users and assistants to take turns
            out.back().content += "\n" + m.content;
        } else {
            out.push_back(std::move(m));
        }
        after_result = is_result;
    }
    if (!tools.empty()) {
        if (out.empty() || out.front().role != "system") {
            out.insert(out.begin(), common_chat_msg());
            out.front().role = "system";
        }
        append(out.front().content, description(tools));
    }
    return out;
}

common_chat_params es_generic_params(const common_chat_templates_inputs & inputs) {
    common_chat_templates_inputs in = inputs;
    in.messages.resize(1);
    in.messages[0]            = common_chat_msg();
    in.messages[0].role       = "user";
    in.messages[0].content    = "Hello";
    in.add_generation_prompt  = true;
    in.continue_final_message = COMMON_CHAT_CONTINUATION_NONE;
    in.chat_template_kwargs.clear();
    return common_chat_templates_apply(common_chat_templates_init(nullptr, answers).get(), in);
}
