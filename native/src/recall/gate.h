// Which of the entries found for a text may come back: see es_log_hit.
#pragma once

#include "edge_stream_recall.h"

#include <cstdint>
#include <string_view>
#include <vector>

class es_gate {
public:
    explicit es_gate(std::string_view text);
    bool admits(const es_log_hit & hit) const;

private:
    std::vector<uint32_t> forms_;
    double                least_coverage_;
};
