// A C file that closes itself.
#pragma once

#include <cstdio>
#include <memory>

struct es_file_closer {
    void operator()(FILE * f) const { fclose(f); }
};
using es_file = std::unique_ptr<FILE, es_file_closer>;
