"""Serving: a page to chat with the model, its streaming endpoint, and OpenAI's API."""
