// edge_stream.h: a token stream of any length over a llama_context, at constant memory.
//
// Method: StreamingLLM (Xiao et al. 2023, arXiv 2309.17453). The first n_keep tokens (the sinks) stay
// in the KV cache beside a sliding window of the most recent tokens. At a slide the oldest window tokens
// are evicted and the sinks move up, so that sinks and window stay adjacent; window keys are not touched.
//
// Conventions: plain C; opaque handles; no exception crosses it; every function that can fail
// returns an es_status and sets es_last_error() of the calling thread. A handle may be used by one thread at a time.
// The llama_context belongs to the caller and must outlive the stream.
#pragma once

#include "edge_stream_types.h"
#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct es_stream     es_stream;
typedef struct es_sampler    es_sampler;
typedef struct es_loop_guard es_loop_guard;

// Keeps llama.cpp's log off the terminal (verbose: writes it to stderr), and forgets the last error.
ES_API void es_log_set(bool verbose);

// The last error that llama.cpp logged since es_log_set, "" if none; a line that says only that loading failed does not
// replace the reason before it. Valid until the thread's next call of this.
ES_API const char * es_log_last_error(void);

// true if the loaded libllama has edge-stream's sink bank
ES_API bool es_bank_available(void);

// true if the model can stream; otherwise reason gets one sentence that says why not (0-terminated, at most n_reason
// bytes; may be NULL)
ES_API bool es_model_can_stream(const struct llama_model * model, char * reason, size_t n_reason);

// true if llama.cpp's own context shift works with the model; otherwise it would abort the process or be incomplete,
// and reason says why. Layers without rotation are not considered: llama.cpp rotates them as well.
ES_API bool es_model_can_shift(const struct llama_model * model, char * reason, size_t n_reason);

// false, with a reason, for a GGUF file that ends before its tensors do, or whose contradictory metadata would make
// llama.cpp abort the process while loading it. Other errors in a file are reported by llama.cpp itself.
ES_API bool es_model_file_check(const char * path, char * reason, size_t n_reason);

// llama_model_load_from_file and llama_init_from_model, whose failed assertions (metadata that contradict each other)
// and exceptions do not end the process: NULL, and es_log_last_error has the reason.
ES_API struct llama_model *   es_model_load(const char * path, struct llama_model_params params);
ES_API struct llama_context * es_context_init(struct llama_model * model, struct llama_context_params params);

// A non-negative 32-bit integer of a GGUF file's metadata, whose whole key is given; false if it has none there or
// cannot be read. The header stays in memory until es_model_file_check, so that asking before a load costs nothing.
ES_API bool es_model_file_number(const char * path, const char * key, uint32_t * value);

// Tokens that end a generation (EOS, end of turn): how many there are; at most n_max of them are written (tokens may be
// NULL).
ES_API int32_t es_vocab_eog(const struct llama_vocab * vocab, llama_token * tokens, int32_t n_max);

// 64-bit fingerprint of a model: its metadata, vocabulary and tensor sizes
ES_API uint64_t es_model_fingerprint(const struct llama_model * model);

// bytes per token in the cache (ggml_type of K and V), all layers that have one together; 0 with a stock libllama
ES_API uint64_t es_model_bytes_per_token(const struct llama_model * model, int32_t type_k, int32_t type_v);

// bytes of a context's cache and of its recurrent layers' states; 0 with a stock libllama
ES_API void es_context_memory(struct llama_context * ctx, uint64_t * cache, uint64_t * state);

// the i-th device (ggml_backend_dev_t) that holds layers of the model; NULL after the last
ES_API void * es_model_device(const struct llama_model * model, int32_t i);

//
// stream
//

typedef struct es_stream_params {
    llama_seq_id seq_id;         // the sequence of the context that holds the stream (default 0)
    llama_seq_id scratch_seq_id; // redecode only: another sequence, empty between calls; may be shared (default 1)
    uint32_t     n_ctx;          // cache capacity = sinks + window; 0 = all of the context
    uint32_t     n_keep;         // sinks: the stream's first n_keep tokens are pinned (default 4)
    uint32_t     n_slide;        // evict at least this many tokens per slide; 0 = 1 (bank), n_window/16 (redecode), or
                                 // 16 with drafts
    uint32_t n_chunk;            // most tokens per decode once eviction began; 0 = min(n_batch, n_window/4)
    uint32_t n_boundary;         // evict up to this many more tokens to end at a mark (es_stream_mark); default 0
    int32_t  rebase_at;          // rebase before an absolute position reaches this; 0 = max(4096, 4 n_ctx), or less
                                 // if the model's attention depends on absolute positions from some position on
    int32_t  sink_move;          // es_sink_move
    uint64_t model_tag;          // the caller's fingerprint of the weights, stored in sessions (default 0)
    uint32_t n_draft;            // most tokens drafted ahead of the stream (default 0: none); see es_stream_feed
    uint32_t n_draft_min;        // 0: as many as are expected to pay; N: all there are, whenever these are N or more
    uint32_t n_match;            // a draft goes on as the text did after the newest N tokens before; 0 = 2
    uint64_t n_recall_bytes;     // keys and values that are kept of recalled blocks, the newest (default 64 MiB)
} es_stream_params;

