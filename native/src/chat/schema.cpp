// JSON schemas as grammars: llama.cpp's converter, and a refusal of what it would leave out.
#include "json-schema-to-grammar.h"
#include "request.h"

#include <array>
#include <stdexcept>

namespace {

// Words that limit values and that the converter does not know.
constexpr std::array unknown = {
    "not",
    "if",
    "then",
    "else",
    "contains",
    "patternProperties",
    "propertyNames",
    "multipleOf",
    "uniqueItems",
    "minProperties",
    "maxProperties",
    "dependentRequired",
    "minContains",
    "maxContains",
    "dependencies",
    "dependentSchemas",
    "unevaluatedProperties",
    "unevaluatedItems",
    "$dynamicRef",
    "$recursiveRef",
    "additionalItems",
};

constexpr int n_repeats = 2000; // a grammar's, see llama-grammar.cpp
constexpr int n_depth   = 64;

// Refuses what the converter would leave out, and writes `true` in the way it knows.
void check(common_json & schema, int depth = 0) {
    if (schema.is_boolean() && schema == true) {
        schema = common_json::object();
    }
    if (!schema.is_object()) {
        return;
    }
    if (depth > n_depth) {
        throw std::invalid_argument("the JSON schema is nested deeper than " + std::to_string(n_depth));
    }
    for (const char * word : unknown) {
        if (schema.contains(word) && schema.at(word) != false) {
            throw std::invalid_argument(std::string("the JSON schema's ") + word + " cannot be expressed as a grammar");
        }
    }
    for (const char * word : { "minLength", "maxLength", "minItems", "maxItems" }) {
        if (schema.contains(word) && schema.at(word).is_number() &&
            !(schema.at(word).get<double>() >= 0 && schema.at(word).get<double>() <= n_repeats)) {
            throw std::invalid_argument(std::string("the JSON schema's ") + word + " is not between 0 and " +
                                        std::to_string(n_repeats));
        }
    }
    if (schema.contains("pattern") && schema.at("pattern").is_string()) {
        for (const char * word : { "minLength", "maxLength", "format" }) {
            if (schema.contains(word)) {
                throw std::invalid_argument(std::string("a grammar cannot follow a pattern and ") + word +
                                            " of a JSON schema together");
            }
        }
    }
    for (auto [name, value] : schema.items()) {
        if (name == "const" || name == "enum" || name == "default" || name == "examples") {
            continue; // values
        }
        if (name == "properties" || name == "$defs" || name == "definitions") {
            for (auto [property, inner] : value.items()) {
                check(inner, depth + 1);
            }
        } else if (value.is_array()) {
            for (common_json & inner : value) {
                check(inner, depth + 1);
            }
        } else if (value.is_object() || name == "items") {
            check(value, depth + 1);
        }
    }
}

} // namespace

std::string es_schema_grammar(common_json schema) {
    if (!schema.is_object()) {
        throw std::invalid_argument("a JSON schema must be an object");
    }
    check(schema);
    if (schema.empty()) {
        schema["type"] = "object";
    }
    try {
        return json_schema_to_grammar(schema);
    } catch (const std::exception & e) {
        throw std::invalid_argument(std::string("the JSON schema cannot be used: ") + e.what());
    }
}
