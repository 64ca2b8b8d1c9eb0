// JSON schemas: turned into a grammar, which is then parsed.
#include "chat.h"

void fuzz_seeds() {
    const char * schemas[] = {
        R"({"type": "object", "properties": {"a": {"type": "integer", "minimum": -5, "maximum": 120}, "b": {"const": "x"},
            "c": {"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"type": "number"}, "minItems": 1, "maxItems": 4}},
            "required": ["a"], "additionalProperties": {"type": "string", "format": "date-time"}})",
        R"({"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "properties": {"next": {"oneOf": [{"$ref": "#/$defs/t"},
            {"type": "null"}]}}}}})",
        R"({"type": ["string", "null"], "pattern": "^(\\d{3}|[^a-f\\]]+?|\\.)*\\w$", "minLength": 2, "maxLength": 9})",
        R"({"allOf": [{"properties": {"a": {"enum": [1, "b", null, {"c": []}]}}}, {"properties": {"z": true}}]})",
    };
    fuzz_seed_each("schema", schemas);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const fuzz_watch watch;

    const std::string schema((const char *) data, size);
    const char *      grammar = nullptr;
    if (es_schema_to_grammar(schema.c_str(), &grammar) != ES_OK) {
        return 0;
    }
    const std::string copy = grammar;
    es_sampler_params p    = es_sampler_default_params();
    p.grammar              = copy.c_str();
    fuzz_sampler(p);
    return 0;
}