// Called for each decoded token in stream order. index: its 0-based index in the stream.
// logits: n_vocab floats that predict the next token. Return false to stop.
typedef bool (*es_logits_callback)(void * user, int64_t index, const float * logits);

ES_API es_stream_params es_stream_default_params(void);

// Clears seq_id (and scratch_seq_id if used) in the context's memory.
ES_API int32_t es_stream_init(struct llama_context * ctx, es_stream_params params, es_stream ** out);

// What is cached, and the tokens to decode: see es_decoder.
typedef struct es_decoder_step {
    const llama_token * tokens;
    uint32_t            n_tokens;
    uint32_t            n_ctx, n_keep;     // of the stream
    uint32_t            n_sinks, n_window; // cached now, without evicted and rewound tokens
    int32_t             pos_sinks;         // absolute position of the first sink; the others follow it, then the rest
    bool                all_logits;
    uint32_t            n_recalled; // recalled tokens, cached between sinks and window
    bool                recalls;    // tokens follow these, and attend to sinks and recalled tokens only
} es_decoder_step;

// The caller's own decoder, on any runtime, in place of a llama_context: the stream decides what is evicted and when;
// the decoder holds keys and values and computes. It is not told of evictions: at each step the cached tokens are the
// sinks, from position pos_sinks on, n_recalled tokens after them, and the newest n_window tokens, from pos_sinks +
// n_sinks + n_recalled on. Either all tokens of a step are sinks (n_sinks < n_keep) or none is. Recalled tokens are
// replaced by a step with recalls and n_recalled = 0. Callbacks return false (NULL, 0) on failure.
typedef struct es_decoder {
    void *   user;
    uint32_t n_cells; // tokens it can hold
    uint32_t n_batch; // most tokens per step
    // The logits of every token, or of the last one: n_vocab floats each, valid until the next call.
    const float * (*decode)(void * user, const es_decoder_step * step);
    // Lowers the position of everything cached by delta, which may be negative; n_tokens is 0.
    bool (*rebase)(void * user, const es_decoder_step * now, int32_t delta);
    // For sessions: size and content of the cached keys and values; n_tokens is 0.
    size_t (*state_size)(void * user, const es_decoder_step * now);
    bool (*state_get)(void * user, const es_decoder_step * now, void * out, size_t size);
    bool (*state_set)(void * user, const es_decoder_step * now, const void * data, size_t size);
    bool can_recall; // it knows n_recalled and recalls; otherwise es_stream_recall is refused
} es_decoder;

// A stream over a decoder. vocab: a model (vocab_only will do) that must outlive the stream. seq_id, scratch_seq_id and
// sink_move of params are ignored; rebase_at = 0 means 2^30. es_streams_feed refuses such streams.
ES_API int32_t es_stream_init_decoder(const struct llama_model * vocab, es_decoder decoder, es_stream_params params,
                                      es_stream ** out);

// How exactly a model streams, measured on a few tokens with a float32 cache: differences of logits (root mean square).
typedef struct es_proof {
    int32_t distance;  // D: the largest position of the stream; 0: nothing to prove (no keys to move)
    double  positions; // the same tokens decoded from position 0 and from D
    double  move;      // sinks moved to D against sinks decoded there (redecode: in two batches and in one)
    double  rebase;    // a window rebased from D to 0 against one decoded at 0
    double  noise;     // keys rotated to D and back against untouched ones: what float32 angles cost this model
    double  spread;    // standard deviation of the logits
    double  bound;     // counts as exact: 1e-3, or 5 times the noise but at most a fifth of the spread
    bool    parallel;  // llama.cpp decodes several sequences in one batch correctly (some graphs mix them up)
} es_proof;

// Decodes a few tokens in a context of its own, with the stream's model and threads. ES_ERR_UNSUPPORTED if a difference
// exceeds the bound: the model must not be streamed.
ES_API int32_t es_stream_prove(const es_stream * stream, es_proof * out);
ES_API int32_t es_stream_proof_distance(const es_stream * stream); // the D of es_stream_prove
ES_API void    es_stream_free(es_stream * stream);                 // NULL is fine; clears the sequence

