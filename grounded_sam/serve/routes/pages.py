"""Routes for people: the page, and the description of all routes."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from grounded_sam.pages.rendering import make_environment

router = APIRouter(include_in_schema=False)


@cache
def _templates() -> Any:
    """Return the HTML templates of the package, which escape what is put into them."""
    return make_environment(("grounded_sam.serve", "page/templates"))


@router.get("/")
async def home() -> HTMLResponse:
    """Return the first page."""
    return HTMLResponse(_templates().get_template("index.html").render())


@router.get("/docs")
async def docs() -> HTMLResponse:
    """Return the page that draws `/openapi.json`."""
    return HTMLResponse(_templates().get_template("docs.html").render())
