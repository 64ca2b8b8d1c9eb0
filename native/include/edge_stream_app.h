// edge_stream_app.h: an endless conversation with a language model, for apps. It owns what an app needs (model,
// tokenizer, chat template, cache, sampler, session file) and shows nothing of llama.cpp.
//
//     es_app_model * model;   es_app_model_load("model.gguf", es_app_model_default_params(), &model);
//     es_app_session * chat;  es_app_session_open(model, es_app_session_default_params(), &chat);
//     es_app_say(chat, "Hello", es_app_answer_default_params(), NULL, NULL);
//     es_app_generate(chat, on_token, NULL);         // or es_app_next, one token at a time
//     es_app_session_save(chat, "today.session");    // es_app_session_restore continues with identical tokens
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

// Progress of a long call: done of total (tokens, bytes, or thousandths of a model). Return false to stop the call,
// which then returns ES_ERR_STOPPED. May be NULL wherever it is a parameter.
typedef bool (*es_app_progress)(void * user, uint64_t done, uint64_t total);

//
// model
//

typedef struct es_app_model_params {
    int32_t         n_gpu_layers; // layers on the GPU; -1: all (default), 0: none
    bool            use_mmap;     // map the file instead of reading it (default)
    es_app_progress on_progress;  // called while loading
    void *          user;
} es_app_model_params;

typedef struct es_app_model_info {
    char     name[128]; // llama.cpp's description, e.g. "llama 134M Q4_1"
    uint64_t n_params;
    uint64_t n_bytes;     // of all tensors
    uint64_t fingerprint; // of metadata, vocabulary and tensor sizes; a session stores it
    uint64_t tag;         // hash of the file's size and 64 blocks of it; distinguishes a fine-tune from its base
    uint32_t n_vocab;
    uint32_t n_ctx_train;
    uint32_t n_ctx;             // the cache size the file recommends (edge_stream.n_ctx), else 4096
    uint32_t n_keep;            // the sinks the file recommends (edge_stream.n_keep), else 4
    bool     has_chat_template; // of its own
    bool     has_sink_bank;     // this build moves sinks within a decode (otherwise it decodes them again)
} es_app_model_info;

ES_API es_app_model_params es_app_model_default_params(void);

// ES_ERR_IO: no such file. ES_ERR_UNSUPPORTED: the model cannot stream; es_last_error says why. ES_ERR_MEMORY:
// llama.cpp could not load it. A model may be freed before its sessions.
ES_API int32_t es_app_model_load(const char * path, es_app_model_params params, es_app_model ** out);
ES_API void    es_app_model_free(es_app_model * model); // NULL is fine
ES_API int32_t es_app_model_get_info(const es_app_model * model, es_app_model_info * out);

// Whether conversations are possible: false only if the chat template is broken. chat_template: as in a session's
// parameters. reason gets one sentence: why not, or that the model has no template and ChatML is used; else it is empty
// (0-terminated, at most n_reason bytes).
ES_API bool es_app_model_can_chat(const es_app_model * model, const char * chat_template, char * reason,
                                  size_t n_reason);

// Tokenizes text. Returns the number of tokens, or -1 (es_last_error); writes at most n_max. special: text such as
// <|im_end|> becomes the control token of that name.
ES_API int64_t es_app_tokenize(const es_app_model * model, const char * text, bool add_bos, bool special, int32_t * out,
                               size_t n_max);

// The bytes of a token. Returns their number (0 for control tokens), or -1; writes at most n_max. They may end inside a
// character.
ES_API int32_t es_app_token_bytes(const es_app_model * model, int32_t token, char * out, size_t n_max);

// SHA-256 of a file as 64 hexadecimal digits, to check a download before loading it.
ES_API int32_t es_app_file_sha256(const char * path, es_app_progress on_progress, void * user, char out[65]);

//
// session: a conversation (or a plain stream) with its cache
//

