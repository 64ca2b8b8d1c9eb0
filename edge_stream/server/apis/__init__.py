"""The HTTP APIs: each a thin translator between its JSON and the one internal request and answer."""
