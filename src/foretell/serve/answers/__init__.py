"""Answers in OpenAI's shapes: whole, and as the chunks of a stream."""
