// ggml's failed assertions as exceptions: a file's metadata may contradict each other in ways that llama.cpp only
// asserts against, which would end the process while a model is being loaded.
#pragma once

// From here to the end of the block ggml_abort throws a std::exception, on this thread. Only for what can be given up
// as a whole: the making of a model, of a context, of a first graph, of a stream's content. Scopes may be nested.
class es_abort_scope {
public:
    es_abort_scope();
    ~es_abort_scope();
    es_abort_scope(const es_abort_scope &)             = delete;
    es_abort_scope & operator=(const es_abort_scope &) = delete;
};
