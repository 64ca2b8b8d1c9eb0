// The bounds of an integer in a JSON schema, see the header.
#include "es-json-bounds.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace {

constexpr int64_t end = 10'000'000'000'000'000; // of 17 digits

// One bound: the number itself if it is the lower one, else its negation, so that the higher of two is the tighter one.
int64_t bound(const common_json & schema, const std::string & word, const std::string & exclusive, int sign) {
    int64_t    found   = -end;
    const bool draft_4 = schema.contains(exclusive) && schema.at(exclusive) == true;
    for (const std::string & name : { word, exclusive }) {
        if (!schema.contains(name) || !schema.at(name).is_number()) {
            continue;
        }
        const common_json & value = schema.at(name);
        const double        d     = sign * value.get<double>();
        if (d >= (double) end) {
            throw std::invalid_argument(name + " is beyond integers of 16 digits");
        }
        if (d <= (double) -end) {
            continue;
        }
        const bool    beyond = name == exclusive || draft_4;
        const int64_t whole =
            value.is_number_integer() ? sign * value.get<int64_t>() : (int64_t) (beyond ? std::floor(d) : std::ceil(d));
        found = std::max(found, whole + beyond);
    }
    return found;
}

} // namespace

common_json es_json_bounds(const common_json & schema) {
    const int64_t lower = bound(schema, "minimum", "exclusiveMinimum", 1);
    const int64_t upper = -bound(schema, "maximum", "exclusiveMaximum", -1);
    if (lower > upper) {
        throw std::invalid_argument("minimum is above maximum");
    }
    common_json out = schema;
    for (const std::string word : { "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum" }) {
        if (out.contains(word) && (out.at(word).is_number() || (word[0] == 'e' && out.at(word).is_boolean()))) {
            out.erase(word); // else the converter says what it must be
        }
    }
    if (lower > -end) {
        out["minimum"] = lower;
    }
    if (upper < end) {
        out["maximum"] = upper;
    }
    return out;
}
