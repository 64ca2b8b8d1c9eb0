// The client side of the RPC backend: a server of which the input says when it lies. Each answer takes a byte of it:
// honest, other content, another length, cut short, or a closed connection. (One that is silent takes 10 s: the tests.)
#include "fuzz.h"

#include "ggml-rpc.h"

#include <arpa/inet.h>
#include <atomic>
#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

// ggml-rpc.cpp: commands with answers, and their lengths; an honest answer is its first number, then zeros
enum { ALLOC, ALIGNMENT, MAX_SIZE, BASE, FREE, CLEAR, SET, HASH, GET, COPY, GRAPH, MEMORY, INIT, SIZE, HELLO, COUNT };

class server {
public:
    server() : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
        sockaddr_in at     = {};
        at.sin_family      = AF_INET;
        at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t n        = sizeof(at);
        if (bind(fd_, (sockaddr *) &at, n) || listen(fd_, 8) || getsockname(fd_, (sockaddr *) &at, &n)) {
            perror("listen");
            exit(2);
        }
        port_ = ntohs(at.sin_port);
    }
    int port() const { return port_; }

    // Serves connections, one after the other, as `data` says.
    void serve(const uint8_t * data, size_t size) {
        data_ = data;
        left_ = size;
        while (!done_) {
            const int c  = accept(fd_, nullptr, nullptr);
            const int on = 1;
            setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)); // else an answer's second piece takes 40 ms
            while (c >= 0 && answer(c)) {}
            close(c);
        }
        done_ = false;
    }

    // Ends serve().
    void end() {
        done_              = true;
        const int   c      = socket(AF_INET, SOCK_STREAM, 0);
        sockaddr_in at     = {};
        at.sin_family      = AF_INET;
        at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        at.sin_port        = htons((uint16_t) port_);
        if (connect(c, (sockaddr *) &at, sizeof(at))) {
            perror("connect");
            exit(2);
        }
        close(c);
    }

private:
    int                  fd_, port_;
    std::atomic<bool>    done_{ false };
    const uint8_t *      data_ = nullptr;
    size_t               left_ = 0;
    std::vector<uint8_t> body_, out_;

    uint8_t byte() { return left_ ? (--left_, *data_++) : 0; }

    static bool get(int c, void * to, size_t n) {
        for (ssize_t got; n > 0; n -= (size_t) got, to = (char *) to + got) {
            if ((got = recv(c, to, n, 0)) <= 0) {
                return false;
            }
        }
        return true;
    }
    static bool put(int c, const void * from, size_t n) {
        for (ssize_t sent; n > 0; n -= (size_t) sent, from = (const char *) from + sent) {
            if ((sent = send(c, from, n, MSG_NOSIGNAL)) <= 0) {
                return false;
            }
        }
        return true;
    }
    uint64_t number(size_t at) const { // of the request, 0 beyond its end
        uint64_t n = 0;
        if (at + 8 <= body_.size()) {
            memcpy(&n, body_.data() + at, 8);
        }
        return n;
    }

    bool answer(int c) {
        uint8_t  cmd;
        uint64_t n;
        if (!get(c, &cmd, 1) || !get(c, &n, 8) || n > 64 << 20) {
            return false;
        }
        body_.resize(n);
        if (!get(c, body_.data(), n)) {
            return false;
        }
        size_t   length = 8;
        uint64_t first  = 0;
        switch (cmd) {
        case ALLOC: // device, size -> pointer, size
            length = 16;
            first  = 1;
            break;
        case ALIGNMENT: first = 64; break;
        case MAX_SIZE: first = 1 << 30; break;
        case BASE: first = (uint64_t) 1 << 32; break;
        case HASH:
        case COPY: length = 1; break;
        case GET: length = number(n - 8); break; // tensor, offset, size
        case MEMORY:
            length = 16;
            first  = 1 << 30;
            break;
        case SIZE: break;
        case HELLO:
            length = 4 + 24;
            first  = es_version;
            break;
        case COUNT:
            length = 4;
            first  = 1;
            break;
        default: return true; // no answer
        }
        out_.assign(length, 0);
        memcpy(out_.data(), &first, std::min<size_t>(length, 8));
        if (cmd == ALLOC || cmd == MEMORY) {
            const uint64_t second = cmd == ALLOC ? number(4) : first;
            memcpy(out_.data() + 8, &second, 8);
        }
        uint64_t      said = length, sent = length;
        bool          on  = true;
        const uint8_t how = byte();
        switch (how % 8) {
        case 4:
            for (size_t i = 0, at = how / 8; i < 8 && at + i < length; ++i) {
                out_[at + i] = byte();
            }
            break;
        case 5:
            for (int i = 0; i < 8; ++i) {
                said = said << 8 | byte();
            }
            break;
        case 6:
            sent = byte() % (length + 1);
            on   = false;
            break;
        case 7: return false;
        default: break;
        }
        return put(c, &said, 8) && put(c, out_.data(), sent) && on;
    }

    static constexpr uint64_t es_version = RPC_PROTO_MAJOR_VERSION | RPC_PROTO_MINOR_VERSION << 8;
};

} // namespace

