"""Serving: a page to chat with the model, a streaming endpoint behind it, and OpenAI's API.

server.py           the aiohttp application, its own endpoints, and how it is run
chat_request.py     what a client may ask for: types, limits, and the prompt made of it
openai_api.py       POST /v1/chat/completions and /v1/models replies.py          requests on
their way through the scheduler: deadlines, shutdown, clients that leave access.py
key, CORS, body limits, the form of errors metrics.py          Prometheus' numbers openapi.py
the description of the APIs web/                the page; it needs nothing from outside
"""
