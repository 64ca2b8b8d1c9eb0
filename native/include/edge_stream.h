// edge_stream.h: a token stream of any length over a llama_context, at constant memory.
//
// Method: StreamingLLM (Xiao et al. 2023, arXiv 2309.17453). The first n_keep tokens (the sinks) stay
// in the KV cache beside a sliding window of the most recent tokens. At a slide the oldest window tokens
// are evicted and the sinks move up, so that sinks and window stay adjacent; window keys are not touched.
//
// Rules of this header: plain C; opaque handles; no exception crosses it; every function that can fail
// returns an es_status and leaves a sentence in es_last_error() of the calling thread. A handle may be
// used by one thread at a time. The llama_context stays the caller's and must outlive the stream.
#pragma once

#include "edge_stream_types.h"
#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct es_stream  es_stream;
typedef struct es_sampler es_sampler;

// true if the loaded libllama carries the sink bank patch
ES_API bool es_bank_available(void);

// true if the model can stream; otherwise writes one sentence naming the missing property to
// reason (0-terminated, at most n_reason bytes; may be NULL)
ES_API bool es_model_can_stream(const struct llama_model * model, char * reason, size_t n_reason);

// true if llama.cpp's own shift of positions (its context shift) can be used with the model; otherwise it ends the
// process, or leaves something out, and reason says what. Layers without rotation are not counted here: it rotates
// them.
ES_API bool es_model_can_shift(const struct llama_model * model, char * reason, size_t n_reason);

// false, and a sentence, for a GGUF file whose metadata contradict themselves in a way that ends the process when
// llama.cpp loads it. Anything else that is wrong with a file is left to llama.cpp, which says so.
ES_API bool es_model_file_check(const char * path, char * reason, size_t n_reason);

// 64-bit fingerprint of a model: its metadata, vocabulary and tensor sizes
ES_API uint64_t es_model_fingerprint(const struct llama_model * model);

// bytes that a token takes in the cache (ggml_type of K and V), over the layers that have one; 0 with a stock libllama
ES_API uint64_t es_model_bytes_per_token(const struct llama_model * model, int32_t type_k, int32_t type_v);

// bytes of a context's cache, and of its recurrent layers' states; 0 with a stock libllama
ES_API void es_context_memory(struct llama_context * ctx, uint64_t * cache, uint64_t * state);

// the i-th device (ggml_backend_dev_t) that llama.cpp put layers of the model on, however it chose; NULL after the last
ES_API void * es_model_device(const struct llama_model * model, int32_t i);

//
// stream
//

typedef struct es_stream_params {
    llama_seq_id seq_id;         // the sequence of the context that holds the stream (default 0)
    llama_seq_id scratch_seq_id; // redecode only: another sequence, empty between calls; may be shared (default 1)
    uint32_t     n_ctx;          // cache capacity = sinks + window; 0 = as much as the context holds
    uint32_t     n_keep;         // sinks: the stream's first n_keep tokens are pinned (default 4)
    uint32_t     n_slide;        // evict at least this many tokens per slide; 0 = 1 (bank) or n_window/16 (redecode)
    uint32_t     n_chunk;        // most tokens per decode once eviction began; 0 = min(n_batch, n_window/4)
    uint32_t     n_boundary;     // evict up to this many tokens more to end at a mark (es_stream_mark); default 0
    int32_t      rebase_at;      // rebase before an absolute position reaches this; 0 = max(4096, 4 n_ctx), or what
                                 // the model allows, if its attention depends on positions from there on
    int32_t  sink_move;          // es_sink_move
    uint64_t model_tag;          // caller's own fingerprint of the weights, stored in sessions (default 0)
} es_stream_params;

// Called after each decoded token in stream order. index: its 0-based index in the stream (64-bit).
// logits: n_vocab floats that predict the next token. Return false to stop.
typedef bool (*es_logits_callback)(void * user, int64_t index, const float * logits);

ES_API es_stream_params es_stream_default_params(void);

// Clears seq_id (and scratch_seq_id if used) in the context's memory.
ES_API int32_t es_stream_init(struct llama_context * ctx, es_stream_params params, es_stream ** out);

