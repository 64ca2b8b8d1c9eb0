// The C API of this checkout, for Linux; on Apple the XCFramework brings its own copy.
#include "../../../../native/include/edge_stream_app.h"
