// Grammars (GBNF): parsed, and a few tokens drawn by them.
#include "chat.h"

void fuzz_seeds() {
    const char * grammars[] = {
        "root ::= (\"a\" | [b-d])+ end?\nend ::= \".\"{1,3} # comment\n",
        "root ::= object\nobject ::= \"{\" ws (pair (\",\" ws pair)*)? \"}\"\npair ::= str \":\" ws val\nval ::= str | "
        "object | [0-9]+\nstr ::= \"\\\"\" [^\"\\\\\\x7F\\x00-\\x1F]* \"\\\"\"\nws ::= [ \\t\\n]*\n",
        "root ::= .* \"\\u00e4\" [\\U0001F600-\\U0001F64F] | <[5]> !<[6]> \n",
    };
    fuzz_seed_each("grammar", grammars);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const fuzz_watch watch;

    static es_stream * stream = [] {
        es_stream *       made  = nullptr;
        const llama_token token = 1;
        assert(es_stream_init(fuzz_context(), es_stream_default_params(), &made) == ES_OK);
        assert(es_stream_feed(made, &token, 1, nullptr, nullptr) == ES_OK);
        return made;
    }();
    const std::string text((const char *) data, size);
    es_sampler_params p = es_sampler_default_params();
    p.seed              = 1;
    p.grammar           = text.c_str();
    es_sampler * s      = nullptr;
    if (es_sampler_init(fuzz_model(), p, &s) == ES_OK) {
        llama_token token = 0;
        for (int i = 0; i < 6 && es_sampler_sample(s, stream, &token, nullptr) == ES_OK && token != 2; ++i) {}
    }
    es_sampler_free(s);
    return 0;
}