void fuzz_seeds() {
    const char * seeds[] = { "", "\x04", "\x07", "aaaa\x04\x01",
                             "aaaaaaaaaaaaaaaa\x04\xff\xff\xff\xff\xff\xff\xff\xff" };
    fuzz_seed_each("rpc", seeds);
    for (int at = 1; at < 40; ++at) { // each answer in turn: a huge number, nothing, a cut
        const std::string before((size_t) at, 'a');
        fuzz_seed("huge-" + std::to_string(at), before + "\x04" + std::string(8, '\xff'));
        fuzz_seed("zero-" + std::to_string(at), before + "\x04" + std::string(8, '\0'));
        fuzz_seed("cut-" + std::to_string(at), before + "\x06\x05");
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const fuzz_watch watch;

    static server     own;
    static int        n_inputs   = 0;
    static const auto add_server = [] {
        es_log_set(false);
        llama_backend_init();
        const ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
        return (ggml_backend_reg_t(*)(const char *)) ggml_backend_reg_get_proc_address(reg,
                                                                                       "ggml_backend_rpc_add_server");
    }();
    // a name of its own for each: ggml keeps what it knows of a server. stoi reads the port.
    const std::string endpoint = "127.0.0.1:" + std::to_string(own.port()) + "#" + std::to_string(n_inputs++);
    std::thread       other([&] { own.serve(data, size); });
    if (const ggml_backend_reg_t reg = add_server(endpoint.c_str())) {
        ggml_backend_dev_t devices[] = { ggml_backend_reg_dev_get(reg, 0), nullptr };
        llama_model_params p         = llama_model_default_params();
        p.load_mode                  = LLAMA_LOAD_MODE_NONE;
        p.devices                    = devices;
        if (llama_model * model = es_model_load(ES_FUZZ_MODEL, p)) {
            llama_context_params cp = llama_context_default_params();
            cp.n_ctx                = 64;
            cp.n_batch = cp.n_ubatch = 32;
            cp.n_threads = cp.n_threads_batch = 1;
            if (llama_context * ctx = es_context_init(model, cp)) {
                es_stream * stream = nullptr;
                if (es_stream_init(ctx, es_stream_default_params(), &stream) == ES_OK) {
                    const llama_token tokens[] = { 1, 300, 301, 302, 303, 304, 305, 306 };
                    for (int i = 0; i < 10; ++i) { // beyond the end of the cache
                        if (es_stream_feed(stream, tokens, 8, nullptr, nullptr) != ES_OK) {
                            break;
                        }
                    }
                }
                es_stream_free(stream);
                llama_free(ctx);
            }
            llama_model_free(model);
        }
    }
    own.end();
    other.join();
    return 0;
}
