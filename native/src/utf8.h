// UTF-8 of models: tokens are bytes, and a text may end inside a character or hold bytes that are none.
#pragma once

#include <string>

size_t      es_utf8_complete(const std::string & text); // bytes up to the last character that is complete
std::string es_utf8_valid(const std::string & text);    // what is no character becomes U+FFFD
