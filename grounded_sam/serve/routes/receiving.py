"""Images and videos in requests: a form with a file, base64 in JSON, or a path below the roots."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable
from functools import partial
from typing import IO, Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from grounded_sam.files import require_regular
from grounded_sam.serve.answers import in_thread
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.schemas import FileBody
from grounded_sam.serve.server import Server
from grounded_sam.serve.uploads import Upload, UploadKind

_FORM = {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}, "required": ["file"]}
#: The two kinds of body, for the OpenAPI description.
UPLOAD_CONTENT: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _FORM},
            "application/json": {"schema": FileBody.model_json_schema()},
        },
    }
}


async def receive_upload(
    request: Request, server: Server, kind: UploadKind, check: Callable[[Upload, int], None]
) -> Upload:
    """Add the file of a request to the uploads.

    Args:
        request: The request.
        server: What the routes share.
        kind: `image` or `video`.
        check: Fills in the size of the upload, given the largest number of pixels, or raises.

    Raises:
        RequestError: If there is no file in it, or it must not be read.
        ImageError: If it cannot be used.
    """
    add = partial(_add, server, kind, check)
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=1, max_fields=1) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise RequestError(422, "the form must have a file named `file`")
            return await in_thread(server, add, file.file, file.filename or "")
    return await in_thread(server, _add_from_json, server, await request.body(), add)


def _add(
    server: Server, kind: UploadKind, check: Callable[[Upload, int], None], content: IO[bytes], name: str
) -> Upload:
    """Add a file."""
    return server.uploads.add(content, name, kind, lambda upload: check(upload, server.max_pixels))


def _add_from_json(server: Server, content: bytes, add: Callable[[IO[bytes], str], Upload]) -> Upload:
    """Add the file that a JSON body has or names."""
    try:
        body = FileBody.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        reason = f"{where}: {first['msg']}; expected a form with a file, or JSON with data or path"
        raise RequestError(422, reason) from None
    if (body.data is None) == (body.path is None):
        raise RequestError(422, "give either data, the content of the file in base64, or path")
    if body.path is not None:
        path = server.roots.resolve(body.path)
        try:
            require_regular(path)
            with path.open("rb") as file:
                return add(file, body.name or path.name)
        except OSError as error:
            raise RequestError(422, f"{path.name}: {error.strerror or 'it cannot be read'}") from error
    assert body.data is not None
    data = body.data.partition(",")[2] if body.data.startswith("data:") else body.data
    try:
        decoded = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(422, "data is not base64") from error
    return add(io.BytesIO(decoded), body.name)
