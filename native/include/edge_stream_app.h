// edge_stream_app.h: an endless conversation with a language model, for apps. It owns what an app needs (model,
// tokenizer, chat template, cache, sampler, session file) and shows nothing of llama.cpp.
//
//     es_app_model * model;   es_app_model_load("model.gguf", es_app_model_default_params(), &model);
//     es_app_session * chat;  es_app_session_open(model, es_app_session_default_params(), &chat);
//     es_app_say(chat, "Hello", es_app_answer_default_params(), NULL, NULL);
//     es_app_generate(chat, on_token, NULL);            // or es_app_next, token by token, at your own pace
//     es_app_session_save(chat, "today.session");    // es_app_session_restore goes on with the identical tokens
//
// Rules: plain C; opaque handles; no exception crosses it; every function that can fail returns an es_status and
// leaves a sentence in es_last_error() of the calling thread. A session is used by one thread at a time, except for
// es_app_stop; several sessions may share a model, each on its own thread. Texts are UTF-8.
#pragma once

#include "edge_stream_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct es_app_model   es_app_model;
typedef struct es_app_session es_app_session;

// Something long goes on: done of total (tokens, bytes, or thousandths of a model). Return false to stop it:
// ES_ERR_STOPPED. May be NULL wherever it is a parameter.
typedef bool (*es_app_progress)(void * user, uint64_t done, uint64_t total);

//
// model
//

typedef struct es_app_model_params {
    int32_t         n_gpu_layers; // layers on the GPU; -1: as many as there are (default), 0: none
    bool            use_mmap;     // map the file instead of reading it (default)
    es_app_progress on_progress;  // called while loading
    void *          user;
} es_app_model_params;

typedef struct es_app_model_info {
    char     name[128]; // llama.cpp's description, e.g. "llama 134M Q4_1"
    uint64_t n_params;
    uint64_t n_bytes;     // of all tensors
    uint64_t fingerprint; // of metadata, vocabulary and tensor sizes: sessions belong to it
    uint64_t tag;         // of the file's size and 64 blocks of it: tells a fine-tune from its base
    uint32_t n_vocab;
    uint32_t n_ctx_train;
    uint32_t n_ctx;             // the cache size the file recommends (edge_stream.n_ctx), else 4096
    uint32_t n_keep;            // the sinks the file recommends (edge_stream.n_keep), else 4
    bool     has_chat_template; // of its own
    bool     has_sink_bank;     // this build moves sinks inside the decode (else it decodes them again)
} es_app_model_info;

ES_API es_app_model_params es_app_model_default_params(void);

// ES_ERR_IO: no such file. ES_ERR_UNSUPPORTED: not a model that can stream, with the reason. ES_ERR_MEMORY: llama.cpp
// could not load it. A model may be freed before its sessions: they keep what they need.
ES_API int32_t es_app_model_load(const char * path, es_app_model_params params, es_app_model ** out);
ES_API void    es_app_model_free(es_app_model * model); // NULL is fine
ES_API int32_t es_app_model_get_info(const es_app_model * model, es_app_model_info * out);

// True if a chat is possible: the model has a chat template that llama.cpp knows without Jinja, or chat_template names
// one (chatml, llama3, gemma, ...). Otherwise one sentence is in reason (0-terminated, at most n_reason bytes).
ES_API bool es_app_model_can_chat(const es_app_model * model, const char * chat_template, char * reason,
                                  size_t n_reason);

// The names of llama.cpp's own templates, by index; NULL past the last.
ES_API const char * es_app_template_name(size_t index);

// Tokens of a text: their number, or -1 (es_last_error). At most n_max are written. special: text such as <|im_end|>
// becomes the control token that it spells.
ES_API int64_t es_app_tokenize(const es_app_model * model, const char * text, bool add_bos, bool special, int32_t * out,
                               size_t n_max);

// The bytes of a token: their number, or -1. Control tokens have none. They may end inside a character.
ES_API int32_t es_app_token_bytes(const es_app_model * model, int32_t token, char * out, size_t n_max);

// SHA-256 of a file as 64 hexadecimal digits: to check a download before it is loaded.
ES_API int32_t es_app_file_sha256(const char * path, es_app_progress on_progress, void * user, char out[65]);

//
// session: a conversation (or a plain stream) with its cache
//

typedef struct es_app_session_params {
    uint32_t     n_ctx;         // cache capacity in tokens; 0: what the model recommends
    uint32_t     n_keep;        // least number of sinks (default 4); a system prompt is pinned as a whole
    uint32_t     n_batch;       // most tokens per decode (default 512)
    uint32_t     n_threads;     // 0: as many as there are cores
    const char * cache_type_k;  // f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl; NULL: f16
    const char * cache_type_v;  // the same; quantised needs flash attention
    int32_t      flash_attn;    // 1: on, 0: off, -1: where it is possible (default)
    bool         chat;          // a conversation (default); false: a plain stream, without template
    const char * chat_template; // NULL: the model's own; or the name of one of llama.cpp's
    const char * system;        // system prompt, pinned; NULL: none
} es_app_session_params;

