// The bounds of an integer in a JSON schema.
#pragma once

#include "json.h"

// An integer's schema with its bounds, if any, as whole numbers in `minimum` and `maximum`, as llama.cpp's converter
// reads them: the tighter of `minimum` and `exclusiveMinimum` (a number, or a boolean in draft 4), and none where no
// integer of a grammar, of 16 digits at most, can be beyond it, such as the largest of 64 bits. Throws
// std::invalid_argument if no integer is within.
common_json es_json_bounds(const common_json & schema);