// What is cached, and what comes: see es_decoder.
typedef struct es_decoder_step {
    const llama_token * tokens;
    uint32_t            n_tokens;
    uint32_t            n_ctx, n_keep;     // of the stream
    uint32_t            n_sinks, n_window; // cached now; evicted and rewound tokens are gone already
    int32_t             pos_sinks;         // absolute position of the first sink; the window follows the sinks
    bool                all_logits;
} es_decoder_step;

// A decoder of the caller's in place of a llama_context, on whatever runtime: the stream decides what is evicted and
// when, the decoder keeps keys and values and computes. It needs no notice of an eviction: the tokens cached at a step
// are the sinks, at pos_sinks.., and the newest n_window tokens, at pos_sinks + n_sinks... The tokens of one step are
// all sinks (n_sinks < n_keep) or none is. Callbacks return false (NULL, 0) on failure.
typedef struct es_decoder {
    void *   user;
    uint32_t n_cells; // tokens it can hold
    uint32_t n_batch; // most tokens per step
    // The logits of every token, or of the last one: n_vocab floats each, valid until the next call.
    const float * (*decode)(void * user, const es_decoder_step * step);
    // Positions of everything cached fall by delta; n_tokens is 0.
    bool (*rebase)(void * user, const es_decoder_step * now, int32_t delta);
    // For sessions: the size, and the content, of the keys and values of what is cached; n_tokens is 0.
    size_t (*state_size)(void * user, const es_decoder_step * now);
    bool (*state_get)(void * user, const es_decoder_step * now, void * out, size_t size);
    bool (*state_set)(void * user, const es_decoder_step * now, const void * data, size_t size);
} es_decoder;

// A stream over a decoder. vocab: a model (its vocabulary is enough) that must outlive the stream. Of params, seq_id,
// scratch_seq_id and sink_move are not used; rebase_at 0 is 2^30. es_streams_feed refuses such a stream.
ES_API int32_t es_stream_init_decoder(const struct llama_model * vocab, es_decoder decoder, es_stream_params params,
                                      es_stream ** out);

// What a model shows of itself, on a handful of tokens with a float32 cache: differences of logits (root mean square).
typedef struct es_proof {
    int32_t distance;  // D: as far as any position of the stream gets; 0: nothing had to be proven (no keys to move)
    double  positions; // the same tokens from position 0 on, and from D on
    double  move;      // sinks moved to D, and decoded there (redecode: decoded in two batches, and in one)
    double  rebase;    // a window brought back from D, and decoded at 0
    double  noise;  // the same tokens, with keys that were rotated to D and back: what float32 angles cost this model
    double  spread; // standard deviation of the logits
    double  bound;  // what counts as exact: 1e-3, or 5 times the noise but no more than a quarter of the spread
    bool parallel;  // llama.cpp decodes several sequences of this model in one batch rightly (some graphs mix them up)
} es_proof;

// Decodes some tokens in a context of its own (of the stream's model and threads; the stream is not touched).
// ES_ERR_UNSUPPORTED, with a sentence, if a difference exceeds the bound: the model must not be streamed.
ES_API int32_t es_stream_prove(const es_stream * stream, es_proof * out);
ES_API int32_t es_stream_proof_distance(const es_stream * stream); // the D of es_stream_prove
ES_API void    es_stream_free(es_stream * stream);                 // NULL is fine; clears the sequence

// Feed any number of tokens: split into chunks inside; before each chunk of m tokens the oldest window
// tokens are evicted until sinks + window + m <= n_ctx. on_logits may be NULL: then only the last token's
// logits are computed. On failure the stream holds every complete chunk before it and can go on.
ES_API int32_t es_stream_feed(es_stream * stream, const llama_token * tokens, size_t n_tokens,
                              es_logits_callback on_logits, void * user);

// Feed one token to each of several streams of one context, tokens[i] to streams[i], in one decode: each slides on
// its own terms, and its logits are those it would have alone, but for the rounding of float sums. The streams must be
// different sequences that hold all their sinks. In a context without a unified cache, sequences whose ids
// follow one another share the work; give the streams in ascending order of seq_id. On failure no token was taken
// (a stream may have made room for it).
ES_API int32_t es_streams_feed(es_stream * const * streams, const llama_token * tokens, size_t n_streams);

// n_vocab floats that predict the token after the last one fed; NULL before the first feed and after
// es_stream_rewind or es_stream_reset. Valid until the next call on the stream.
ES_API const float * es_stream_logits(es_stream * stream);

