// What a chat template may spend. Templates come with downloaded files: one may loop for ever, build gigabytes from
// nothing, or nest deeper than the stack. llama.cpp's engine (common/jinja) has no bounds of its own; native/patches
// makes it call the functions here, which do nothing unless the thread has an es_template_budget_scope.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace jinja {
struct value_t;
}

// Thrown when a bound is reached. Not a std::exception on purpose: llama.cpp catches those and goes on.
struct es_template_stop {
    enum reason_t { TIME, SIZE, DEPTH } reason;
};

// From here to the end of the block, all that this thread does with templates (parsing, finding out what they can do,
// rendering) together has `seconds`, may hold and build ES_TEMPLATE_BYTES and ES_TEMPLATE_BYTES_PER_INPUT for every
// byte of input (the template's source, messages, tools), and ES_TEMPLATE_STACK bytes of the stack, or less if the
// thread has less. A scope inside another does nothing. At the end, values that hold each other in a circle are freed:
// no value of jinja's may be used after the scope in which it was made.
constexpr size_t ES_TEMPLATE_BYTES           = 8000000;
constexpr size_t ES_TEMPLATE_BYTES_PER_INPUT = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t ES_TEMPLATE_STACK = 4 * 384 * 1024; // whose frames are larger
#else
constexpr size_t ES_TEMPLATE_STACK = 384 * 1024;
#endif
constexpr double ES_TEMPLATE_SECONDS = 5;

class es_template_budget_scope {
public:
    explicit es_template_budget_scope(size_t input_bytes, double seconds = ES_TEMPLATE_SECONDS,
                                      size_t bytes = ES_TEMPLATE_BYTES);
    ~es_template_budget_scope();
    es_template_budget_scope(const es_template_budget_scope &)             = delete;
    es_template_budget_scope & operator=(const es_template_budget_scope &) = delete;

    // what is left, in bytes as above
    static size_t left();

private:
    const bool outer;
};

//
// for native/patches
//

// One step, to be taken in every loop and recursion. Throws es_template_stop: TIME, DEPTH.
void es_template_step();

// `n` bytes, `times` times, are about to be built (or as much work done). Throws es_template_stop.
void es_template_spend(size_t n, size_t times = 1);

// A search for `needle` bytes in `text` bytes: the standard library's takes as many comparisons as their product.
void es_template_find(size_t text, size_t needle);

// The depth of a syntax tree, whose nodes destroy each other recursively. Throws es_template_stop.
void es_template_nest(size_t depth);

// Whether JSON is nested deeper than the stack of a small thread lets it be copied and written (ES_JSON_DEPTH).
constexpr size_t ES_JSON_DEPTH = 200;
bool             es_json_deep(const std::string & text);

// `name` with a dash for every run of characters that a grammar's rule may not have in its name.
std::string es_rule_name(const std::string & name);

// What every value of jinja's is: its size counts while it lives, and it can be found to be freed.
struct es_template_value {
    es_template_value();
    es_template_value(const es_template_value &) : es_template_value() {}
    es_template_value & operator=(const es_template_value &) { return *this; }
    ~es_template_value();

    // it holds `n` bytes more
    void es_grow(size_t n);

    es_template_value *es_prev = nullptr, *es_next = nullptr; // no list: made outside of a scope, or outlived it
    size_t             es_size = 0;
};

// The contents of a value that is destroyed: freed in a loop, since a nested value may be deeper than the stack.
using es_jinja_value = std::shared_ptr<jinja::value_t>;
void es_template_drop(std::vector<es_jinja_value> &                            items,
                      std::vector<std::pair<es_jinja_value, es_jinja_value>> & pairs);

// The depth of a syntax node's parts, by the `es_depth` of each.
template <typename T>
size_t es_template_depth(const T &) {
    return 0;
}
template <typename T>
size_t es_template_depth(const std::unique_ptr<T> & node) {
    return node ? node->es_depth : 0;
}
template <typename T>
size_t es_template_depth(const std::pair<T, T> & nodes) {
    return std::max(es_template_depth(nodes.first), es_template_depth(nodes.second));
}
template <typename T>
size_t es_template_depth(const std::vector<T> & nodes) {
    size_t depth = 0;
    for (const auto & node : nodes) {
        depth = std::max(depth, es_template_depth(node));
    }
    return depth;
}
template <typename... T>
size_t es_template_depth_of(const T &... parts) {
    size_t depth = 0;
    ((depth = std::max(depth, es_template_depth(parts))), ...);
    return depth;
}
