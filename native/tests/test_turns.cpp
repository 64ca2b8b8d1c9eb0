// What a turn adds to a stream, for every template that llama.cpp has by name; and UTF-8 of models. argv[1]: a model,
// for its vocabulary.
#include "edge_stream_chat.h"
#include "utf8.h"

#include <cassert>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

llama_model * model;

struct request {
    es_chat_request * r = nullptr;
    request(const es_chat * chat, const std::string & messages) {
        const std::string json = R"({"messages": [{"role": "system", "content": "SYSTEM"},)" + messages + "]}";
        if (es_chat_request_init(chat, json.c_str(), &r) != ES_OK) {
            r = nullptr;
        }
    }
    ~request() { es_chat_request_free(r); }
};

// The tokens of a list in the JSON of a plan.
std::vector<int32_t> tokens_of(const std::string & plan, const char * name) {
    std::vector<int32_t> out;
    size_t               at = plan.find(std::string("\"") + name + "\":[") + strlen(name) + 4;
    while (plan[at] != ']') {
        out.push_back(atoi(plan.c_str() + at));
        at += strcspn(plan.c_str() + at, ",]");
        at += plan[at] == ',';
    }
    return out;
}

std::string text_of(const std::vector<int32_t> & tokens) {
    std::string out(tokens.size() * 16 + 64, '\0');
    out.resize((size_t) llama_detokenize(llama_model_get_vocab(model), tokens.data(), (int32_t) tokens.size(),
                                         out.data(), (int32_t) out.size(), false, true));
    return out;
}

const std::string user = R"({"role": "user", "content": ")", assistant = R"({"role": "assistant", "content": ")";

void templates_of_llama_cpp() {
    const char *  known[256];
    const int32_t n_known = llama_chat_builtin_templates(known, 256);
    int           n       = 0;
    for (int32_t i = 0; i < n_known; ++i) {
        es_chat * chat = nullptr;
        assert(es_chat_init(model, known[i], &chat) == ES_OK);
        const request first(chat, user + "ONE\"}"),
            next(chat, user + "ONE\"}," + assistant + "TWO\"}," + user + "THREE\"}");
        const char * json = nullptr;
        if (first.r && next.r && es_chat_plan(first.r, nullptr, 0, nullptr, 0, 4096, &json) == ES_OK) {
            const std::string plan   = json;
            const auto        tokens = tokens_of(plan, "tokens");
            assert(es_chat_request_prompt(first.r, &json) == ES_OK);
            const std::string    whole = json;
            std::vector<int32_t> held = tokens, start = tokens_of(plan, "start");
            // pieces: what is pinned, then the message
            const size_t second = plan.find("\"tokens\":", plan.find("\"tokens\":") + 1);
            if (second != std::string::npos) {
                const auto rest = tokens_of(plan.substr(second), "tokens");
                held.insert(held.end(), rest.begin(), rest.end());
            }
            const es_chat_place place = { 2, (int32_t) held.size() };
            held.insert(held.end(), start.begin(), start.end());
            const std::string    said = "TWO";
            std::vector<int32_t> answer(16);
            answer.resize(
                (size_t) llama_tokenize(llama_model_get_vocab(model), said.data(), 3, answer.data(), 16, false, false));
            held.insert(held.end(), answer.begin(), answer.end());
            const es_chat_place places[] = { place, { 3, (int32_t) held.size() } };
            if (es_chat_plan(next.r, places, 2, held.data(), held.size(), 4096, &json) != ES_OK) {
                es_chat_free(chat);
                continue;
            }
            const std::string added = text_of(tokens_of(json, "tokens")) + text_of(tokens_of(json, "start"));
            assert(added.find("THREE") != std::string::npos && added.find("SYSTEM") == std::string::npos);
            assert(added.find("ONE") == std::string::npos);
            n++;
        }
        es_chat_free(chat);
    }
    assert(n > 40);
}

void utf8() {
    assert(es_utf8_valid("a\xc3\xa9\xf0\x9f\x98\x80") == "a\xc3\xa9\xf0\x9f\x98\x80");
    assert(es_utf8_valid("\xff\xe2\x82z") == "\xef\xbf\xbd\xef\xbf\xbdz");
    assert(es_utf8_valid("\xed\xa0\x80") == "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"); // a surrogate
    assert(es_utf8_complete("ab\xf0\x9f\x98") == 2 && es_utf8_complete("\xc3\xa9") == 2 && es_utf8_complete("") == 0);
}

} // namespace

int main(int argc, char ** argv) {
    assert(argc == 2);
    llama_model_params params = llama_model_default_params();
    params.vocab_only         = true;
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    model = llama_model_load_from_file(argv[1], params);
    assert(model);
    templates_of_llama_cpp();
    utf8();
    llama_model_free(model);
    printf("ok\n");
    return 0;
}
