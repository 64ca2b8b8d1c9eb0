// Errors beside those that llama.cpp logs: see es_log_last_error.
#pragma once

void es_log_error(const char * text);
