// The app facade over a real (tiny) model: a conversation of 10,000 tokens and everything an app does with one, so that
// the sanitizers see every path. argv[1]: the model, which has no chat template of its own.
#include "edge_stream_app.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

// with an end of turn that is a token of the model
const char *   chat_template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '</s>' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}";
const char *   model_path;
es_app_model * model;

void ok(int32_t rc) {
    if (rc != ES_OK) {
        fprintf(stderr, "%s: %s\n", es_status_name(rc), es_last_error());
    }
    assert(rc == ES_OK);
}

bool says(const char * part) {
    return strstr(es_last_error(), part) != nullptr;
}

es_app_session_params small(bool chat = true) {
    es_app_session_params p = es_app_session_default_params();
    p.n_ctx                 = 256;
    p.n_batch               = 64;
    p.n_threads             = 1;
    p.chat                  = chat;
    p.chat_template         = chat_template;
    p.system                = chat ? "Be brief." : nullptr;
    return p;
}

// No token whose bytes are no text: these are read again with the next turn, as U+FFFD.
std::vector<es_logit_bias> texts_only() {
    std::vector<es_logit_bias> out;
    es_app_model_info          info;
    ok(es_app_model_get_info(model, &info));
    for (int32_t token = 0; token < (int32_t) info.n_vocab; ++token) {
        char          bytes[16];
        const int32_t n = es_app_token_bytes(model, token, bytes, sizeof(bytes));
        if (n < 1 || n > 16 || !std::all_of(bytes, bytes + n, [](unsigned char c) { return c >= ' ' && c < 127; })) {
            out.push_back({ token, -INFINITY });
        }
    }
    return out;
}

es_app_answer_params seeded(int64_t max_tokens, uint32_t seed = 7) {
    static const std::vector<es_logit_bias> bias = texts_only();
    es_app_answer_params                    p    = es_app_answer_default_params();
    p.sampling.logit_bias                        = bias.data();
    p.sampling.n_logit_bias                      = bias.size();
    p.sampling.seed                              = seed;
    p.max_tokens                                 = max_tokens;
    p.ignore_eos                                 = true;
    return p;
}

struct session {
    es_app_session * s = nullptr;
    explicit session(const es_app_session_params & p = small()) { ok(es_app_session_open(model, p, &s)); }
    session(const std::string & path, const es_app_session_params & p) {
        ok(es_app_session_restore(model, p, path.c_str(), &s));
    }
    session(const session &) = delete;
    ~session() { es_app_session_free(s); }

    std::string write() {
        std::string text;
        ok(es_app_generate(
            s,
            [](void * user, const es_app_token * t) {
                ((std::string *) user)->append(t->bytes, t->n_bytes);
                return true;
            },
            &text));
        return text;
    }
    std::string say(const std::string & text, int64_t n, uint32_t seed = 7) {
        ok(es_app_say(s, text.c_str(), seeded(n, seed), nullptr, nullptr));
        return write();
    }
    es_stream_stats stats() const {
        es_stream_stats out;
        ok(es_app_session_stats(s, &out));
        return out;
    }
    std::vector<std::string> transcript() const {
        std::vector<std::string> out;
        es_app_message           m;
        for (size_t i = 0; i < es_app_message_count(s); ++i) {
            ok(es_app_message_get(s, i, &m));
            out.push_back(std::string(m.role) + ": " + std::string(m.text, m.n_text));
        }
        return out;
    }
};

