// What the server does at once, over the C API as it does: one thread decodes for several streams and samples, one
// writes snapshots to disk, others read requests with the same chat template, tokenize, and make samplers from rules.
// Says little by itself; it is for the thread sanitizer. argv[1]: the model.
#include "edge_stream_chat.h"

#include <atomic>
#include <cassert>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

constexpr int N_STREAMS = 3, N_READERS = 3, N_STEPS = 150;

llama_model *     model;
es_chat *         chat;
std::atomic<bool> done{ false };
std::atomic<int>  n_requests{ 0 };

// A snapshot goes from the thread that decodes to the one that writes.
std::mutex              mutex;
std::condition_variable changed;
es_snapshot *           waiting = nullptr;

void decode() {
    llama_context_params p = llama_context_default_params();
    p.n_ctx                = 64 * N_STREAMS;
    p.n_batch = p.n_ubatch = 64;
    p.n_seq_max            = N_STREAMS;
    p.swa_full             = true;
    p.n_threads = p.n_threads_batch = 2;
    llama_context * ctx             = es_context_init(model, p);
    assert(ctx);
    es_stream *  streams[N_STREAMS];
    es_sampler * samplers[N_STREAMS];
    llama_token  tokens[N_STREAMS];
    for (int i = 0; i < N_STREAMS; ++i) {
        es_stream_params sp = es_stream_default_params();
        sp.seq_id           = i;
        assert(es_stream_init(ctx, sp, &streams[i]) == ES_OK);
        const llama_token prompt[] = { 1, 300, 301, 302, 303, 304 };
        assert(es_stream_feed(streams[i], prompt, 6, nullptr, nullptr) == ES_OK);
        es_sampler_params rules = es_sampler_default_params();
        rules.seed              = (uint32_t) i;
        rules.grammar           = i == 0 ? "root ::= [a-z ]*" : nullptr;
        assert(es_sampler_init(model, rules, &samplers[i]) == ES_OK);
    }
    for (int step = 0; step < N_STEPS; ++step) {
        for (int i = 0; i < N_STREAMS; ++i) {
            assert(es_sampler_sample(samplers[i], streams[i], &tokens[i], nullptr) == ES_OK);
        }
        assert(es_streams_feed(streams, tokens, N_STREAMS) == ES_OK);
        if (step % 10 == 0) {
            es_snapshot *     s    = nullptr;
            es_stream * const from = streams[step / 10 % N_STREAMS];
            assert(es_snapshot_init(from, nullptr, GGML_TYPE_F16, GGML_TYPE_F16, "user", 4, &s) == ES_OK);
            std::lock_guard<std::mutex> lock(mutex);
            es_snapshot_free(waiting);
            waiting = s;
            changed.notify_one();
        }
    }
    for (int i = 0; i < N_STREAMS; ++i) {
        es_sampler_free(samplers[i]);
        es_stream_free(streams[i]);
    }
    llama_free(ctx);
    std::lock_guard<std::mutex> lock(mutex);
    done = true;
    changed.notify_one();
}

void write_snapshots() {
    const std::string path = "test_threads-" + std::to_string(getpid()) + ".session";
    for (;;) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [] { return waiting || done; });
        es_snapshot * mine = waiting;
        waiting            = nullptr;
        lock.unlock();
        if (!mine) {
            break;
        }
        assert(es_snapshot_write(mine, path.c_str()) == ES_OK);
        es_snapshot_free(mine);
        es_session_info info;
        assert(es_session_peek(path.c_str(), &info, nullptr, 0) == ES_OK);
    }
    remove(path.c_str());
}

void read_requests(int me) {
    const std::string name = "reader " + std::to_string(me);
    do {
        const std::string request = "{\"messages\": [{\"role\": \"user\", \"content\": \"" + name + "\"}]}";
        es_chat_request * r       = nullptr;
        const char *      text    = nullptr;
        assert(es_chat_request_init(chat, request.c_str(), &r) == ES_OK);
        assert(es_chat_request_prompt(r, &text) == ES_OK && strstr(text, name.c_str()));
        std::vector<llama_token> tokens(1024);
        const llama_vocab *      vocab = llama_model_get_vocab(model);
        assert(llama_tokenize(vocab, text, (int32_t) strlen(text), tokens.data(), 1024, true, true) > 0);
        es_chat_request_free(r);

        // one that is refused: the reason is this thread's
        r = nullptr;
        assert(es_chat_request_init(chat, ("{\"messages\": \"" + name + "\"}").c_str(), &r) != ES_OK && !r);
        assert(es_last_error()[0] != 0);

        es_sampler_params rules   = es_sampler_default_params();
        const std::string grammar = "root ::= \"" + name + "\" [0-9]+";
        rules.grammar             = grammar.c_str();
        es_sampler * s            = nullptr;
        assert(es_sampler_init(model, rules, &s) == ES_OK);
        es_sampler_free(s);
        rules.grammar = "root ::= (";
        s             = nullptr;
        assert(es_sampler_init(model, rules, &s) != ES_OK && !s);

        char reason[256];
        assert(es_model_can_stream(model, reason, sizeof(reason)));
        ++n_requests;
    } while (!done);
}

} // namespace

int main(int argc, char ** argv) {
    assert(argc == 2);
    es_log_set(false);
    llama_backend_init();
    model = es_model_load(argv[1], llama_model_default_params());
    assert(model);
    assert(es_chat_init(model, "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>",
                        &chat) == ES_OK);
    std::vector<std::thread> threads;
    threads.emplace_back(decode);
    threads.emplace_back(write_snapshots);
    for (int i = 0; i < N_READERS; ++i) {
        threads.emplace_back(read_requests, i);
    }
    for (std::thread & t : threads) {
        t.join();
    }
    es_chat_free(chat);
    llama_model_free(model);
    llama_backend_free();
    printf("%d requests beside %d tokens of each of %d streams\n", n_requests.load(), N_STEPS, N_STREAMS);
    return 0;
}
