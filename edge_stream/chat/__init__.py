"""Conversations: templates that turn messages into text, and streams that they are told to."""
