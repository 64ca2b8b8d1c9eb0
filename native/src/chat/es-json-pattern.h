// The `pattern` of a JSON schema.
#pragma once

#include <string>

// A regular expression (ECMA 262, the part that a grammar can express) as one that llama.cpp's schema converter takes
// and whose texts, between quotes, are JSON: quotation marks and backslashes escaped, no control characters. Where it
// is not anchored, anything may stand before or after it. Throws std::invalid_argument.
std::string es_json_pattern(const std::string & pattern);