// Feeds any number of tokens, in chunks: before each chunk of m tokens the oldest window tokens are evicted until
// sinks + window + m <= n_ctx. If on_logits is NULL, only the last token's logits are computed. After a failure the
// stream holds every complete chunk before it and remains usable.
// With n_draft, a single token may be decoded together with guesses of those that follow it. The stream does not hold
// them; a guess that is fed next costs no decode, and anything else takes them back. Drafts never cross a slide or a
// rebase: everything but speed, the stats n_drafted and n_accepted, and rounding in the logits is as without them.
ES_API int32_t es_stream_feed(es_stream * stream, const llama_token * tokens, size_t n_tokens,
                              es_logits_callback on_logits, void * user);

// Takes guesses from a smaller model too: draft, an empty stream of a context of that model, whose tokens must be the
// same. The stream must have n_draft. On success draft belongs to it and is freed with it; until then its context must
// live, and is used by the stream's thread.
ES_API int32_t es_stream_set_draft(es_stream * stream, es_stream * draft);

// Feeds tokens[i] to streams[i], in one decode, where all streams are of one context. Each slides independently, and
// its logits are those it would have alone, up to rounding. The streams must be different sequences that hold all their
// sinks. Without a unified cache, only sequences with neighbouring ids share the work: pass the streams in ascending
// order of seq_id. On failure no token was fed, although a stream may have made room for it.
ES_API int32_t es_streams_feed(es_stream * const * streams, const llama_token * tokens, size_t n_streams);

// n_vocab floats that predict the token after the last one fed; NULL before the first feed and after
// es_stream_rewind or es_stream_reset. Valid until the next call on the stream.
ES_API const float * es_stream_logits(es_stream * stream);

ES_API int32_t es_stream_get_stats(const es_stream * stream, es_stream_stats * out);

// The tokens in the cache in stream order: sinks, then window. Returns their number; writes at most n_max.
ES_API size_t es_stream_tokens(const es_stream * stream, llama_token * out, size_t n_max);

// Marks the next token's index as a boundary, such as the start of a message: a slide that would end at most n_boundary
// tokens before it evicts up to it instead. The newest 4 marks also keep the state of recurrent layers, for
// es_stream_rewind.
ES_API int32_t es_stream_mark(es_stream * stream);

// Removes the newest n tokens. ES_ERR_INVALID unless they are all in the window. A recurrent state cannot be undone:
// with recurrent layers the stream returns to the last mark before (or to its start, if nothing was evicted yet) and
// feeds the tokens from there again. If there is none: ES_ERR_INVALID with nothing changed; reset the stream and feed
// it.
ES_API int32_t es_stream_rewind(es_stream * stream, size_t n);

// Puts tokens of earlier text between sinks and window, in place of those that were recalled before. They are decoded
// behind the sinks, as if nothing else had been said; from then on the window sees them, and slides move them together
// with the sinks. The stream is the same without them: n_past, its tokens and its logits do not change. They take cells
// from the window, at most a quarter of n_ctx - n_keep. What was recalled lately is kept (n_recall_bytes) and comes
// back without a decode. ES_ERR_INVALID: too many, or sinks are missing; ES_ERR_UNSUPPORTED: recurrent layers, whose
// state cannot skip what follows the block, or sinks that are decoded again (redecode). On other failures nothing is
// recalled, but the oldest window tokens may be gone.
ES_API int32_t es_stream_recall(es_stream * stream, const llama_token * tokens, size_t n_tokens);
ES_API int32_t es_stream_unrecall(es_stream * stream); // takes them out again

// Call it when idle: rebases (brings absolute positions back to small numbers) if they have grown by n_ctx or more, so
// that a key is re-rotated at most once in its life. Otherwise a rebase is done when needed.
ES_API int32_t es_stream_rebase(es_stream * stream);

// For benchmarks at depths that would take days to feed: sets the number of tokens seen. The cache, its positions
// (which are below rebase_at at any depth) and the logits are unchanged. ES_ERR_INVALID unless the cache is full and
// n_past does not decrease.
ES_API int32_t es_stream_set_n_past(es_stream * stream, int64_t n_past);

// Empties the stream; its parameters stay.
ES_API int32_t es_stream_reset(es_stream * stream);

//
// sampler: llama.cpp's sampler chain with a random generator whose state can be saved
//

ES_API int32_t es_sampler_init(const struct llama_model * model, es_sampler_params params, es_sampler ** out);
ES_API void    es_sampler_free(es_sampler * sampler);

// Samples a token from the stream's last logits and accepts it (penalties, grammar). logprob, unless NULL, gets the
// natural log of the token's probability before any sampling transform. ES_ERR_DECODE if a logit is NaN or +infinity,
// or all are -infinity: the model's keys and values are then no numbers either, in all likelihood.
ES_API int32_t es_sampler_sample(es_sampler * sampler, es_stream * stream, llama_token * out, float * logprob);

