// How long a client of the RPC backend waits: included by ggml-rpc/transport.cpp (native/patches/0004-rpc-lost.patch).
#pragma once

#include <cerrno>
#include <chrono>

#ifndef _WIN32
#include <sys/time.h>
#endif

// a closed connection is an error and no signal
#ifdef MSG_NOSIGNAL
#define ES_RPC_SEND_FLAGS MSG_NOSIGNAL
#else
#define ES_RPC_SEND_FLAGS 0
#endif

struct es_rpc_wait {
    static constexpr int seconds = 10;

    bool client = false;
    bool long_  = false; // the server computes
    int  silent = 0;     // halves of that time without a byte; two, since both sides may have been stopped for a while

    // A connection to a server: from now on silence ends it.
    void begin(sockfd_t fd) {
        client = true;
#ifdef _WIN32
        const DWORD t = 1000 * seconds / 2;
#else
        const timeval t = { seconds / 2, 0 };
#endif
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, (const char *) &t, sizeof(t));
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, (const char *) &t, sizeof(t));
#ifdef SO_NOSIGPIPE
        const int on = 1;
        setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof(on));
#endif
    }

    // recv or send failed. True: try again. between: no part of an answer has come yet.
    bool again(bool between) {
#ifdef _WIN32
        const bool silence = WSAGetLastError() == WSAETIMEDOUT;
#else
        if (errno == EINTR) {
            return true;
        }
        const bool silence = errno == EAGAIN || errno == EWOULDBLOCK;
#endif
        return client && silence && ((long_ && between) || ++silent < 2);
    }

    // n bytes have come after n_before others of the same piece. True: at this pace it would never be whole.
    bool too_slow(size_t n_before, size_t n) {
        const auto now = std::chrono::steady_clock::now();
        silent         = 0;
        if (n_before == 0) {
            since = now;
            long_ = false;
        }
        const double took = std::chrono::duration<double>(now - since).count();
        return client && took > seconds + (double) (n_before + n) / (64 << 10);
    }

private:
    std::chrono::steady_clock::time_point since;
};
