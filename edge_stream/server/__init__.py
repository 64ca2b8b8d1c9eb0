"""`edge-stream serve`: conversations without end over the OpenAI API (extra `[server]`)."""
