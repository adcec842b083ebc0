"""Serving: a page to chat with the model, and the streaming endpoint behind it.

    chat_request.py     what a client may ask for: types, limits, and the prompt made of it
    server.py           the aiohttp application
    web/                the page; it needs nothing from outside
"""
