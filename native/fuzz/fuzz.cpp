#include "fuzz.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sys/time.h>
#include <unistd.h>

namespace {

struct folder {
    std::filesystem::path path;
    folder() {
        const std::filesystem::path base = std::filesystem::exists("/dev/shm") ? "/dev/shm" : "/tmp";
        path                             = base / ("edge-stream-fuzz-" + std::to_string(getpid()));
        std::filesystem::create_directories(path);
    }
    ~folder() { std::filesystem::remove_all(path); }
};

void write(const std::filesystem::path & path, const void * data, size_t size) {
    FILE * f = fopen(path.c_str(), "wb");
    if (!f || (size && fwrite(data, 1, size, f) != size) || fclose(f) != 0) {
        perror(path.c_str());
        exit(2);
    }
}

} // namespace

std::string fuzz_path(const char * name) {
    static const folder own;
    return (own.path / name).string();
}

std::string fuzz_file(const char * name, const uint8_t * data, size_t size) {
    const std::string path = fuzz_path(name);
    write(path, data, size);
    return path;
}

std::string fuzz_read(const std::string & path) {
    std::ifstream in(path, std::ios::binary);
    return { std::istreambuf_iterator<char>(in), {} };
}

uint32_t fuzz_crc(uint32_t crc, const void * data, size_t n) {
    crc = ~crc;
    for (size_t i = 0; i < n; ++i) {
        crc ^= ((const uint8_t *) data)[i];
        for (int k = 0; k < 8; ++k) {
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    return ~crc;
}

fuzz_watch::fuzz_watch() {
    signal(SIGPROF, [](int) {
        static const char text[] = "10 s of CPU time\n";
        (void) !::write(2, text, sizeof(text) - 1);
        abort();
    });
    const itimerval ten = { {}, { 10, 0 } };
    setitimer(ITIMER_PROF, &ten, nullptr);
}

fuzz_watch::~fuzz_watch() {
    const itimerval none = {};
    setitimer(ITIMER_PROF, &none, nullptr);
}

llama_model * fuzz_model() {
    static llama_model * model = [] {
        es_log_set(false);
        llama_backend_init();
        llama_model_params p = llama_model_default_params();
        p.load_mode          = LLAMA_LOAD_MODE_NONE;
        llama_model * loaded = llama_model_load_from_file(ES_FUZZ_MODEL, p);
        if (!loaded) {
            fprintf(stderr, "cannot load %s: %s\n", ES_FUZZ_MODEL, es_log_last_error());
            exit(2);
        }
        return loaded;
    }();
    return model;
}

llama_context * fuzz_context() {
    static llama_context * ctx = [] {
        llama_context_params p = llama_context_default_params();
        p.n_ctx                = 64;
        p.n_batch = p.n_ubatch = 32;
        p.kv_unified           = true;
        p.swa_full             = true;
        p.type_k = p.type_v = GGML_TYPE_F32;
        p.flash_attn_type   = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        p.n_threads = p.n_threads_batch = 1;
        return llama_init_from_model(fuzz_model(), p);
    }();
    return ctx;
}

void fuzz_seed(const std::string & name, const std::string & bytes) {
    const std::filesystem::path to = getenv("ES_FUZZ_SEEDS");
    std::filesystem::create_directories(to);
    write(to / name, bytes.data(), bytes.size());
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    if (getenv("ES_FUZZ_SEEDS")) {
        fuzz_seeds();
        std::error_code ignored;
        std::filesystem::remove_all(std::filesystem::path(fuzz_path("x")).parent_path(), ignored);
        _exit(0);
    }
    return 0;
}

// llama.cpp's common.cpp takes the address of this one where nothing comes: see CMakeLists.txt.
void common_log_default_callback(ggml_log_level, const char *, void *) {}
