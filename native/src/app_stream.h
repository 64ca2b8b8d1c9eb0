// A stream with its context and sampler, which generates tokens.
#pragma once

#include "app_model.h"
#include "edge_stream.h"
#include "loop_guard.h"

#include <atomic>
#include <chrono>
#include <memory>

// Cache types and sizes of a context, resolved and checked.
struct es_context_params {
    uint32_t  n_ctx  = 0; // of the stream
    uint32_t  n_keep = 0;
    uint32_t  n_spare() const; // extra cells: redecoding holds the sinks twice during a move
    ggml_type type_k = GGML_TYPE_F16, type_v = GGML_TYPE_F16;

    int32_t init(const es_app_session_params & params, uint32_t n_ctx, uint32_t n_keep); // sets es_last_error
};

// A context for one stream, or null (es_last_error). abort_data: see llama_context_params.
llama_context * es_make_context(llama_model * model, const es_app_session_params & params,
                                const es_context_params & sizes, ggml_abort_callback abort, void * abort_data);

class es_app_stream {
public:
    explicit es_app_stream(std::shared_ptr<const es_loaded_model> model) : model_(std::move(model)) {}
    es_app_stream(const es_app_stream &)             = delete;
    es_app_stream & operator=(const es_app_stream &) = delete;
    ~es_app_stream();

    // sets es_last_error, as everything below that returns an es_status
    int32_t init(const es_app_session_params & params, const es_context_params & sizes, uint32_t n_boundary);

    const es_loaded_model & model() const { return *model_; }
    es_stream *             handle() const { return stream_; }
    es_stream_stats         stats() const;
    int64_t                 n_past() const { return stats().n_past; }

    // Feeds tokens a few at a time. stop() takes effect between decodes, and on the CPU within one.
    int32_t feed(const es_tokens & tokens, es_app_progress on_progress, void * user);

    // Generating: begin, then next until it reports a finish, then end. special: control tokens have bytes, too.
    int32_t begin(const es_app_answer_params & params);
    int32_t next(bool special, es_app_token & out);
    void    end() { writing_ = false; }
    bool    writing() const { return writing_; }

    int32_t reset();
    int32_t save(const char * path, const std::string & user) const;
    int32_t load(const char * path);

    void                stop() { stop_ = true; } // any thread
    void                clear_stop() { stop_ = false; }
    bool                is_stopped() const { return stop_; }
    std::atomic<bool> & may_abort() { return may_abort_; } // whether stop() may take effect within a decode

private:
    int32_t use_sampling(const es_app_answer_params & params);

    std::shared_ptr<const es_loaded_model> model_;

    llama_context *   ctx_    = nullptr;
    es_stream *       stream_ = nullptr;
    es_context_params sizes_;
    std::atomic<bool> stop_{ false };
    std::atomic<bool> may_abort_{ false };

    es_sampler * sampler_ = nullptr;
    std::string  sampler_key_; // its parameters; empty: it cannot be continued

    bool                                  writing_    = false;
    bool                                  ignore_eos_ = false;
    int64_t                               n_written_ = 0, max_tokens_ = -1;
    std::unique_ptr<es_loop_guard>        guard_; // or null
    std::chrono::steady_clock::time_point began_;
};
