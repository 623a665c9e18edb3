"""The server: the models behind HTTP, for pages, other languages and annotation tools.

Needs the extra `serve`. Modules that import FastAPI or pydantic are `app`, `schemas`, `answers` and those in `routes`.
"""