// What a session will take, computed without loading weights, in bytes. Buffers that llama.cpp allocates, exactly; an
// app has some MiB of its own besides. weights are clean pages of the file where it is mapped.
typedef struct es_app_memory {
    uint64_t weights;
    uint64_t cache;   // keys and values of n_ctx tokens
    uint64_t sinks;   // float32 copies of the sinks' keys
    uint64_t compute; // scratch of a decode
    uint64_t total;   // of all these
    uint32_t n_ctx;   // the cache size that they are for
    uint32_t n_keep;  // sinks, system prompt included
} es_app_memory;

typedef struct es_app_session_info {
    uint32_t n_ctx;
    uint32_t n_keep;
    int64_t  n_past;      // tokens seen
    uint64_t fingerprint; // of the model that it belongs to
    uint64_t model_tag;
    uint64_t n_messages; // of the transcript; 0 for a plain stream
} es_app_session_info;

typedef struct es_app_message {
    const char * role; // "user" or "assistant"
    const char * text; // valid UTF-8; may hold zero bytes, as a model may write them
    size_t       n_text;
} es_app_message;

ES_API es_app_session_params es_app_session_default_params(void);

ES_API int32_t es_app_memory_need(const char * path, es_app_model_params model, es_app_session_params params,
                                  es_app_memory * out);

ES_API int32_t es_app_session_open(es_app_model * model, es_app_session_params params, es_app_session ** out);

// Goes on where a saved session ended. Cache size, sinks and system prompt are the file's; cache types, threads and
// chat template are params'. Sessions of the Python package (edge-stream chat --session) are read as well, and the
// other way round. The file is not changed.
ES_API int32_t es_app_session_restore(es_app_model * model, es_app_session_params params, const char * path,
                                      es_app_session ** out);
ES_API void    es_app_session_free(es_app_session * session); // NULL is fine

// All or nothing: path holds the old session or the new one. Not while an answer is open: ES_ERR_INVALID.
ES_API int32_t es_app_session_save(es_app_session * session, const char * path);

// What a file holds, without a model. Verifies the checksum of what it reads.
ES_API int32_t es_app_session_peek(const char * path, es_app_session_info * out);

ES_API int32_t es_app_session_stats(const es_app_session * session, es_stream_stats * out);

// The transcript, oldest first, without the system prompt and without an answer that is still open. Its oldest messages
// are dropped beyond a million bytes. Valid until the next call that changes the session.
ES_API size_t  es_app_message_count(const es_app_session * session);
ES_API size_t  es_app_message_dropped(const es_app_session * session);
ES_API int32_t es_app_message_get(const es_app_session * session, size_t index, es_app_message * out);

// Forget everything but the system prompt.
ES_API int32_t es_app_session_clear(es_app_session * session);

//
// reading and writing
//

typedef struct es_app_answer_params {
    es_sampler_params sampling;
    int64_t           max_tokens; // -1: for ever (default)
    bool              ignore_eos; // write on where the model would end (default false)
} es_app_answer_params;

typedef enum es_app_finish {
    ES_APP_UNFINISHED = 0,
    ES_APP_EOS        = 1, // the model ended its answer; the token has no bytes
    ES_APP_LENGTH     = 2, // max_tokens
    ES_APP_STOPPED    = 3  // es_app_stop; there is no token
} es_app_finish;

typedef struct es_app_token {
    const char * bytes; // not 0-terminated; may end inside a character; valid until the next call on the session
    size_t       n_bytes;
    int32_t      token;  // -1 if there is none
    int32_t      finish; // es_app_finish
    int64_t      n_past; // tokens seen since the stream's start, this one included
    uint32_t     n_cached;
    float        tokens_per_s; // since the answer began
} es_app_token;

// Return false to stop.
typedef bool (*es_app_on_token)(void * user, const es_app_token * token);

ES_API es_app_answer_params es_app_answer_default_params(void);

// Read a user's message and open an answer. If reading fails or is stopped, the conversation is as it was before. An
// answer that is still open is ended first.
ES_API int32_t es_app_say(es_app_session * session, const char * text, es_app_answer_params params,
                          es_app_progress on_progress, void * user);

// Take the last answer back and open another one.
ES_API int32_t es_app_regenerate(es_app_session * session, es_app_answer_params params);

// Plain streams: read any amount of text (a text at the start gets BOS where the model wants it). If stopped, what was
// read stays.
ES_API int32_t es_app_feed(es_app_session * session, const char * text, bool special, es_app_progress on_progress,
                           void * user);

// Plain streams: open writing after what was read. The same sampling parameters go on with the random sequence.
ES_API int32_t es_app_begin(es_app_session * session, es_app_answer_params params);

// One more token. When out->finish is not ES_APP_UNFINISHED the answer has been ended, as by es_app_end.
ES_API int32_t es_app_next(es_app_session * session, es_app_token * out);

// End the open answer, if there is one: what was written until then stays, as a closed turn.
ES_API int32_t es_app_end(es_app_session * session);

// es_app_next until the end, then es_app_end. on_token sees every token, and the last record with its finish.
ES_API int32_t es_app_generate(es_app_session * session, es_app_on_token on_token, void * user);

// From any thread: stop reading (between decodes; on the CPU, within one) or writing (between tokens). It acts on
// what goes on now; the next es_app_say, es_app_regenerate, es_app_feed or es_app_begin clears it.
ES_API void es_app_stop(es_app_session * session);

#ifdef __cplusplus
}
#endif