// A generated token.
typedef struct es_token {
    llama_token  token;
    float        logprob; // natural log of the token's probability before any sampling transform
    bool         is_eog;  // it ends the generation (EOS, end of turn)
    const char * piece;   // its n_piece bytes, valid until the sampler's next token; not 0-terminated
    size_t       n_piece;
    int64_t      n_past;   // es_stream_next: tokens the stream has seen, this one included
    uint32_t     n_cached; // es_stream_next: tokens in the cache
} es_token;

// Chooses a token, as es_sampler_sample does, and describe it; it is not fed. special: control tokens have bytes too.
// logprob: wanted (it takes a pass over the vocabulary).
ES_API int32_t es_sampler_choose(es_sampler * sampler, es_stream * stream, bool special, bool logprob, es_token * out);

// Chooses a token and feeds it to the stream: one call per generated token. If feeding fails, out has the token that
// was chosen.
ES_API int32_t es_stream_next(es_stream * stream, es_sampler * sampler, bool special, bool logprob, es_token * out);

// Counts a token that was not sampled (the prompt) in penalties.
ES_API int32_t es_sampler_accept(es_sampler * sampler, llama_token token);

typedef struct es_candidate {
    llama_token token;
    float       probability;
} es_candidate;

// The n likeliest of the tokens that the last one was chosen from, likeliest first, with their probabilities after all
// transforms. Returns how many there are, at most n; 0 before the first.
ES_API int32_t es_sampler_candidates(const es_sampler * sampler, es_candidate * out, int32_t n);

ES_API uint32_t es_sampler_seed(const es_sampler * sampler);

// Restores the random sequence, the penalties and what mirostat and adaptive-p aim at, of the session that the stream
// was loaded from. False, with nothing
// changed, if there is none, if it was restored before, or if the sampler was made with another seed. A grammar starts
// anew.
ES_API bool es_sampler_restore(es_sampler * sampler, es_stream * stream);

// es_sampler_restore, or else es_sampler_accept for the stream's newest tokens: what a new sampler begins with.
ES_API int32_t es_sampler_begin(es_sampler * sampler, es_stream * stream);

//
// loop guard: ends an answer in which the model repeats itself
//

// Watches the tokens of one answer for an exact cycle with a period of at most 512 tokens. It must be long: 384 tokens
// and four periods, so that rules, zeros and refrains pass. The time per token is constant.
ES_API int32_t es_loop_guard_init(es_loop_guard ** out);
ES_API void    es_loop_guard_free(es_loop_guard * guard); // NULL is fine
ES_API es_loop es_loop_guard_add(es_loop_guard * guard, llama_token token);

// Takes back all but the first period of a loop that the stream ends with, as far as it is in the window; n_taken is
// their number. The last token that stays is read again, so that there are logits. n_taken is 0, and nothing changed,
// where the stream cannot be rewound (see es_stream_rewind).
ES_API int32_t es_stream_unloop(es_stream * stream, es_loop loop, size_t * n_taken);

//
// session file: KV, sink bank, positions, tokens, last logits, sampler state, and the caller's bytes (a transcript)
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
    uint64_t n_user; // size of the caller's bytes
} es_session_info;

// Writes path.tmp-PID, fsyncs, renames: path holds the old session or the new one, never part of one.
// sampler may be NULL. type_k and type_v: the ggml_type the context was created with.
ES_API int32_t es_session_save(const es_stream * stream, const es_sampler * sampler, int32_t type_k, int32_t type_v,
                               const char * path, const void * user, size_t n_user);

// The same in two steps: a copy in memory, which leaves the stream free to go on, and its file. Any one thread may
// write and free it. out: to be freed by the caller; untouched on failure. size: bytes of the file.
typedef struct es_snapshot es_snapshot;
ES_API int32_t  es_snapshot_init(const es_stream * stream, const es_sampler * sampler, int32_t type_k, int32_t type_v,
                                 const void * user, size_t n_user, es_snapshot ** out);
ES_API uint64_t es_snapshot_size(const es_snapshot * snapshot);
ES_API int32_t  es_snapshot_write(const es_snapshot * snapshot, const char * path);
ES_API void     es_snapshot_free(es_snapshot * snapshot);

// Reads header and user bytes and verifies their checksums. At most n_user bytes are written to user (may be NULL).
ES_API int32_t es_session_peek(const char * path, es_session_info * info, void * user, size_t n_user);

// Replaces the stream's content; n_ctx and n_keep become the file's. Everything is verified before anything changes; if
// llama.cpp then fails to restore it, the stream is empty and ES_ERR_INTERNAL is returned. The sampler's state is kept
// for es_sampler_restore.
ES_API int32_t es_session_load(es_stream * stream, int32_t type_k, int32_t type_v, const char * path);

#ifdef __cplusplus
}
#endif
