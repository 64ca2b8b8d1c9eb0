/* The headers are plain C, and the entry points refuse null instead of crashing. */
#include "edge_stream.h"
#include "edge_stream_chat.h"

#include <stdio.h>
#include <string.h>

#define EXPECT(x)                                                                                                      \
    if (!(x)) {                                                                                                        \
        fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x);                                                        \
        return 1;                                                                                                      \
    }

int main(void) {
    es_stream_params  params  = es_stream_default_params();
    es_sampler_params sampler = es_sampler_default_params();
    es_stream *       stream  = NULL;
    es_sampler *      s       = NULL;
    es_decoder        decoder;
    es_stream_stats   stats;
    es_session_info   info;
    llama_token       token;
    es_loop_guard *   guard = NULL;
    es_loop           loop  = { 0, 0 };
    size_t            n;

    EXPECT(params.n_keep == 4);
    EXPECT(sampler.top_k == 40);
    EXPECT(strlen(es_version()) > 0);
    EXPECT(strcmp(es_status_name(ES_ERR_FORMAT), "damaged file") == 0);

    EXPECT(es_stream_init(NULL, params, &stream) == ES_ERR_INVALID && stream == NULL);
    EXPECT(strlen(es_last_error()) > 0);
    memset(&decoder, 0, sizeof(decoder));
    EXPECT(es_stream_init_decoder(NULL, decoder, params, &stream) == ES_ERR_INVALID && stream == NULL);
    EXPECT(es_stream_feed(NULL, &token, 1, NULL, NULL) == ES_ERR_INVALID);
    EXPECT(es_stream_get_stats(NULL, &stats) == ES_ERR_INVALID);
    EXPECT(es_stream_logits(NULL) == NULL);
    EXPECT(es_stream_tokens(NULL, &token, 1) == 0);
    EXPECT(es_stream_mark(NULL) == ES_ERR_INVALID);
    EXPECT(es_stream_rewind(NULL, 1) == ES_ERR_INVALID);
    EXPECT(es_stream_rebase(NULL) == ES_ERR_INVALID);
    EXPECT(es_stream_set_n_past(NULL, 1) == ES_ERR_INVALID);
    EXPECT(es_stream_reset(NULL) == ES_ERR_INVALID);
    EXPECT(es_sampler_init(NULL, sampler, &s) == ES_ERR_INVALID && s == NULL);
    EXPECT(es_sampler_sample(NULL, NULL, &token, NULL) == ES_ERR_INVALID);
    EXPECT(es_sampler_accept(NULL, 0) == ES_ERR_INVALID);
    EXPECT(!es_sampler_restore(NULL, NULL));
    EXPECT(es_session_save(NULL, NULL, 0, 0, "x", NULL, 0) == ES_ERR_INVALID);
    EXPECT(es_session_load(NULL, 0, 0, "x") == ES_ERR_INVALID);
    EXPECT(es_session_peek("/does/not/exist", &info, NULL, 0) == ES_ERR_IO);
    EXPECT(!es_model_can_stream(NULL, NULL, 0));
    EXPECT(!es_model_device(NULL, 0));
    es_chat *         chat         = NULL;
    es_conversation * conversation = NULL;
    const char *      json         = NULL;
    uint32_t          n            = 0;
    EXPECT(es_chat_init(NULL, NULL, &chat) == ES_ERR_INVALID && !chat);
    EXPECT(es_conversation_init(NULL, NULL, NULL, &conversation) == ES_ERR_INVALID && !conversation);
    EXPECT(es_conversation_n_keep(NULL, NULL, 1, 1, &n) == ES_ERR_INVALID);
    EXPECT(es_conversation_say(NULL, "[]", NULL, NULL, NULL) == ES_ERR_INVALID);
    EXPECT(es_conversation_regenerate(NULL, NULL, NULL, NULL) == ES_ERR_INVALID);
    EXPECT(es_conversation_continue(NULL, NULL, NULL, NULL) == ES_ERR_INVALID);
    EXPECT(es_conversation_info(NULL, &json) == ES_ERR_INVALID);
    EXPECT(es_conversation_push(NULL, "", 0, ES_ANSWER_OPEN, &json) == ES_ERR_INVALID);
    EXPECT(es_conversation_end(NULL, ES_ANSWER_CUT) == ES_ERR_INVALID);
    EXPECT(es_conversation_clear(NULL) == ES_ERR_INVALID);
    EXPECT(es_conversation_messages(NULL, &json) == ES_ERR_INVALID);
    EXPECT(es_conversation_to_json(NULL, &json) == ES_ERR_INVALID);
    EXPECT(es_conversation_from_json(NULL, "{}", "x") == ES_ERR_INVALID);
    es_conversation_free(NULL);
    es_chat_free(NULL);
    es_stream_free(NULL);
    es_sampler_free(NULL);
    EXPECT(es_loop_guard_init(NULL) == ES_ERR_INVALID);
    EXPECT(es_loop_guard_add(NULL, 1).period == 0);
    EXPECT(es_loop_guard_init(&guard) == ES_OK);
    for (n = 0; n < 388; ++n) {
        EXPECT(loop.period == 0);
        loop = es_loop_guard_add(guard, 5);
    }
    EXPECT(loop.period == 1 && loop.n_tokens == 388);
    es_loop_guard_free(guard);
    es_loop_guard_free(NULL);
    EXPECT(es_stream_unloop(NULL, loop, &n) == ES_ERR_INVALID);
    return 0;
}