// Many times the cache; then saved, restored, and both go on alike; then the last answer again.
void ten_thousand_tokens(const std::string & path) {
    es_app_session_params p = small();
    p.cache_type_k = p.cache_type_v = "f32"; // float16 is rounded differently where cells are in another order
    session a(p);
    while (a.stats().n_past < 10000) {
        a.say("Tell me more about the sea, the sky and everything in between.", 200);
    }
    const es_stream_stats st = a.stats();
    assert(st.n_evicted > 9000 && st.n_sinks + st.n_window <= 256 && st.n_rebases > 0);
    assert(st.n_keep > 4); // the system prompt is pinned
    ok(es_app_session_save(a.s, path.c_str()));
    session b(path, p);
    assert(a.transcript() == b.transcript() && b.transcript().size() > 60);
    assert(a.stats().n_past == b.stats().n_past);
    assert(a.say("And then?", 50) == b.say("And then?", 50));

    es_app_session_info info;
    ok(es_app_session_peek(path.c_str(), &info));
    assert(info.n_ctx == 256 && info.n_past == st.n_past && info.n_messages == b.transcript().size() - 2);

    const auto    before = a.transcript();
    const int64_t n_past = a.stats().n_past;
    ok(es_app_regenerate(a.s, seeded(50, 8)));
    assert(es_app_message_count(a.s) == before.size() - 1);
    a.write();
    assert(a.transcript().size() == before.size() && a.stats().n_past == n_past);
    assert(a.transcript().back() != before.back());

    // an answer longer than the window: it can be taken back by reading the newest turns again only
    a.say("A long one, please.", 400);
    ok(es_app_regenerate(a.s, seeded(10)));
    a.write();
    assert(a.stats().n_past < 400); // not 10,000: a new stream
    ok(es_app_session_clear(a.s));
    assert(a.stats().n_past == 0 && es_app_message_count(a.s) == 0);
    session c(p);
    assert(a.say("Hello", 20, 11) == c.say("Hello", 20, 11)); // as new
}

void stops() {
    session a, b;
    a.say("Hello", 20);
    b.say("Hello", 20);

    // while reading: the conversation is as before
    const std::string long_text(2000, 'x');
    const int64_t     n_past = a.stats().n_past;
    const auto        before = a.transcript();
    const auto        never  = [](void *, uint64_t, uint64_t) { return false; };
    assert(es_app_say(a.s, long_text.c_str(), seeded(5), never, nullptr) == ES_ERR_STOPPED);
    assert(a.transcript() == before && a.stats().n_past == n_past);
    assert(a.say("Go on", 30) == b.say("Go on", 30));
    // the same after the window slid
    const auto second = [](void *, uint64_t done, uint64_t) { return done < 300; };
    assert(es_app_say(a.s, long_text.c_str(), seeded(5), second, nullptr) == ES_ERR_STOPPED);
    assert(a.transcript().size() == 4);
    a.say("Go on", 5);

    // while writing: by the callback, by the flag, and by saying something else
    ok(es_app_say(b.s, "Count", seeded(-1), nullptr, nullptr));
    es_app_token token;
    for (int i = 0; i < 300; ++i) { // beyond the cache
        ok(es_app_next(b.s, &token));
        assert(token.finish == ES_APP_UNFINISHED && token.token >= 0);
    }
    assert(es_app_session_save(b.s, "/dev/null") == ES_ERR_INVALID && says("open"));
    const int64_t at = b.stats().n_past;
    std::thread([&] { es_app_stop(b.s); }).join();
    ok(es_app_next(b.s, &token));
    assert(token.finish == ES_APP_STOPPED && token.token == -1 && token.n_past == at);
    assert(b.transcript().size() == 6);
    assert(es_app_next(b.s, &token) == ES_ERR_INVALID);
    ok(es_app_end(b.s));
    ok(es_app_say(b.s, "One", seeded(-1), nullptr, nullptr));
    ok(es_app_next(b.s, &token));
    b.say("Two", 3);
    assert(b.transcript().size() == 10);
    ok(es_app_say(b.s, "Three", seeded(-1), nullptr, nullptr));
    ok(es_app_generate(b.s, [](void *, const es_app_token *) { return false; }, nullptr));
    assert(b.transcript().size() == 12);
    b.say("Nothing", 0);
    assert(b.transcript().back() == "assistant: ");
}

void plain_stream(const std::string & path) {
    const auto write = [](session & s, int64_t n) {
        ok(es_app_begin(s.s, seeded(n)));
        return s.write();
    };
    es_app_session_params p = small(false);
    session               a(p);
    assert(es_app_say(a.s, "Hello", seeded(1), nullptr, nullptr) == ES_ERR_INVALID && says("plain"));
    ok(es_app_feed(a.s, std::string(3000, 'y').c_str(), false, nullptr, nullptr));
    assert(a.stats().n_past == 3001 && a.stats().n_keep == 4); // BOS
    write(a, 500);
    ok(es_app_session_save(a.s, path.c_str()));
    es_app_session * b = nullptr;
    assert(es_app_session_restore(model, small(), path.c_str(), &b) == ES_ERR_FORMAT && says("not of a conversation"));
    ok(es_app_session_restore(model, p, path.c_str(), &b));
    session c(p);
    es_app_session_free(c.s);
    c.s = b;
    assert(write(a, 100) == write(c, 100));
    p.cache_type_k = "f32";
    assert(es_app_session_restore(model, p, path.c_str(), &b) == ES_ERR_MODEL && says("cache types") && !b);
    p.cache_type_k = "f17";
    assert(es_app_session_open(model, p, &b) == ES_ERR_INVALID && says("f17"));
}

