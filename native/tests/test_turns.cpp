// What a turn adds to a stream, for every template that llama.cpp knows; and UTF-8 of models. Needs no model.
#include "turns.h"

#include "llama.h"
#include "utf8.h"

#include <cassert>
#include <cstdio>

namespace {

void templates_of_llama_cpp() {
    const char *  known[256];
    const int32_t n_known = llama_chat_builtin_templates(known, 256);
    int           n       = 0;
    for (int32_t i = 0; i < n_known; ++i) {
        es_turns       turns;
        es_turns::turn first, next;
        if (turns.init(known[i], "SYSTEM") == ES_OK && turns.first("MESSAGE", first) == ES_OK &&
            turns.next("MESSAGE", next) == ES_OK) {
            n++;
            assert(first.message.find("MESSAGE") != std::string::npos);
            assert(next.message.find("MESSAGE") != std::string::npos);
            assert(next.message.find("SYSTEM") == std::string::npos &&
                   next.answer.find("MESSAGE") == std::string::npos);
        }
    }
    assert(n > 40);
    es_turns       turns;
    es_turns::turn t;
    assert(ES_OK == turns.init("chatml", "Be brief."));
    assert(turns.head() == "<|im_start|>system\nBe brief.<|im_end|>\n" && turns.closing() == "<|im_end|>\n");
    assert(ES_OK == turns.next("Hi", t));
    assert(t.message == "<|im_start|>user\nHi<|im_end|>\n" && t.answer == "<|im_start|>assistant\n");
}

void utf8() {
    assert(es_utf8_valid("a\xc3\xa9\xf0\x9f\x98\x80") == "a\xc3\xa9\xf0\x9f\x98\x80");
    assert(es_utf8_valid("\xff\xe2\x82z") == "\xef\xbf\xbd\xef\xbf\xbdz");
    assert(es_utf8_valid("\xed\xa0\x80") == "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"); // a surrogate
    assert(es_utf8_complete("ab\xf0\x9f\x98") == 2 && es_utf8_complete("\xc3\xa9") == 2 && es_utf8_complete("") == 0);
}

} // namespace

int main() {
    templates_of_llama_cpp();
    utf8();
    printf("ok\n");
    return 0;
}
