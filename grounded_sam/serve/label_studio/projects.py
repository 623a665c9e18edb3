"""Label Studio projects connected to this server: the addresses of their files, and their open sessions."""

from __future__ import annotations

import os
import tempfile
import time
from collections import OrderedDict

from grounded_sam.serve.label_studio.client import TOKEN_VARIABLE, LabelStudioClient, check_address
from grounded_sam.serve.problems import RequestError
from grounded_sam.serve.routes.pictures import check_picture
from grounded_sam.serve.uploads import Upload, UploadKind, Uploads
from grounded_sam.serve.videos import check_video

#: Projects, files and sessions that are remembered.
MAX_PROJECTS, MAX_FILES = 1000, 10_000
#: Seconds after which a file of Label Studio is asked for again.
MAX_AGE_S = 600.0


class Projects:
    """The projects.

    Label Studio says its address and a token when it connects (`/setup`), and not with what follows. Both can be given
    to the server instead, which then works on after it was started anew, and asks no other host: `serve.label_studio`,
    and the token in the environment. That token is sent to this address alone.

    Args:
        address: Address of Label Studio; None for the one that it says.

    Raises:
        LabelStudioError: If the address is malformed.
    """

    def __init__(self, address: str | None) -> None:
        self.address = None if address is None else check_address(address, "serve.label_studio")
        token = os.environ.get(TOKEN_VARIABLE) or None
        self._own = None if self.address is None or token is None else LabelStudioClient(self.address, token)
        self._clients: OrderedDict[str, LabelStudioClient] = OrderedDict()

    def connect(self, project: str, hostname: str, token: str) -> None:
        """Remember what Label Studio says when it connects.

        Args:
            project: Id of the project, as Label Studio gives it.
            hostname: Its address.
            token: Its token.

        Raises:
            LabelStudioError: If the address is malformed.
        """
        self._clients[project] = LabelStudioClient(self.address or hostname, token)
        self._clients.move_to_end(project)
        while len(self._clients) > MAX_PROJECTS:
            self._clients.popitem(last=False)

    def client(self, project: str) -> LabelStudioClient:
        """Return what talks to the Label Studio of a project.

        Raises:
            RequestError: If it has never connected, and the server was not told (409).
        """
        if self._own is not None:
            return self._own
        if project not in self._clients:
            raise RequestError(
                409,
                f"project {project[:40]} has not connected since this server was started; open Settings, Model of the "
                f"project, or start the server with serve.label_studio=ADDRESS and {TOKEN_VARIABLE}",
            )
        return self._clients[project]


class Files:
    """Images and videos of tasks, kept for `MAX_AGE_S` seconds after they were fetched.

    Args:
        uploads: Where they are kept.
        max_picture_bytes: Largest image.
        max_pixels: Largest image or frame.
    """

    def __init__(self, uploads: Uploads, max_picture_bytes: int, max_pixels: int) -> None:
        self._uploads, self._max_bytes, self._max_pixels = uploads, max_picture_bytes, max_pixels
        self._known: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    def hold(self, client: LabelStudioClient, given: str, kind: UploadKind) -> Upload:
        """Fetch a file unless it is there, and keep it until `release` is called.

        Args:
            client: Whose file it is.
            given: Its URL, as the task has it.
            kind: `image` or `video`.

        Raises:
            LabelStudioError: If it is on another host, or cannot be had.
            ImageError: If it cannot be used.
        """
        url = client.file_url(given)
        upload_id, fetched = self._known.get((kind, url), ("", 0.0))
        if upload_id and time.monotonic() - fetched < MAX_AGE_S:
            try:
                return self._uploads.hold(upload_id, kind)
            except RequestError:  # it made room for newer ones
                pass
        upload = self._fetch(client, url, kind)
        self._known[kind, url] = upload.id, time.monotonic()
        self._known.move_to_end((kind, url))
        while len(self._known) > MAX_FILES:
            self._known.popitem(last=False)
        return self._uploads.hold(upload.id, kind)

    def _fetch(self, client: LabelStudioClient, url: str, kind: UploadKind) -> Upload:
        """Fetch a file."""
        check = check_picture if kind == "image" else check_video
        limit = self._max_bytes if kind == "image" else self._uploads.max_bytes
        with tempfile.TemporaryFile(dir=self._uploads.folder) as file:
            client.download(url, file, limit)
            file.seek(0)
            name = url.rsplit("?", 1)[0].rsplit("/", 1)[-1] or url.rsplit("/", 1)[-1]
            return self._uploads.add(file, name, kind, lambda upload: check(upload, self._max_pixels))

    def release(self, upload: Upload) -> None:
        """Give up a file."""
        self._uploads.release(upload)
