// JSON schemas as grammars: llama.cpp's converter, and a refusal of what it would leave out.
#include "json-schema-to-grammar.h"
#include "request.h"

#include <array>
#include <stdexcept>

namespace {

// Words that limit values and that the converter does not know.
constexpr std::array unknown = {
    "not",           "if",         "then",         "else",          "contains",        "patternProperties",
    "propertyNames", "multipleOf", "uniqueItems",  "minProperties", "maxProperties",   "dependentRequired",
    "minContains",   "maxContains", "dependencies", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems",
    "$dynamicRef",   "$recursiveRef", "additionalItems",
};

void check(const common_json & schema, int depth) {
    if (!schema.is_object()) {
        return;
    }
    if (depth > 64) {
        throw std::invalid_argument("the JSON schema is nested deeper than 64");
    }
    for (const char * word : unknown) {
        if (schema.contains(word) && schema.at(word) != false) {
            throw std::invalid_argument(std::string("the JSON schema's ") + word + " cannot be expressed as a grammar");
        }
    }
    for (const auto & [name, value] : schema.items()) {
        if (name == "const" || name == "enum" || name == "default" || name == "examples") {
            continue; // values
        }
        if (name == "properties" || name == "$defs" || name == "definitions") {
            for (const auto & [property, inner] : value.items()) {
                check(inner, depth + 1);
            }
        } else if (value.is_array()) {
            for (const common_json & inner : value) {
                check(inner, depth + 1);
            }
        } else {
            check(value, depth + 1);
        }
    }
}

} // namespace

std::string es_schema_grammar(const common_json & schema) {
    if (!schema.is_object() && !schema.is_boolean()) {
        throw std::invalid_argument("a JSON schema must be an object");
    }
    check(schema, 0);
    try {
        return json_schema_to_grammar(schema.is_object() && schema.empty() ? common_json{ { "type", "object" } } : schema);
    } catch (const std::exception & e) {
        throw std::invalid_argument(std::string("the JSON schema cannot be used: ") + e.what());
    }
}
