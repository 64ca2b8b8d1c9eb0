// The conversations of edge_stream_chat.h over their class.
#include "conversation.h"

#include "error.h"

#include <algorithm>

namespace {

template <typename F>
int32_t with_json(es_conversation * conversation, const char ** out, F && f) {
    ES_REQUIRE(conversation);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        const int32_t rc = f();
        *out             = rc == ES_OK ? conversation->result.c_str() : nullptr;
        return rc;
    });
}

} // namespace

int32_t es_conversation_init(const es_chat * chat, es_stream * stream, const char * options, es_conversation ** out) {
    ES_REQUIRE(chat);
    ES_REQUIRE(stream);
    ES_REQUIRE(out);
    *out = nullptr;
    return es_guard([&]() -> int32_t {
        auto          conversation = std::make_unique<es_conversation>(*chat, stream);
        const int32_t rc           = conversation->init(options);
        *out                       = rc == ES_OK ? conversation.release() : nullptr;
        return rc;
    });
}

void es_conversation_free(es_conversation * conversation) {
    delete conversation;
}

int32_t es_conversation_n_keep(const es_chat * chat, const char * options, uint32_t n_ctx, int32_t n_keep,
                               uint32_t * out) {
    ES_REQUIRE(chat);
    ES_REQUIRE(out);
    return es_guard([&] { return es_conversation::find_n_keep(*chat, options, n_ctx, n_keep, *out); });
}

int32_t es_conversation_say(es_conversation * conversation, const char * messages, const char * answer,
                            es_chat_progress on_progress, void * user) {
    ES_REQUIRE(conversation);
    ES_REQUIRE(messages);
    return es_guard([&] { return conversation->say(messages, answer, { on_progress, user }); });
}

int32_t es_conversation_regenerate(es_conversation * conversation, const char * answer, es_chat_progress on_progress,
                                   void * user) {
    ES_REQUIRE(conversation);
    return es_guard([&] { return conversation->regenerate(answer, { on_progress, user }); });
}

int32_t es_conversation_continue(es_conversation * conversation, const char * answer, es_chat_progress on_progress,
                                 void * user) {
    ES_REQUIRE(conversation);
    return es_guard([&] { return conversation->go_on(answer, { on_progress, user }); });
}

int32_t es_conversation_info(es_conversation * conversation, const char ** json) {
    return with_json(conversation, json, [&]() -> int32_t {
        conversation->result = conversation->info().dump_safe();
        return ES_OK;
    });
}

int32_t es_conversation_push(es_conversation * conversation, const char * bytes, size_t n_bytes, int32_t how,
                             const char ** json) {
    ES_REQUIRE(bytes);
    return with_json(conversation, json, [&]() -> int32_t {
        if (!conversation->is_open()) {
            return es_fail(ES_ERR_INVALID, "no answer is open");
        }
        common_json delta = es_delta_json(conversation->push(std::string(bytes, n_bytes), how));
        if (conversation->answer().is_ended()) {
            delta["is_ended"] = true;
        }
        conversation->result = delta.dump_safe();
        return ES_OK;
    });
}

int32_t es_conversation_end(es_conversation * conversation, int32_t how) {
    ES_REQUIRE(conversation);
    return es_guard([&] { return conversation->end(how); });
}

int32_t es_conversation_set_log(es_conversation * conversation, es_log * log, uint32_t n_tokens) {
    ES_REQUIRE(conversation);
    return es_guard([&] { return conversation->set_log(log, n_tokens); });
}

int32_t es_conversation_clear(es_conversation * conversation) {
    ES_REQUIRE(conversation);
    return es_guard([&] { return conversation->clear(); });
}

int32_t es_conversation_messages(es_conversation * conversation, const char ** json) {
    return with_json(conversation, json, [&]() -> int32_t {
        conversation->result = conversation->messages().dump_safe();
        return ES_OK;
    });
}

int32_t es_conversation_to_json(es_conversation * conversation, const char ** json) {
    return with_json(conversation, json, [&] { return conversation->save(conversation->result); });
}

int32_t es_conversation_from_json(es_conversation * conversation, const char * json, const char * name) {
    ES_REQUIRE(conversation);
    ES_REQUIRE(json);
    return es_guard([&] { return conversation->load(json, name ? name : "the session"); });
}
