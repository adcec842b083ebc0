"""Serving: a page to chat with the model, its streaming endpoint, and OpenAI's API.

server.py          the aiohttp application, the page's endpoints, running it
settings.py        the server's settings, which are flags
chat_request.py    the page's request: types, limits, and the prompt made of it
openai_request.py  the request of OpenAI's API
openai_api.py      POST /v1/chat/completions and GET /v1/models
replies.py         replies in progress: deadlines, shutdown, clients that leave
access.py          host names, key, CORS, body limits, error responses
metrics.py         Prometheus metrics
openapi.py         the description of both APIs
terminal.py        chatting in a terminal, without a server
web/               the page; it needs no other host
"""