// An answer that repeats itself ends in a conversation, and in a plain stream if that is asked for. One period stays.
void loops() {
    const std::string cycle = "xyzXYZ"; // a token per letter
    const size_t      bound = 384 + 4 * cycle.size();

    es_app_answer_params p = seeded(1000);
    p.sampling.grammar     = "root ::= \"abc\" (\"xyzXYZ\")+";

    session chat;
    ok(es_app_say(chat.s, "Hello", p, nullptr, nullptr));
    const int64_t before = chat.stats().n_past;
    es_app_token  token  = {};
    std::string   shown;
    while (token.finish == ES_APP_UNFINISHED) {
        ok(es_app_next(chat.s, &token));
        shown.append(token.bytes, token.n_bytes);
    }
    assert(token.finish == ES_APP_REPETITION && shown.size() == 3 + bound);
    assert(token.loop.period == cycle.size() && token.loop.n_tokens == bound);
    // the cache is smaller than the loop: what is left of it in the window, and ends with a period
    const std::string kept = chat.transcript()[1];
    assert(kept.size() > cycle.size() && kept.size() < shown.size() - 150);
    assert(kept.compare(kept.size() - cycle.size(), cycle.size(), cycle) == 0);
    assert(token.n_past - before == (int64_t) (kept.size() - strlen("assistant: ")));

    p.loop_guard = 0;
    p.max_tokens = (int64_t) bound + 10;
    ok(es_app_say(chat.s, "Hello", p, nullptr, nullptr));
    assert(chat.write().size() == bound + 10);

    p.loop_guard                = -1;
    es_app_session_params large = small(false);
    large.n_ctx                 = 1024;
    session plain(large);
    for (int i = 0; i < 2; ++i) {
        ok(es_app_session_clear(plain.s));
        ok(es_app_feed(plain.s, "Hello", true, nullptr, nullptr));
        const int64_t n_past = plain.stats().n_past;
        ok(es_app_begin(plain.s, p));
        assert(plain.write().size() == (i == 0 ? bound + 10 : bound + 3));
        assert(plain.stats().n_past - n_past == (int64_t) (i == 0 ? bound + 10 : cycle.size() + 3));
        p.loop_guard = 1;
    }
    ok(es_app_begin(plain.s, seeded(5))); // there are logits to go on from
    plain.write();
}

// Two sessions of one model on two threads say what each says alone.
void side_by_side() {
    std::string alone[2], together[2];
    for (int i = 0; i < 2; ++i) {
        alone[i] = session().say(i ? "Left" : "Right", 400, (uint32_t) i);
    }
    std::thread threads[2];
    for (int i = 0; i < 2; ++i) {
        threads[i] = std::thread([&, i] { together[i] = session().say(i ? "Left" : "Right", 400, (uint32_t) i); });
    }
    for (auto & t : threads) {
        t.join();
    }
    assert(alone[0] == together[0] && alone[1] == together[1] && alone[0] != alone[1]);
}

void memory_is_known_before() {
    es_app_memory         one, two;
    es_app_session_params p = small();
    ok(es_app_memory_need(model_path, es_app_model_default_params(), p, &one));
    // 2 layers of 2 heads of 64 in float16, keys and values; 12 pinned tokens or more
    assert(one.n_ctx == 256 && one.cache == 256ull * 2 * 2 * 2 * 64 * 2);
    assert(one.n_keep > 4 && one.sinks == one.n_keep * 2ull * 2 * 64 * 4);
    es_app_model_info info;
    ok(es_app_model_get_info(model, &info));
    assert(one.weights >= info.n_bytes && one.compute > 0);
    assert(one.total == one.weights + one.cache + one.sinks + one.compute);
    p.n_ctx        = 1024;
    p.cache_type_k = "q8_0";
    ok(es_app_memory_need(model_path, es_app_model_default_params(), p, &two));
    assert(two.cache < 4 * one.cache && two.cache > 2 * one.cache && two.weights == one.weights);
    assert(es_app_memory_need("/does/not/exist", es_app_model_default_params(), p, &two) == ES_ERR_IO);
}

