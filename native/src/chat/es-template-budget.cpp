#include "es-template-budget.h"

#include "jinja/value.h"

#include <chrono>
#include <cstdint>
#include <functional>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

using es_clock = std::chrono::steady_clock;

static constexpr size_t VALUE_BYTES   = 256;       // of a jinja::value_t: some 240, and its allocation
static constexpr size_t STACK_RESERVE = 64 * 1024; // for the exception that says it is used up, and for others
static constexpr size_t STACK_UNKNOWN = 512 * 1024;
static constexpr size_t NODE_DEPTH    = 500;
static constexpr int    STEPS         = 32; // between two looks at the clock

namespace {
struct budget {
    bool                 active = false;
    size_t               left   = 0;
    int                  steps  = 0;
    es_clock::time_point end;
    uintptr_t            stack_end = 0;
    es_template_value *  values    = nullptr;

    void take(size_t n) {
        if (n > left) {
            throw es_template_stop{ es_template_stop::SIZE };
        }
        left -= n;
    }
};
} // namespace

static thread_local budget the_budget;

static uintptr_t stack_pointer() {
#if defined(__GNUC__)
    return (uintptr_t) __builtin_frame_address(0);
#else
    volatile char here = 0;
    return (uintptr_t) &here;
#endif
}

// The lowest address of this thread's stack (every platform's grows downwards), 0 if it cannot be known.
static uintptr_t stack_bottom() {
#if defined(__APPLE__)
    return (uintptr_t) pthread_get_stackaddr_np(pthread_self()) - pthread_get_stacksize_np(pthread_self());
#elif defined(__linux__)
    uintptr_t      bottom = 0;
    pthread_attr_t attr;
    if (pthread_getattr_np(pthread_self(), &attr) == 0) {
        void * address = nullptr;
        size_t size    = 0;
        if (pthread_attr_getstack(&attr, &address, &size) == 0) {
            bottom = (uintptr_t) address;
        }
        pthread_attr_destroy(&attr);
    }
    return bottom;
#else
    return 0;
#endif
}

// Where this thread's stack may be used up to, from `here` on.
static uintptr_t stack_end(uintptr_t here) {
    static thread_local const uintptr_t bottom = stack_bottom();

    const uintptr_t end = (bottom ? bottom : here - STACK_UNKNOWN) + STACK_RESERVE;
    return std::max(end, here - ES_TEMPLATE_STACK);
}

es_template_budget_scope::es_template_budget_scope(size_t input_bytes, double seconds, size_t bytes)
    : outer(!the_budget.active) {
    if (outer) {
        the_budget      = budget();
        the_budget.left = bytes + ES_TEMPLATE_BYTES_PER_INPUT * input_bytes;
        the_budget.end =
            es_clock::now() + std::chrono::duration_cast<es_clock::duration>(std::chrono::duration<double>(seconds));
        the_budget.active    = true;
        the_budget.stack_end = stack_end(stack_pointer());
    }
}

// What values hold, kept until all have let go.
namespace {
struct contents {
    std::vector<std::vector<jinja::value>>                          items;
    std::vector<std::vector<std::pair<jinja::value, jinja::value>>> pairs;
    std::vector<decltype(jinja::value_object_t::unordered)>         maps;
    std::vector<jinja::func_handler>                                functions;
    std::vector<jinja::value>                                       single;

    void take(jinja::value_t & value) {
        items.push_back(std::move(value.val_arr));
        pairs.push_back(std::move(value.val_obj));
        functions.push_back(std::move(value.val_func));
        if (auto * object = dynamic_cast<jinja::value_object_t *>(&value)) {
            maps.push_back(std::move(object->unordered));
        } else if (auto * function = dynamic_cast<jinja::value_func_t *>(&value)) {
            single.push_back(std::move(function->arg0));
        } else if (auto * argument = dynamic_cast<jinja::value_kwarg_t *>(&value)) {
            single.push_back(std::move(argument->val));
        }
    }
};
} // namespace

