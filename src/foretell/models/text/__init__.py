"""Text in and out of token ids: configuration, conversion, detokenisation, chat templates."""