void refusals() {
    char                  reason[256];
    es_app_session_params p = small();
    es_app_session *      s = nullptr;
    assert(es_app_model_can_chat(model, nullptr, reason, sizeof(reason)) && strstr(reason, "ChatML is used"));
    assert(!es_app_model_can_chat(model, "pigeon", reason, sizeof(reason)) && strstr(reason, "pigeon"));
    assert(!es_app_model_can_chat(model, "{% for %}", reason, sizeof(reason)) && *reason);
    assert(es_app_model_can_chat(model, "llama3", reason, sizeof(reason)) && !*reason);
    p.chat_template = "{% for %}";
    assert(es_app_session_open(model, p, &s) == ES_ERR_INVALID && !s);
    for (const char * hostile :
         { "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}{{ 1 }}",
           "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s "
           "%}{% endfor %}{{ ns.s }}" }) {
        p.chat_template = hostile;
        assert(es_app_session_open(model, p, &s) == ES_ERR_INVALID && says("was stopped") && !s);
        assert(!es_app_model_can_chat(model, hostile, reason, sizeof(reason)) && strstr(reason, "was stopped"));
    }
    p       = small();
    p.tools = "[{]";
    assert(es_app_session_open(model, p, &s) == ES_ERR_INVALID && says("JSON") && !s);
    p.tools = R"([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}])";
    assert(es_app_session_open(model, p, &s) == ES_ERR_INVALID && says("pinned") && !s); // they are, in 256 tokens
    p.n_ctx = 4096;
    ok(es_app_session_open(model, p, &s));
    es_stream_stats stats;
    ok(es_app_session_stats(s, &stats));
    assert(stats.n_keep > 200);
    es_app_session_free(s);
    s = nullptr;
    p = small();
    const std::string endless_prompt(1000, 'z');
    p.system = endless_prompt.c_str();
    assert(es_app_session_open(model, p, &s) == ES_ERR_INVALID && says("pinned"));
    es_app_model * m = nullptr;
    assert(es_app_model_load("/does/not/exist", es_app_model_default_params(), &m) == ES_ERR_IO && !m);
    assert(es_app_model_load("/dev/null", es_app_model_default_params(), &m) == ES_ERR_MEMORY && !m);
    es_app_model_params never = es_app_model_default_params();
    never.on_progress         = [](void *, uint64_t, uint64_t) { return false; };
    assert(es_app_model_load(model_path, never, &m) == ES_ERR_STOPPED && !m);
    assert(es_app_session_restore(model, small(), "/does/not/exist", &s) == ES_ERR_IO && !s);

    es_app_token token;
    assert(es_app_say(nullptr, "x", seeded(1), nullptr, nullptr) == ES_ERR_INVALID);
    assert(es_app_next(nullptr, &token) == ES_ERR_INVALID && es_app_end(nullptr) == ES_ERR_INVALID);
    assert(es_app_session_save(nullptr, "x") == ES_ERR_INVALID && es_app_message_count(nullptr) == 0);
    assert(es_app_tokenize(nullptr, "x", false, false, nullptr, 0) == -1);
    assert(es_app_token_bytes(model, 1 << 30, nullptr, 0) == -1);
    es_app_stop(nullptr);
    es_app_session_free(nullptr);
    es_app_model_free(nullptr);

    session a;
    assert(es_app_regenerate(a.s, seeded(1)) == ES_ERR_INVALID && says("no answer"));
    es_app_answer_params bad = seeded(1);
    bad.sampling.grammar     = "root ::= (";
    assert(es_app_say(a.s, "Hello", bad, nullptr, nullptr) == ES_ERR_INVALID && says("grammar"));
    assert(a.transcript().empty() && es_app_next(a.s, &token) == ES_ERR_INVALID); // as before
    a.say("Hello", 5);
    assert(es_app_regenerate(a.s, bad) == ES_ERR_INVALID && a.transcript().size() == 2);
    assert(es_app_say_messages(a.s, "{}", seeded(1), nullptr, nullptr) == ES_ERR_INVALID);
    assert(es_app_say_messages(a.s, R"([{"role": "assistant", "content": "x"}])", seeded(1), nullptr, nullptr) ==
           ES_ERR_INVALID);
    assert(a.transcript().size() == 2);
}

