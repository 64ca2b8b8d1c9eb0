// UTF-8 from models: tokens are bytes, so text may end inside a character or be invalid.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

size_t      es_utf8_complete(const std::string & text); // length without an incomplete last character
std::string es_utf8_valid(const std::string & text);    // invalid bytes become U+FFFD

// The character at a byte of the text, which moves on to the next one; 0 for invalid bytes.
uint32_t es_utf8_next(std::string_view text, size_t & at);