ES_API int32_t es_stream_get_stats(const es_stream * stream, es_stream_stats * out);

// The tokens in the cache in stream order: sinks, then window. Returns their number; writes at most n_max.
ES_API size_t es_stream_tokens(const es_stream * stream, llama_token * out, size_t n_max);

// Mark the next token's index as a boundary (say, the start of a message): a slide that would end within
// n_boundary tokens before it evicts up to it instead. With recurrent layers their state is kept for es_stream_rewind:
// the newest 4 marks hold one each.
ES_API int32_t es_stream_mark(es_stream * stream);

// Forget the newest n tokens. ES_ERR_INVALID unless they are all in the window. A recurrent state cannot be undone:
// there the stream goes back to the last mark before (or its beginning, if nothing was evicted yet) and reads again
// from there; ES_ERR_INVALID if there is none, with nothing changed: reset the stream and feed what it should hold.
ES_API int32_t es_stream_rewind(es_stream * stream, size_t n);

// At an idle moment: bring absolute positions back to small numbers if they have grown by n_ctx or more (so that a
// key is re-rotated at most once in its life). Otherwise done when needed.
ES_API int32_t es_stream_rebase(es_stream * stream);

// For benchmarks at depths that would take days to read: the stream counts as if n_past tokens had been fed, those
// before the window unseen. The cache, its positions (which stay below rebase_at at any depth) and the logits remain
// as they are. ES_ERR_INVALID unless the cache is full and n_past is not less than now.
ES_API int32_t es_stream_set_n_past(es_stream * stream, int64_t n_past);

// Forget everything: an empty stream with the same parameters.
ES_API int32_t es_stream_reset(es_stream * stream);

//
// sampler: llama.cpp's sampler chain, with a random generator whose state can be saved
//

ES_API int32_t es_sampler_init(const struct llama_model * model, es_sampler_params params, es_sampler ** out);
ES_API void    es_sampler_free(es_sampler * sampler);

// Choose a token from the stream's last logits and remember it for penalties and grammar. If logprob is
// not NULL it gets the natural log of the token's probability before any sampling transform.
ES_API int32_t es_sampler_sample(es_sampler * sampler, es_stream * stream, llama_token * out, float * logprob);

// Let penalties know a token that was not sampled (the prompt).
ES_API int32_t  es_sampler_accept(es_sampler * sampler, llama_token token);
ES_API uint32_t es_sampler_seed(const es_sampler * sampler);

// Continue the random sequence and the penalties with which the session that the stream was loaded from was
// saved. False (and nothing changes) if there is none, if it was taken already, or if the sampler was made
// with another seed. A grammar starts anew.
ES_API bool es_sampler_restore(es_sampler * sampler, es_stream * stream);

//
// session file: KV, sink bank, positions, tokens, last logits, sampler state, and bytes of the caller's (a transcript)
//

typedef struct es_session_info {
    uint32_t version;
    uint32_t n_ctx;
    uint32_t n_keep;
    int32_t  type_k; // ggml_type of the cache
    int32_t  type_v;
    int64_t  n_past;
    uint64_t fingerprint; // es_model_fingerprint of the model
    uint64_t model_tag;
    uint64_t n_user; // bytes of the caller's
} es_session_info;

// Writes path.tmp-PID, fsyncs, renames: path holds the old session or the new one, never a part.
// sampler may be NULL. type_k and type_v: the ggml_type the context was created with.
ES_API int32_t es_session_save(const es_stream * stream, const es_sampler * sampler, int32_t type_k, int32_t type_v,
                               const char * path, const void * user, size_t n_user);

// Reads header and user bytes. Verifies the checksum of what it reads. user may be NULL; at most n_user
// bytes are written to it.
ES_API int32_t es_session_peek(const char * path, es_session_info * info, void * user, size_t n_user);

// Replaces the stream's content (its n_ctx and n_keep become the file's). Everything is verified before
// anything changes; if llama.cpp itself then fails to restore, the stream is empty and ES_ERR_INTERNAL says so.
// The sampler's state waits for es_sampler_restore.
ES_API int32_t es_session_load(es_stream * stream, int32_t type_k, int32_t type_v, const char * path);

#ifdef __cplusplus
}
#endif
