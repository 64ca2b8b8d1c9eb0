"""The HTTP API: routes, request checks, responses, the page."""