// An answer that was cut goes on as if it had not been.
void goes_on(const std::string & path) {
    const auto greedy = [](int64_t n) {
        es_app_answer_params p = seeded(n);
        p.sampling.temp        = 0;
        p.sampling.grammar     = "root ::= [a-z ]*";
        return p;
    };
    session a, b;
    ok(es_app_say(a.s, "Hello", greedy(60), nullptr, nullptr));
    const std::string whole = a.write();
    ok(es_app_say(b.s, "Hello", greedy(20), nullptr, nullptr));
    const std::string part = b.write();
    ok(es_app_session_save(b.s, path.c_str()));
    session c(path, small());
    for (session * s : { &b, &c }) {
        ok(es_app_continue(s->s, greedy(40)));
        assert(part + s->write() == whole && s->transcript() == a.transcript());
    }
    es_app_answer_params p  = greedy(-1);
    p.sampling.n_logit_bias = 0; // it may end
    p.sampling.grammar      = "root ::= \"x\"";
    p.ignore_eos            = false;
    ok(es_app_say(b.s, "An x", p, nullptr, nullptr));
    assert(b.write() == "x");
    assert(es_app_continue(b.s, greedy(1)) == ES_ERR_INVALID && says("complete"));
}

// Thoughts are told from the text, kept in the transcript, and leave the stream as the template has it.
void thoughts(const std::string & path) {
    es_app_session_params params = small();
    params.chat_template =
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 "
        "%}"
        "{% endif %}{% endfor %}{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.role == 'assistant' and "
        "m.reasoning_content and loop.index0 > ns.last %}{{ '<think>\n' + m.reasoning_content|trim + '\n</think>\n\n' "
        "}}{% endif %}{{ m.content + '[end]\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% if "
        "enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}";
    es_app_answer_params p  = seeded(-1);
    p.sampling.n_logit_bias = 0; // it may end
    p.ignore_eos            = false;
    p.sampling.grammar      = "root ::= \"<think>\\nhm, well\\n</think>\\n\\nyes\"";
    const auto write        = [](session & s, std::string & thinking) {
        std::string  text;
        es_app_token token;
        do {
            ok(es_app_next(s.s, &token));
            (token.is_thinking ? thinking : text).append(token.bytes, token.n_bytes);
        } while (token.finish == ES_APP_UNFINISHED);
        assert(token.finish == ES_APP_EOS);
        return text;
    };
    session     a(params);
    std::string thinking;
    ok(es_app_say(a.s, "One?", p, nullptr, nullptr));
    assert(write(a, thinking) == "yes" && thinking == "hm, well\n");
    es_app_message m;
    ok(es_app_message_get(a.s, 1, &m));
    assert(std::string(m.text, m.n_text) == "yes" && std::string(m.thinking, m.n_thinking) == thinking);
    assert(!m.tool_calls);
    const int64_t n_thought = a.stats().n_past;
    ok(es_app_session_save(a.s, path.c_str()));
    es_app_session * restored = nullptr;
    ok(es_app_session_restore(model, params, path.c_str(), &restored));
    std::swap(a.s, restored);
    es_app_session_free(restored);
    p.sampling.grammar = "root ::= \"ok\"";
    ok(es_app_say_messages(a.s, R"([{"role": "tool", "content": "42"}, {"role": "user", "content": "So?"}])", p,
                           nullptr, nullptr));
    assert(write(a, thinking) == "ok" && a.transcript().size() == 5 && a.transcript()[2] == "tool: 42");
    assert(a.stats().n_past < n_thought + 50); // the thoughts made room for what was added

    params.thinking = 0;
    session b(params);
    ok(es_app_say(b.s, "One?", p, nullptr, nullptr));
    const int64_t with = b.stats().n_past;
    params.thinking    = -1;
    session c(params);
    ok(es_app_say(c.s, "One?", p, nullptr, nullptr));
    assert(with > c.stats().n_past + 10); // the template has closed its thoughts
}