es_template_budget_scope::~es_template_budget_scope() {
    if (!outer) {
        return;
    }
    the_budget.active = false;
    contents circles;
    while (es_template_value * value = the_budget.values) {
        the_budget.values       = value->es_next == value ? nullptr : value->es_next;
        value->es_prev->es_next = value->es_next;
        value->es_next->es_prev = value->es_prev;
        value->es_prev = value->es_next = nullptr;
        circles.take(static_cast<jinja::value_t &>(*value));
    }
}

size_t es_template_budget_scope::left() {
    return the_budget.left;
}

void es_template_step() {
    budget & b = the_budget;
    if (!b.active) {
        return;
    }
    if (stack_pointer() < b.stack_end) {
        throw es_template_stop{ es_template_stop::DEPTH };
    }
    if (++b.steps >= STEPS) {
        if (es_clock::now() > b.end) {
            throw es_template_stop{ es_template_stop::TIME };
        }
        b.steps = 0;
    }
}

void es_template_spend(size_t n, size_t times) {
    es_template_step();
    if (the_budget.active) {
        the_budget.take(times && n > SIZE_MAX / times ? SIZE_MAX : n * times);
    }
}

void es_template_find(size_t text, size_t needle) {
    es_template_spend(text / 64 + 1, needle);
}

void es_template_nest(size_t depth) {
    if (the_budget.active && depth > NODE_DEPTH) {
        throw es_template_stop{ es_template_stop::DEPTH };
    }
}

bool es_json_deep(const std::string & text) {
    size_t depth  = 0;
    bool   quoted = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '"') {
            quoted = !quoted;
        } else if (quoted) {
            i += c == '\\';
        } else if (c == '[' || c == '{') {
            if (++depth > ES_JSON_DEPTH) {
                return true;
            }
        } else if (c == ']' || c == '}') {
            depth -= depth > 0;
        }
    }
    return false;
}

std::string es_rule_name(const std::string & name) {
    std::string safe;
    bool        other = false;
    for (const char c : name) {
        const bool kept = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-';
        if (kept) {
            safe += c;
        } else if (!other) {
            safe += '-';
        }
        other = !kept;
    }
    return safe;
}

es_template_value::es_template_value() {
    budget & b = the_budget;
    if (!b.active) {
        return;
    }
    es_template_spend(VALUE_BYTES);
    es_size = VALUE_BYTES;
    if (!b.values) {
        es_prev = es_next = b.values = this;
    } else {
        es_next          = b.values;
        es_prev          = es_next->es_prev;
        es_prev->es_next = es_next->es_prev = this;
    }
}

es_template_value::~es_template_value() {
    if (es_next) {
        budget & b = the_budget;
        if (b.values == this) {
            b.values = es_next == this ? nullptr : es_next;
        }
        es_prev->es_next = es_next;
        es_next->es_prev = es_prev;
        b.left += es_size;
    }
}

void es_template_value::es_grow(size_t n) {
    if (es_next) {
        es_template_spend(n);
        es_size += n;
    }
}

void es_template_drop(std::vector<es_jinja_value> &                            items,
                      std::vector<std::pair<es_jinja_value, es_jinja_value>> & pairs) {
    static thread_local std::vector<es_jinja_value> * outer = nullptr;

    if (items.empty() && pairs.empty()) {
        return;
    }
    std::vector<es_jinja_value> mine, &todo = outer ? *outer : mine;
    for (auto & item : items) {
        todo.push_back(std::move(item));
    }
    for (auto & pair : pairs) {
        todo.push_back(std::move(pair.first));
        todo.push_back(std::move(pair.second));
    }
    if (!outer) {
        outer = &mine;
        while (!mine.empty()) {
            es_jinja_value last = std::move(mine.back());
            mine.pop_back();
        }
        outer = nullptr;
    }
}