typedef struct es_app_session_params {
    uint32_t     n_ctx;        // cache capacity in tokens; 0: the model's recommendation
    uint32_t     n_keep;       // least number of sinks (default 4); a system prompt is pinned entirely
    uint32_t     n_batch;      // most tokens per decode (default 512)
    uint32_t     n_threads;    // 0: one per core
    const char * cache_type_k; // f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl; NULL: f16
    const char * cache_type_v; // the same; quantised types need flash attention
    int32_t flash_attn; // 1: on, 0: off, -1: where supported, but not for an f32 cache, which it would round (default)
    bool    chat;       // a conversation (default); false: a plain stream, without template
    const char * chat_template; // NULL: the model's own; else Jinja, or the name of one of llama.cpp's (chatml, ...)
    const char * system;        // system prompt, pinned; NULL: none
    const char * tools;         // what the model may call, as in OpenAI's requests: a JSON list, pinned; NULL: none
    int32_t      thinking;      // whether the model shall think: 1: yes, 0: no, -1: as its template has it (default)
} es_app_session_params;

// Memory that a session needs in bytes, computed without loading weights: exactly what llama.cpp allocates. The app
// itself needs some MiB more. Weights of a mapped file are clean pages.
typedef struct es_app_memory {
    uint64_t weights;
    uint64_t cache;   // keys and values of n_ctx tokens
    uint64_t sinks;   // float32 copies of the sinks' keys
    uint64_t compute; // compute buffers of a decode
    uint64_t total;   // sum of the above
    uint32_t n_ctx;   // the cache size that this is for
    uint32_t n_keep;  // sinks, system prompt included
} es_app_memory;

typedef struct es_app_session_info {
    uint32_t n_ctx;
    uint32_t n_keep;
    int64_t  n_past;      // tokens seen
    uint64_t fingerprint; // of its model
    uint64_t model_tag;
    uint64_t n_messages; // of the transcript; 0 for a plain stream
} es_app_session_info;

typedef struct es_app_message {
    const char * role; // "user", "assistant" or "tool"
    const char * text; // valid UTF-8, as thinking; both may contain zero bytes
    size_t       n_text;
    const char * thinking;
    size_t       n_thinking;
    const char * tool_calls; // what the model wants to be called, as in OpenAI's messages: a JSON list; NULL: nothing
} es_app_message;

ES_API es_app_session_params es_app_session_default_params(void);

ES_API int32_t es_app_memory_need(const char * path, es_app_model_params model, es_app_session_params params,
                                  es_app_memory * out);

ES_API int32_t es_app_session_open(es_app_model * model, es_app_session_params params, es_app_session ** out);

// Resumes a saved session. Cache size, sinks, system prompt and tools come from the file; cache types, threads, chat
// template and thinking from params. Sessions are interchangeable with those of the Python package (edge-stream chat
// --session). The file is not changed.
ES_API int32_t es_app_session_restore(es_app_model * model, es_app_session_params params, const char * path,
                                      es_app_session ** out);
ES_API void    es_app_session_free(es_app_session * session); // NULL is fine

// All or nothing: path holds the old session or the new one. ES_ERR_INVALID while an answer is open.
ES_API int32_t es_app_session_save(es_app_session * session, const char * path);

// Describes a saved session without a model. Verifies the checksums of what it reads.
ES_API int32_t es_app_session_peek(const char * path, es_app_session_info * out);

ES_API int32_t es_app_session_stats(const es_app_session * session, es_stream_stats * out);

// The transcript, oldest message first, without the system prompt and an open answer. Beyond a million bytes the oldest
// messages are dropped. Pointers are valid until the next call that changes the session.
ES_API size_t  es_app_message_count(const es_app_session * session);
ES_API size_t  es_app_message_dropped(const es_app_session * session);
ES_API int32_t es_app_message_get(const es_app_session * session, size_t index, es_app_message * out);

// Forgets everything but the system prompt.
ES_API int32_t es_app_session_clear(es_app_session * session);

//
// recall: what has left the window comes back when it is needed
//

typedef struct es_app_recalled {
    const char * text;         // a line of the conversation, 0-terminated; NULL: nothing was recalled
    bool         is_from_user; // else the model said it
    int64_t      message;      // its number in the whole conversation
    int64_t      when;         // it was said, in seconds since 1970
    double       coverage;     // share of the question's words that it has, weighted by their rarity
} es_app_recalled;

// Keeps what is said in a log at path (made if it is not there, readable by its owner only; NULL: in memory) and reads
// a user's message with the line of it that belongs to it and has left the window: see edge_stream_recall.h. max_bytes:
// of the file, beyond which the oldest is dropped (0: 64 MiB). n_tokens: of a line that may come back (64, say); 0:
// nothing does. ES_ERR_FORMAT, ES_ERR_VERSION, ES_ERR_IO: the conversation goes on without. Delete the file with the
// session's. Plain streams have no log.
ES_API int32_t es_app_use_log(es_app_session * session, const char * path, uint64_t max_bytes, uint32_t n_tokens);

