// UTF-8 from models: tokens are bytes, so text may end inside a character or be invalid.
#pragma once

#include <string>

size_t      es_utf8_complete(const std::string & text); // length without an incomplete last character
std::string es_utf8_valid(const std::string & text);    // invalid bytes become U+FFFD