void recalls(const std::string & path) {
    const std::string     log = path + ".log";
    es_app_session_params p   = small();
    es_app_recalled       found;
    {
        session a(p);
        ok(es_app_get_recalled(a.s, &found));
        assert(!found.text && es_app_forget(a.s, 0) == ES_ERR_INVALID && says("no log"));
        ok(es_app_use_log(a.s, log.c_str(), 0, 64));
        a.say("My friend Anna owns a blue kite.", 8);
        for (int i = 0; i < 20; ++i) {
            a.say("It is " + std::to_string(i) + " now.", 8);
        }
        ok(es_app_get_recalled(a.s, &found));
        assert(!found.text);
        a.say("What does my friend Anna own?", 8);
        ok(es_app_get_recalled(a.s, &found));
        assert(found.text == std::string("My friend Anna owns a blue kite.") && found.is_from_user);
        assert(found.message == 0 && found.when > 0 && found.coverage > 0.5);
        ok(es_app_session_save(a.s, path.c_str()));
        assert(es_app_use_log(a.s, "/nowhere/log", 0, 64) == ES_ERR_IO);
        a.say("Still there?", 8);
    }
    session b(path, p);
    ok(es_app_use_log(b.s, log.c_str(), 0, 64));
    ok(es_app_forget(b.s, 0));
    assert(es_app_forget(b.s, 0) == ES_ERR_INVALID && says("nothing of turn 0"));
    b.say("What does my friend Anna own?", 8);
    ok(es_app_get_recalled(b.s, &found));
    assert(!found.text);
    session plain(small(false));
    assert(es_app_use_log(plain.s, nullptr, 0, 64) == ES_ERR_INVALID && says("a plain stream"));
    remove(log.c_str());
}

void texts() {
    int32_t           tokens[64];
    char              bytes[16];
    const std::string text = "smile \xf0\x9f\x98\x80";
    const int64_t     n    = es_app_tokenize(model, text.c_str(), false, false, tokens, 64);
    std::string       back;
    assert(n > 4);
    for (int64_t i = 0; i < n; ++i) {
        back.append(bytes, (size_t) es_app_token_bytes(model, tokens[i], bytes, sizeof(bytes)));
    }
    assert(back == text);
    // a model may write a zero byte: the transcript keeps what follows it
    es_logit_bias     zeros = { -1, 1000.0f };
    es_app_model_info info;
    ok(es_app_model_get_info(model, &info));
    for (int32_t i = 0; i < (int32_t) info.n_vocab && zeros.token < 0; ++i) {
        zeros.token = es_app_token_bytes(model, i, bytes, sizeof(bytes)) == 1 && bytes[0] == 0 ? i : -1;
    }
    assert(zeros.token >= 0);
    es_app_answer_params p  = seeded(3);
    p.sampling.logit_bias   = &zeros;
    p.sampling.n_logit_bias = 1;
    session a;
    ok(es_app_say(a.s, "Hello", p, nullptr, nullptr));
    assert(a.write() == std::string(3, '\0') && a.transcript().back() == "assistant: " + std::string(3, '\0'));
    char digest[65];
    ok(es_app_file_sha256("/dev/null", nullptr, nullptr, digest));
    assert(strcmp(digest, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855") == 0); // of nothing
}

} // namespace

int main(int argc, char ** argv) {
    assert(argc == 2);
    model_path = argv[1];
    ok(es_app_model_load(model_path, es_app_model_default_params(), &model));
    const std::string path = "/tmp/es-test-app-" + std::to_string(getpid()) + ".session";
    texts();
    memory_is_known_before();
    refusals();
    stops();
    plain_stream(path);
    goes_on(path);
    thoughts(path);
    recalls(path);
    loops();
    side_by_side();
    ten_thousand_tokens(path);
    session survivor; // a model may go first
    es_app_model_free(model);
    survivor.say("Still here?", 10);
    unlink(path.c_str());
    printf("ok\n");
    return 0;
}