// What the newest message was read with. The text is valid until the next call on the session.
ES_API int32_t es_app_get_recalled(es_app_session * session, es_app_recalled * out);

// Deletes a message from the log. ES_ERR_INVALID if there is nothing of it. The transcript and the window keep it.
ES_API int32_t es_app_forget(es_app_session * session, int64_t message);

//
// feeding and generating
//

typedef struct es_app_answer_params {
    es_sampler_params sampling;
    int64_t           max_tokens; // -1: no limit (default)
    bool              ignore_eos; // continue past the end-of-sequence token (default false)
    int32_t loop_guard; // end an answer that repeats itself over and over. -1: in conversations (default), 0, 1
} es_app_answer_params;

typedef enum es_app_finish {
    ES_APP_UNFINISHED = 0,
    ES_APP_EOS        = 1, // the model ended its answer; the token has no bytes
    ES_APP_LENGTH     = 2, // max_tokens
    ES_APP_STOPPED    = 3, // es_app_stop; there is no token
    ES_APP_REPETITION = 4  // loop_guard: all but one period of the loop was taken back, from the transcript as well
} es_app_finish;

// A conversation's bytes are whole characters, without the markup of thinking and tool calls; a plain stream's may end
// inside a character. Where thinking ends within a token, there are two records of it.
typedef struct es_app_token {
    const char * bytes; // not 0-terminated; valid until the next call on the session
    size_t       n_bytes;
    bool         is_thinking; // the bytes belong to the model's thinking
    int32_t      token;       // -1 if there is none
    int32_t      finish;      // es_app_finish
    int64_t      n_past;      // tokens seen since the stream's start, including this one
    uint32_t     n_cached;
    float        tokens_per_s; // average of this answer
    es_loop      loop;         // ES_APP_REPETITION: what was repeated
} es_app_token;

// Return false to stop.
typedef bool (*es_app_on_token)(void * user, const es_app_token * token);

ES_API es_app_answer_params es_app_answer_default_params(void);

// Feeds a user's message and opens an answer. If that fails or is stopped, the conversation is unchanged. An open
// answer is ended first.
ES_API int32_t es_app_say(es_app_session * session, const char * text, es_app_answer_params params,
                          es_app_progress on_progress, void * user);

// The same with messages as in OpenAI's requests, a JSON list. Answers tool calls: {"role": "tool", "tool_call_id":
// ..., "content": ...} for each.
ES_API int32_t es_app_say_messages(es_app_session * session, const char * messages, es_app_answer_params params,
                                   es_app_progress on_progress, void * user);

// Discards the last answer and opens a new one. If that fails, the conversation is unchanged.
ES_API int32_t es_app_regenerate(es_app_session * session, es_app_answer_params params);

// Goes on with the last answer, which was ended by max_tokens, es_app_stop or es_app_end. ES_ERR_INVALID if there is
// none, or if the model ended it.
ES_API int32_t es_app_continue(es_app_session * session, es_app_answer_params params);

// Plain streams: feeds any amount of text (at the start with BOS if the model expects one). If stopped, what was fed
// stays.
ES_API int32_t es_app_feed(es_app_session * session, const char * text, bool special, es_app_progress on_progress,
                           void * user);

// Plain streams: begins generating after what was fed. With unchanged sampling parameters the random sequence
// continues.
ES_API int32_t es_app_begin(es_app_session * session, es_app_answer_params params);

// Generates one token. Unless out->finish is ES_APP_UNFINISHED, the answer has been ended, as by es_app_end.
ES_API int32_t es_app_next(es_app_session * session, es_app_token * out);

// Ends the open answer, if there is one; what was generated stays.
ES_API int32_t es_app_end(es_app_session * session);

// es_app_next until the answer ends. on_token gets every record, including the last one with its finish.
ES_API int32_t es_app_generate(es_app_session * session, es_app_on_token on_token, void * user);

// From any thread: stops feeding (between decodes; on the CPU within one) or generating (between tokens). It applies to
// the current call or answer; the next es_app_say, es_app_regenerate, es_app_feed or es_app_begin clears it.
ES_API void es_app_stop(es_app_session * session);

#ifdef __cplusplus
}
#endif
