"""The server: one engine behind a thread, an OpenAI-compatible API in front of it."""
