// Graphs through the Metal backend's op encoders, over the device of emulator.cpp.
#pragma once

#include "ggml-impl.h"
#include "ggml-metal-device.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-ops.h"

#include <functional>
#include <set>
#include <string>

namespace es_metal {

extern std::string           failure; // the first one since it was cleared
extern std::set<std::string> used;    // kernels that ran, or were recorded
extern int32_t               n_dispatches, n_barriers;
extern bool                  recording;                   // commands are counted, not run
extern int32_t               first_barrier, last_barrier; // barriers before the first and the last dispatch of a node

void fail(const std::string & text);

// Encode the graph's nodes; they have run when this returns, unless recording. after: called with the index of a node
// (of those that compute) and the number of nodes that were fused into it.
void encode(ggml_cgraph * graph, const std::function<void(int, int)> & after = {});

} // namespace es_metal
