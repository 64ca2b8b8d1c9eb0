// edge_stream_chat.h over the classes of this folder.
#include "edge_stream_chat.h"

#include "error.h"
#include "parser.h"

namespace {

template <typename F>
int32_t with_request(es_chat_request * request, const char ** out, F && f) {
    ES_REQUIRE(request);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        const int32_t rc = es_with_template(request->n_input(), [&] { request->result = f(); });
        if (rc == ES_OK) {
            *out = request->result.c_str();
        }
        return rc;
    });
}

} // namespace

int32_t es_chat_init(const llama_model * model, const char * chat_template, es_chat ** out) {
    ES_REQUIRE(model);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        auto          chat = std::make_unique<es_chat>();
        const int32_t rc   = chat->init(model, chat_template);
        if (rc == ES_OK) {
            *out = chat.release();
        }
        return rc;
    });
}

void es_chat_free(es_chat * chat) {
    delete chat;
}

const char * es_chat_info(const es_chat * chat) {
    return chat ? chat->info.c_str() : "";
}

int32_t es_chat_request_init(const es_chat * chat, const char * json, es_chat_request ** out) {
    ES_REQUIRE(chat);
    ES_REQUIRE(json);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        auto          request = std::make_unique<es_chat_request>(*chat);
        const int32_t rc      = request->init(json);
        if (rc == ES_OK) {
            *out = request.release();
        }
        return rc;
    });
}

void es_chat_request_free(es_chat_request * request) {
    delete request;
}

int32_t es_chat_request_info(es_chat_request * request, const char ** json) {
    return with_request(request, json, [&] { return request->info().dump_safe(); });
}

int32_t es_chat_request_prompt(es_chat_request * request, const char ** text) {
    return with_request(request, text, [&] { return request->text(request->n_system, request->n_messages(), true); });
}

int32_t es_chat_request_head(es_chat_request * request, const char ** json) {
    return with_request(request, json, [&] {
        es_tokens tokens = request->chat.tokenize(request->head());
        if (request->chat.add_bos) {
            tokens.insert(tokens.begin(), llama_vocab_bos(request->chat.vocab));
        }
        return common_json(tokens).dump();
    });
}

int32_t es_chat_plan(es_chat_request * request, const es_chat_place * places, size_t n_places, const int32_t * tokens,
                     size_t n_tokens, size_t n_ctx, const char ** json) {
    if (n_places == 0) {
        return with_request(request, json, [&] { return es_plan_anew(*request, n_ctx).dump(); });
    }
    ES_REQUIRE(places);
    ES_REQUIRE(request);
    std::vector<std::pair<size_t, size_t>> at;
    for (size_t i = 0; i < n_places; ++i) {
        const es_chat_place & p = places[i];
        if (p.n_messages < 1 || (size_t) p.n_messages > request->n_messages() || p.n_tokens < 0 ||
            (size_t) p.n_tokens > n_tokens || (n_tokens > 0 && !tokens)) {
            return es_fail(ES_ERR_INVALID, "a place is not within the request's messages and the tokens given");
        }
        at.emplace_back(p.n_messages, p.n_tokens);
    }
    return with_request(request, json, [&] { return es_plan_on(*request, at, tokens, at.back().second).dump(); });
}

int32_t es_chat_parser_init(es_chat_request * request, const char * before, es_chat_parser ** out) {
    ES_REQUIRE(request);
    ES_REQUIRE(before);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        *out = new es_chat_parser(*request, before);
        return ES_OK;
    });
}

void es_chat_parser_free(es_chat_parser * parser) {
    delete parser;
}

int32_t es_chat_parser_push(es_chat_parser * parser, const char * bytes, size_t n_bytes, bool is_last,
                            const char ** json) {
    ES_REQUIRE(parser);
    ES_REQUIRE(bytes);
    ES_REQUIRE(json);
    return es_guard([&]() -> int32_t {
        parser->result = es_delta_json(parser->push(std::string(bytes, n_bytes), is_last)).dump_safe();
        *json          = parser->result.c_str();
        return ES_OK;
    });
}

int32_t es_chat_parser_message(es_chat_parser * parser, const char ** json) {
    ES_REQUIRE(parser);
    ES_REQUIRE(json);
    return es_guard([&]() -> int32_t {
        parser->result = es_message_json(parser->message()).dump_safe();
        *json          = parser->result.c_str();
        return ES_OK;
    });
}

int32_t es_schema_to_grammar(const char * schema, const char ** grammar) {
    ES_REQUIRE(schema);
    ES_REQUIRE(grammar);
    thread_local std::string result;
    *grammar = nullptr;
    return es_guard([&]() -> int32_t {
        try {
            result   = es_schema_grammar(common_json::parse(schema));
            *grammar = result.c_str();
            return ES_OK;
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::exception & e) {
            return es_fail(ES_ERR_INVALID, "%s", e.what());
        }
    });
}
