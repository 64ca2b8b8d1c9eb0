// Hostile chat templates are ended: in time, in memory, within a small stack. Needs no model.
#include "es-template-budget.h"

#include "chat.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json-schema-to-grammar.h"

#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <new>
#include <pthread.h>

//
// what the heap holds, to see that a template's end is one in memory
//

static size_t heap_live = 0, heap_peak = 0;

static constexpr size_t HEAD = alignof(std::max_align_t);

void * operator new(size_t n) {
    auto * block = (char *) malloc(n + HEAD);
    if (!block) {
        throw std::bad_alloc();
    }
    *(size_t *) block = n;
    heap_live += n;
    heap_peak = std::max(heap_peak, heap_live);
    return block + HEAD;
}

void * operator new(size_t n, const std::nothrow_t &) noexcept {
    try {
        return operator new(n);
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

void * operator new[](size_t n) {
    return operator new(n);
}

void operator delete(void * p) noexcept {
    if (p) {
        auto * block = (char *) p - HEAD;
        heap_live -= *(size_t *) block;
        free(block);
    }
}

void operator delete(void * p, size_t) noexcept {
    operator delete(p);
}

void operator delete(void * p, const std::nothrow_t &) noexcept {
    operator delete(p);
}

void operator delete[](void * p) noexcept {
    operator delete(p);
}

void operator delete[](void * p, size_t) noexcept {
    operator delete(p);
}

namespace {

constexpr char HI[] = R"([{"role": "user", "content": "hi"}])";

std::string render(const std::string & source, const std::string & messages = HI) {
    jinja::lexer         lexer;
    const jinja::program program = jinja::parse_from_tokens(lexer.tokenize(source));
    jinja::context       ctx(source);
    common_json          input = common_json::object();
    input["messages"]          = common_json::parse(messages);
    input["bos_token"]         = "<s>";
    jinja::global_from_json(ctx, input, true);
    const jinja::value results = jinja::runtime(ctx).execute(program);
    return jinja::runtime::gather_string_parts(results)->as_string().str();
}

// How it ends: "TIME", "SIZE", "DEPTH", "error: ...", or "ok" after it was done.
std::string ends(const std::function<void()> & work, size_t input, double seconds, size_t bytes) {
    const es_template_budget_scope scope(input, seconds, bytes);
    try {
        work();
        return "ok";
    } catch (const es_template_stop & stop) {
        const char * names[] = { "TIME", "SIZE", "DEPTH" };
        return names[stop.reason];
    } catch (const std::exception & error) {
        return std::string("error: ") + error.what();
    }
}

constexpr size_t MILLION = 1000000;

// The template ends as expected ("error" for any error), holding little, and leaving nothing behind.
void ends_as(const std::string & expected, const std::string & source, double seconds = 600, size_t bytes = MILLION,
             size_t most = 0) {
    const size_t before   = heap_live;
    heap_peak             = before;
    const std::string how = ends([&] { (void) render(source); }, 0, seconds, bytes);
    if (how.compare(0, expected.size(), expected) != 0) {
        fprintf(stderr, "%s, not %s: %.300s\n", how.c_str(), expected.c_str(), source.c_str());
        abort();
    }
    const size_t peak = heap_peak - before - how.capacity();
    if (getenv("ES_SHOW")) {
        fprintf(stderr, "%-6.6s peak %9zu  %.150s\n", how.c_str(), peak, source.c_str());
    }
    assert(peak < (most ? most : 4 * bytes) + 200 * source.size());
}

std::string times(size_t n, const std::string & text) {
    std::string all;
    for (size_t i = 0; i < n; ++i) {
        all += text;
    }
    return all;
}

std::string doubling(const std::string & expression, const std::string & start = "'aaaaaaaa'") {
    return "{% set ns = namespace(s=" + start + ") %}{% for i in range(64) %}{% set ns.s = " + expression +
           " %}{% endfor %}";
}

void honest() {
    const es_template_budget_scope scope(1000);
    assert(render("{%- for m in messages %}\n  {% if m.tool is not defined %}\n{{ m.content|trim }}|"
                  "{{ m['role'].upper() }}\n  {% endif %}\n{% endfor %}") == "hi|USER\n");
    assert(render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01");
    assert(render("{{ {'a': 1}|tojson(indent=2) }}{{ 'x' * 3 }}") == "{\n  \"a\": 1\n}xxx");
    assert(render("{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f(1, y=3) }}") == "[12][13]");
    assert(render("{{ [3, 1, 2]|sort|join(' ') }} {{ nothing|default(value='none') }}") == "1 2 3 none");
    assert(render("{% set a = [] %}{% set _ = a.append(1) %}{{ a|length }}{{ 6 is divisibleby 3 }}") == "1True");
    assert(render(times(40, "{% if true %}") + "x" + times(40, "{% endif %}")) == "x");
    assert(render("{{ " + times(20, "(") + "1" + times(20, ")") + " }}") == "1");
    assert(render("{{ 'a'" + times(200, " ~ 'b'") + " }}") == "a" + times(200, "b"));
    assert(render("{% if false %}" + times(100, "{% elif false %}") + "{% else %}x{% endif %}") == "x");
    // values that hold each other may be used as others are
    assert(render("{% set a = namespace(n=1) %}{% set a.me = a %}{{ a.me.me.n }}") == "1");
}

void endless() {
    const std::string loop = "{% for i in range(900) %}", end = "{% endfor %}";
    const auto        never = [](const std::string & source, double seconds = 0.1) {
        ends_as("TIME", source, seconds, MILLION * MILLION, 100 * MILLION);
    };
    never(loop + loop + loop + end + end + end);
    never(loop + loop + loop + "{% set x = i %}" + end + end + end);
    never(loop + loop + loop + "{% continue %}" + end + end + end);
    never(times(10000, "{{ range(900)|map(attribute='x')|list|length }}"));
    never("{% set l = range(3000)|list %}" + times(1000, "{{ l|select('in', l)|length }}"));
    never(times(1000, "{{ range(3000)|list|sort|length }}"));
    never("{% set s = 'a' * 300000 %}" + loop + loop + "{{ s in s }}" + end + end);
    never("{% set s = 'a' * 300000 %}{% set l = [s, s, s, s] %}" + loop + loop + "{{ l == l }}{{ l|sort|length }}" +
          end + end);
    never("{{ ('ab' * 300000).split('a')|length }}");
    // a value that holds the one before it twice
    never(doubling("(ns.s, ns.s)", "(1, 2)") + "{{ ns.s == ns.s }}");
    never(doubling("(ns.s, ns.s)", "(1, 2)") + "{{ {ns.s: 1} }}");
    never(doubling("[ns.s, ns.s]", "[]") + "{{ ns.s }}");
    // the source itself
    never(times(MILLION, "\r\n"), 0.02);
    never(times(MILLION, "{{a}}"), 0.02);
}

void building() {
    for (const char * much : {
             "{% for i in range(1000000000) %}{% endfor %}",
             "{{ range(9223372036854775807)|length }}",
             "{{ range(0, -9223372036854775807, -1)|length }}",
             "{{ range(1, 9223372036854775807, 4611686018427387904)|length }}{{ range(1000000000) }}",
             "{% for i in range(3000) %}{{ 'x' * 1000 }}{% endfor %}",
             "{% set x %}{% for i in range(3000) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
             "{% filter upper %}{% for i in range(3000) %}{{ 'x' * 1000 }}{% endfor %}{% endfilter %}",
             "{{ 'a' * 1000000000 }}",
             "{{ 1000000000 * 'a' }}",
             "{{ '' * 1000000000000000000 }}",
             "{% set x %}{% endset %}{{ x * 1000000000000000000 }}",
             "{{ 'a'|indent(1000000000) }}",
             "{{ 'a\nb\nc'|indent('x' * 400000) }}",
             "{{ {'a': 1}|tojson(indent=1000000000) }}",
             "{{ {'a': 1}|tojson(indent=2147483647) }}",
             "{{ range(1000)|list|tojson(separators=['x' * 10000, ':']) }}",
             "{{ range(1000)|join('x' * 10000) }}",
             "{{ 'a'.replace('', 'b' * 900000) }}{{ ('a' * 10000).replace('', 'b' * 10000) }}",
             "{{ ('a' * 3000).replace('a', ['b' * 1000]|join) }}",
             "{{ [0][::-9223372036854775808] }}",
             "{{ 'a'[::-9223372036854775808] }}",
             "{% set ns = namespace(l=[]) %}{% for i in range(2000) %}{% for j in range(2000) %}"
             "{% set _ = ns.l.append(i) %}{% endfor %}{% endfor %}",
             "{% set l = range(2000)|list %}{% set ns = namespace(l=[]) %}{% for i in range(2000) %}"
             "{% set _ = ns.l.append(l|reverse) %}{% endfor %}",
             "{% set ns = namespace(l=[]) %}{% for i in range(2000) %}{% set _ = ns.l.append('x' * 1000) %}{% endfor "
             "%}",
         }) {
        ends_as("SIZE", much);
    }
    // searches for long text in long text
    for (const char * search : { "b in a", "a.split(b)", "a.rsplit(b)", "a.replace(b, '')", "a.strip(b)" }) {
        ends_as("SIZE", std::string("{% set k = ['a' * 1000]|join %}{% set a = [k * 100]|join %}{% set b = "
                                    "[k * 50, 'b']|join %}{{ ") +
                            search + " }}");
    }
    for (const char * twice : {
             "ns.s ~ ns.s",
             "ns.s + ns.s",
             "ns.s * 2",
             "[ns.s, ns.s]|join",
             "ns.s|replace('a', ns.s)",
             "ns.s.replace('a', ns.s)",
             "'{}{}'.format(ns.s, ns.s)",
             "[ns.s, ns.s]|tojson",
             "[ns.s, ns.s]|string",
         }) {
        ends_as("SIZE", doubling(twice));
    }
    ends_as("SIZE", doubling("ns.s + ns.s", "[1]"));
    ends_as("SIZE", doubling("[ns.s, ns.s]", "[1]") + "{{ ns.s|tojson }}");
    ends_as("SIZE", doubling("[ns.s, ns.s]", "[1]") + "{{ ns.s|string }}");
    ends_as("SIZE",
            "{% set ns = namespace(s=(1, 2)) %}{% for i in range(17) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}"
            "{{ {ns.s: 1} }}");
    ends_as("SIZE", "{{ '" + times(1000, "{}") + "'.format(" + times(1000, "messages|tojson * 100,") + ") }}");
    ends_as("SIZE", "{% set s = 'a' * 90000 %}{{ '" + times(100, "{}") + "'.format(" + times(100, "s,") + ") }}");
}

void deep() {
    const size_t n = 20000;
    for (const char * part : { "(", "[", "{1:", "not ", "(-", "f(", "a[", "a[b.c(", "{'a':[", "1 if 1 else " }) {
        ends_as("DEPTH", "{{ " + times(n, part));
        ends_as("DEPTH", "{% if " + times(n, part));
        ends_as("DEPTH", "{% for a in " + times(n, part));
    }
    ends_as("DEPTH", "{{ " + times(n, "-"));
    for (const char * part : { " ~ a", " + a", " * a", ".a", "[1]", "()", "|a", "|a(1)", " is a()", " and a", " or a",
                               " == a", " in a", " if a else a", " if a" }) {
        ends_as(std::string(part) == " if a" ? "error" : "DEPTH", "{{ a" + times(n, part) + " }}");
    }
    for (const char * part : { "{% if a %}", "{% for a in a %}", "{% macro a() %}", "{% set a %}", "{% filter a %}",
                               "{% call a() %}", "{% if a %}{% else %}" }) {
        ends_as("DEPTH", times(n, part), 600, 100 * MILLION);
    }
    ends_as("DEPTH", "{% if a %}" + times(n, "{% elif a %}") + "{% endif %}", 600, 100 * MILLION);
    ends_as("DEPTH", "{% for " + times(n, "(") + "a");
    ends_as("DEPTH", "{% set " + times(n, "(") + "a");
    ends_as("DEPTH", "{{ a is " + times(n, "(") + "a");
    // at run time
    const auto deepens = [](const std::string & source) { ends_as("DEPTH", source, 600, 100 * MILLION, 10 * MILLION); };
    deepens("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
    deepens("{% macro f(n) %}{% for i in [1] %}{% if n %}{{ f(n + 1) }}{% endif %}{% endfor %}{% endmacro %}"
            "{{ f(1) }}");
    deepens("{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}");
    deepens("{% macro f() %}{% call f() %}{% endcall %}{% endmacro %}{{ f() }}");
    deepens("{% macro f(x=f()) %}{% endmacro %}{{ f() }}");
    const std::string own  = "{% set ns = namespace() %}{% set ns.x = ns %}";
    const std::string list = "{% set l = [] %}{% set _ = l.append(l) %}";
    for (const char * use : { "tojson", "string", "tojson(indent=1)" }) {
        deepens(own + "{{ ns|" + use + " }}");
        deepens(list + "{{ l|" + use + " }}");
    }
    deepens(list + "{{ l }}");
    deepens(list + "{{ 'a' ~ l }}");
    deepens(list + "{{ l|lower }}");
    deepens("{% set l = [] %}{% set _ = l.append(l.append) %}{{ l|string }}");
    ends_as("error", list + "{{ {l: 1} }}");
    ends_as("ok", list + "{{ l == l }}");
    deepens("{% set l = [] %}{% set _ = l.append(x=l) %}{{ l|string }}");
    ends_as("error", "{% set l = [] %}{% set _ = l.append(x=l) %}{{ {(l[0], 1): 1} }}");
    ends_as("error", "{% set l = [] %}{{ {nothing|default(a=l): 1} }}");
    // values deeper than the stack: made, then freed
    const std::string many = "{% for i in range(200) %}{% for j in range(40) %}";
    const std::string end  = "{% endfor %}{% endfor %}";
    for (const char * nested :
         { "[ns.s]", "(1, ns.s)", "{'a': ns.s}", "namespace(a=ns.s)", "[1, ns.s]|last.append", "[[ns.s].append]" }) {
        ends_as(std::string(nested).find("last") != std::string::npos ? "error" : "ok",
                "{% set ns = namespace(s=[]) %}" + many + "{% set ns.s = " + nested + " %}" + end, 600, 100 * MILLION);
    }
    ends_as("DEPTH", "{% set ns = namespace(s=[]) %}" + many + "{% set ns.s = [ns.s] %}" + end + "{{ ns.s|tojson }}",
            60, 100 * MILLION);
    ends_as("ok",
            "{% set ns = namespace(c=0) %}{% macro m() %}{% set ns.c = caller %}{% endmacro %}{% set p = 0 %}"
            "{% for i in range(3000) %}{% call m() %}{% endcall %}{% set p = ns.c %}{% set ns.c = 0 %}{% endfor %}",
            60, 100 * MILLION);
    // in the messages
    auto nested = [](size_t depth) {
        return ends([&] { (void) render("{{ messages|tojson|length }}", times(depth, "[") + times(depth, "]")); }, 0,
                    60, MILLION);
    };
    assert(nested(ES_JSON_DEPTH) == "ok" && nested(ES_JSON_DEPTH + 1).compare(0, 5, "error") == 0);
    assert(nested(n).compare(0, 5, "error") == 0);
}

// Values that hold each other are freed, however often it happens.
void circles() {
    for (const char * source : {
             "{% set ns = namespace() %}{% set ns.x = ns %}",
             "{% set l = [] %}{% set _ = l.append([{'a': l}, 'x' * 1000]) %}",
             "{% set l = [] %}{% set _ = l.append(l.append) %}",
             "{% set ns = namespace(c=0) %}{% macro m() %}{% set ns.c = caller %}{% endmacro %}{% call m() %}{% "
             "endcall %}",
             "{% set _ = messages.append(messages) %}{{ messages }}",
         }) {
        ends_as("", source);
        const size_t once = heap_live;
        for (int i = 0; i < 100; ++i) {
            ends_as("", source);
        }
        assert(heap_live == once);
    }
}

// Errors that must be errors, not traps or worse.
void wrong() {
    ends_as("error", "{{ 5 is divisibleby 0 }}");
    ends_as("ok", "{{ -9223372036854775808 is divisibleby(-1) }}{{ 5 % 0 }}{{ -9223372036854775808|abs }}");
    ends_as("error", "{{ 99999999999999999999999999 }}");
    ends_as("error", "{{ strftime_now('%999999999d') }}");
    ends_as("error", "{{ 'a'|indent(-1) }}");
    ends_as("SIZE", "{{ range(9223372036854775800, 9223372036854775807, 5)|length }}");
    // no order: what std::sort must not be given
    ends_as(
        "ok",
        "{% set l = [10, '9', 9, none, [], 'a', 1.5, true] %}{% set ns = namespace(l=l) %}"
        "{% for i in range(6) %}{% set ns.l = ns.l + ns.l %}{% endfor %}"
        "{{ ns.l[:500]|list|length }}{{ (ns.l|map(attribute='x')|list)|sort|length }}{{ [9, 10, '9']|sort|length }}");
    for (const char * text : { "{{ ''.__class__ }}",
                               "{{ self.__init__ }}",
                               "{{ messages|map('attr', '__class__')|list }}",
                               "{{ '{0.__class__}'.format(1) }}",
                               "{{ 'a' * 10**9 }}",
                               "{{ 'a'|center(1000000000) }}",
                               "{{ '%999999999d' % 1 }}",
                               "{{ 9 ** 9 }}",
                               "{{ [0] * 1000000000 }}",
                               "{{",
                               "{% if %}",
                               "{#",
                               "{{ '",
                               "{{ 'a\\",
                               "{%",
                               "{{ a.",
                               "{{ a[",
                               "{% set a",
                               "{% for a",
                               "{{ }}",
                               "{% endfor %}",
                               "{{ messages[0].content.x.y() }}",
                               "{{ raise_exception('no') }}" }) {
        const std::string how = ends([&] { (void) render(text); }, 0, 60, MILLION);
        assert(how.compare(0, 5, "error") == 0 || how == "ok");
    }
}

// Templates made at random from the parts that templates have.
void random_ones() {
    const char * parts[] = { "{%",        "%}",       "{{",
                             "}}",        "{#",       "#}",
                             "-",         "if",       "else",
                             "elif",      "endif",    "for",
                             "in",        "endfor",   "set",
                             "endset",    "macro",    "endmacro",
                             "call",      "endcall",  "filter",
                             "endfilter", "ns",       "a",
                             "b",         "messages", "namespace",
                             "(",         ")",        "[",
                             "]",         "{",        "}",
                             ".",         ",",        ":",
                             "|",         "=",        "==",
                             "+",         "*",        "~",
                             "%",         "/",        "<",
                             "not",       "and",      "or",
                             "is",        "defined",  "'x'",
                             "\"",        "'",        "0",
                             "-1",        "1.5",      "9223372036854775807",
                             "range",     "join",     "replace",
                             "tojson",    "sort",     "append",
                             "loop",      "none",     "split",
                             "indent",    "string",   "list",
                             "\n",        "text",     "content",
                             "role",      "true",     "\\",
                             "\xff" };
    uint64_t     state   = 42;
    auto         next    = [&](size_t n) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return (size_t) (state >> 33) % n;
    };
    for (int i = 0; i < 5000; ++i) {
        std::string source = "{% set ns = namespace(a=messages) %}{% set a = [1, 'b'] %}";
        for (size_t n = next(40); n > 0; --n) {
            source += parts[next(sizeof(parts) / sizeof(*parts))];
            source += next(4) ? " " : "";
        }
        ends_as("", source, 2, MILLION);
    }
    // expressions that parse more often
    const char * values[] = { "ns",   "ns.a", "a",        "messages", "'xy'",     "3",       "-1",          "1.5",
                              "none", "true", "range(9)", "[a, ns]",  "{'k': a}", "(a, ns)", "messages[0]", "loop" };
    const char * uses[]   = { "|tojson",
                              "|string",
                              "|list",
                              "|sort",
                              "|length",
                              "|join('-')",
                              "|reverse",
                              "|first",
                              "|last",
                              "|upper",
                              "|replace('x', 'yy')",
                              ".append(ns)",
                              ".items()",
                              ".keys()",
                              "[0]",
                              "[::-1]",
                              " ~ a",
                              " + a",
                              " * 2",
                              " in a",
                              " == a",
                              " is mapping",
                              "|dictsort",
                              "|map(attribute='k')",
                              "|selectattr('k')",
                              "|default(x=a)",
                              ".get('a', x=ns)",
                              "|indent(2)",
                              "|max",
                              ".split('x')",
                              ".format(a, a)",
                              "|int",
                              "|float",
                              "|abs",
                              " - 1",
                              " % 0",
                              " / 0",
                              " is divisibleby 0" };
    for (int i = 0; i < 5000; ++i) {
        std::string source = "{% set ns = namespace(a=messages) %}{% set a = [1, 'b'] %}{% for i in range(3) %}";
        for (size_t n = 1 + next(4); n > 0; --n) {
            std::string value = values[next(sizeof(values) / sizeof(*values))];
            for (size_t m = next(4); m > 0; --m) {
                value = "(" + value + uses[next(sizeof(uses) / sizeof(*uses))] + ")";
            }
            const size_t how = next(4);
            source += how == 0   ? "{{ " + value + " }}"
                      : how == 1 ? "{% set ns.a = " + value + " %}"
                      : how == 2 ? "{% set a = " + value + " %}"
                                 : "{% set _ = a.append(" + value + ") %}";
        }
        ends_as("", source + "{% endfor %}", 2, MILLION);
    }
}

// A thread as small as those of iOS.
void in_a_thread(void (*work)(), size_t stack) {
    pthread_attr_t attr;
    pthread_t      thread;
    pthread_attr_init(&attr);
    assert(pthread_attr_setstacksize(&attr, stack) == 0);
    assert(pthread_create(
               &thread, &attr,
               [](void * f) -> void * {
                   ((void (*)()) f)();
                   return nullptr;
               },
               (void *) work) == 0);
    pthread_join(thread, nullptr);
    pthread_attr_destroy(&attr);
}

std::string text_of(const std::filesystem::path & path) {
    std::ifstream     file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

common_chat_templates_inputs a_conversation() {
    common_chat_templates_inputs inputs;
    for (const char * role : { "system", "user", "assistant", "user" }) {
        common_chat_msg message;
        message.role    = role;
        message.content = "Hello";
        inputs.messages.push_back(message);
    }
    inputs.tools.push_back({ "get", "Gets.", R"({"type": "object", "properties": {"what": {"type": "string"}}})" });
    return inputs;
}

std::string analyse(const std::string & source, double seconds, size_t bytes,
                    const common_chat_templates_inputs & inputs = a_conversation(),
                    common_chat_params *                 made   = nullptr) {
    return ends(
        [&] {
            auto templates = common_chat_templates_init(nullptr, source, "<s>", "</s>");
            auto params    = common_chat_templates_apply(templates.get(), inputs);
            if (made) {
                *made = std::move(params);
            }
        },
        source.size(), seconds, bytes);
}

// Every template that llama.cpp has: found out about and rendered within a quarter of the budget.
void known_templates() {
    size_t n = 0;
    for (const auto & entry : std::filesystem::directory_iterator(ES_TEMPLATES)) {
        if (entry.path().extension() == ".jinja") {
            const std::string how = analyse(text_of(entry.path()), 600, ES_TEMPLATE_BYTES / 4);
            if (how != "ok" && how.compare(0, 5, "error") != 0) { // some refuse a system message
                fprintf(stderr, "%s: %s\n", entry.path().filename().c_str(), how.c_str());
                abort();
            }
            n += how == "ok";
        }
    }
    assert(n > 60);
}

// llama.cpp's analysis of a template: dozens of renderings with one budget.
void analysis() {
    const std::string each = "{% for m in messages %}{{ m.content }}{% endfor %}";
    const std::string slow = "{% for i in range(300) %}{% for j in range(300) %}{% endfor %}{% endfor %}";
    assert(analyse(each + slow + slow + slow, 0.2, 100 * MILLION) == "TIME");
    assert(analyse(each + "{{ 'x' * 100000 }}", 60, MILLION) == "SIZE");
    assert(analyse("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", 600, 100 * MILLION) == "DEPTH");
    // comparing two renderings takes longer than writing them
    assert(analyse(each + "{% for i in range(400) %}{{ ['<>' * 1000]|join }}{% endfor %}", 0.5, 100 * MILLION) ==
           "TIME");
    const std::string bad = analyse("{% if %}", 60, MILLION);
    assert(bad.find("error: ") == 0 && bad.find("Unexpected token") != std::string::npos);
}

std::string grammar(const std::string & schema, double seconds = 60, size_t bytes = 8 * MILLION) {
    return ends([&] { (void) json_schema_to_grammar(common_json::parse(schema), true); }, 0, seconds, bytes);
}

void schemas() {
    auto nested = [](size_t n, const std::string & head, const std::string & tail) {
        return times(n, head) + R"({"type": "string"})" + times(n, tail);
    };
    assert(grammar(nested(50, R"({"type": "object", "properties": {"a": )", "}}")) == "ok");
    assert(grammar(nested(100000, R"({"items": )", "}")).compare(0, 5, "error") == 0);
    // what is not nested as text, but is by reference
    const size_t n     = 20000;
    std::string  chain = R"({"$ref": "#/d/0", "d": {)";
    for (size_t i = 0; i < n; ++i) {
        chain += "\"" + std::to_string(i) + R"(": {"$ref": "#/d/)" + std::to_string(i + 1) + "\"},";
    }
    assert(grammar(chain + "\"" + std::to_string(n) + R"(": {"type": "null"}}})") == "DEPTH");
    assert(grammar(R"({"allOf": [{"$ref": "#/d/a"}], "d": {"a": {"$ref": "#/d/a"}}})") == "DEPTH");
    assert(grammar(R"({"$ref": "#/d/a", "d": {"a": {"$ref": "#/d/a"}}})") == "ok");
    assert(grammar(nested(40, R"({"type": ["object", "object"], "properties": {"a": )", "}}")) == "SIZE");
    const std::string remote = grammar(R"({"$ref": "https://example.com/schema.json"})");
    assert(remote.find("only references into the same document") != std::string::npos);
    // what std::regex would need the stack for
    assert(grammar(R"({"properties": {")" + times(100000, "!") + R"(": {"type": "null"}}})") == "ok");
    assert(grammar(R"({"$ref": "#/)" + times(100000, "!") + R"(", ")" + times(100000, "!") +
                   R"(": {"type": "null"}})") == "ok");
    assert(grammar(R"({"properties": {")" + times(100000, "ab") +
                   R"(": {"type": "null"}}, "additionalProperties": true})") == "DEPTH");
    const std::string nest =
        grammar(R"({"type": "string", "pattern": "^)" + times(100000, "(") + times(100000, ")") + R"($"})");
    assert(nest.find("nested deeper") != std::string::npos);
    assert(grammar(R"({"type": "array", "items": {"type": "null"}, "minItems": 1000000000})") == "ok");
    std::string many = R"({"properties": {)", alike = many;
    for (size_t i = 0; i < 3000; ++i) {
        many += "\"" + std::to_string(i) + R"(": {"type": "null"},)";
        alike += "\"" + times(i + 1, "!") + R"(": {"type": "null"},)";
    }
    const std::string end = R"("z": {"type": "null"}}})";
    assert(grammar(many + end, 0.002, 100 * MILLION) == "TIME");
    assert(grammar(alike + end, 0.002, 100 * MILLION) == "TIME");

    // as a tool's parameters: every choice of two is one of two
    auto        inputs = a_conversation();
    std::string twice  = R"({"type": "object", "properties": {"a": {"$ref": "#/d/0"}}, "d": {)";
    for (size_t i = 0; i < 40; ++i) {
        const std::string next = R"({"$ref": "#/d/)" + std::to_string(i + 1) + "\"}";
        twice += "\"" + std::to_string(i) + R"(": {"anyOf": [)" + next + "," + next + "]},";
    }
    inputs.tools[0].parameters = twice + R"("40": {"type": "null"}}})";
    for (const char * name : { "Qwen3-Coder", "MiniMax-M2", "GLM-4.6" }) {
        const std::string how = analyse(text_of(std::filesystem::path(ES_TEMPLATES) / (std::string(name) + ".jinja")),
                                        1, 8 * MILLION, inputs);
        assert(how == "ok" || how == "TIME");
    }
}

// What a model may write, too: nothing that it writes takes the stack, and a call ends in time.
void answers() {
    for (const char * name :
         { "Qwen-Qwen3-0.6B", "openai-gpt-oss-120b", "Qwen3-Coder", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
           "mistralai-Mistral-Nemo-Instruct-2407" }) {
        common_chat_params made;
        auto               inputs = a_conversation();
        inputs.messages.erase(inputs.messages.begin());
        inputs.reasoning_format = COMMON_REASONING_FORMAT_AUTO;
        const std::string how   = analyse(text_of(std::filesystem::path(ES_TEMPLATES) / (std::string(name) + ".jinja")),
                                          60, 8 * MILLION, inputs, &made);
        assert(how == "ok");
        common_chat_parser_params params(made);
        params.reasoning_format = COMMON_REASONING_FORMAT_AUTO;
        params.parser.load(made.parser);
        const std::string call = R"({"name": "get", "arguments": {"what": )";
        for (const std::string & start :
             { std::string(), "<tool_call>\n" + call, "[TOOL_CALLS][" + call,
               std::string("<|channel|>commentary to=functions.get <|constrain|>json<|message|>{\"what\": "),
               std::string("<tool_call>\n<function=get>\n<parameter=what>\n") }) {
            for (const std::string & rest :
                 { times(100000, "["), times(100000, "{\"a\":"), times(100000, "<tool_call>"), times(100000, "<think>"),
                   times(100000, "\\"), times(100000, "\""), times(100000, "<"), times(100000, "\xff") }) {
                for (const bool partial : { true, false }) {
                    const std::string end =
                        ends([&] { (void) common_chat_parse(start + rest, partial, params); }, 0, 60, 8 * MILLION);
                    assert(end == "ok" || end == "DEPTH" || end.compare(0, 5, "error") == 0);
                }
            }
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    struct {
        const char * name;
        void (*work)();
    } const tests[] = { { "honest", honest },           { "endless", endless },
                        { "building", building },       { "deep", deep },
                        { "circles", circles },         { "wrong", wrong },
                        { "random_ones", random_ones }, { "known_templates", known_templates },
                        { "analysis", analysis },       { "schemas", schemas },
                        { "answers", answers } };
    for (const auto & test : tests) {
        if (argc > 2 && std::string(argv[2]) != test.name) {
            continue; // a name after the model's: that one only
        }
        test.work();
        in_a_thread(test.work, ES_TEMPLATE_STACK + 128 * 1024);
        printf("%s\n", test.name);
    }
    printf("ok\n");
    return 0;
}
