"""The command `grounded-sam-label-studio`: labels in a project of Label Studio, with its ML backend."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from grounded_sam.cli.arguments import ArgumentParser, local_folder
from grounded_sam.errors import ConfigError, GroundedSamError, count_of
from grounded_sam.files import home_path
from grounded_sam.formats.store import StoreReader, find_store
from grounded_sam.output.claim import claim
from grounded_sam.serve.label_studio.client import TOKEN_VARIABLE, LabelStudioClient, LabelStudioError, check_address
from grounded_sam.serve.settings import TOKEN_VARIABLE as BACKEND_TOKEN_VARIABLE
from grounded_sam.sinks.label_studio import LOCAL_URL, LabelStudioSink, image_labeling_config, video_labeling_config
from grounded_sam.structures.results import FrameResult

HELP = """\
Show the labels of a store in Label Studio, with this package as its ML backend.

  label-studio start                                                       (see below for its environment)
  grounded-sam-serve preset=shapes serve.roots=[.] 'serve.stores={labels: labels}' serve.label_studio=http://localhost:8080
  LABEL_STUDIO_API_KEY=... grounded-sam-label-studio create labels --url http://localhost:8080

makes a project, its Local Files storage, the ML backend, and a task with a prediction for each image or video.
"""
CREATE_HELP = f"""\
{TOKEN_VARIABLE} is a token of Label Studio: Account & Settings. {BACKEND_TOKEN_VARIABLE} is that of the server, if it
has one. Label Studio must have been started with

  LOCAL_FILES_SERVING_ENABLED=true LOCAL_FILES_DOCUMENT_ROOT=FOLDER     where FOLDER is labels/label_studio, or --root
  ML_BLOCK_LOCAL_IP=false USE_DEFAULT_BANNED_SUBNETS=false              for a server on the same machine or network
"""
#: Tasks, and bytes of JSON, that are imported by one request.
MAX_TASKS, MAX_BYTES = 250, 8_000_000
#: What the webhook is called for.
ACTIONS = ["ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"]
#: Largest distance in pixels of polygons from the outline of a mask.
TOLERANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to make.

    Attributes:
        folder: Folder of the store, or the output folder that has one.
        url: Address of Label Studio.
        backend: Address of the server; None for no ML backend.
        store: Name of the store in `serve.stores`; None if the server has one alone.
        title: Title of the project.
        root: Document root of Label Studio; None for the folder of its files.
        regions: `polygon`, `brush` or `both`.
        images: `link`, `copy` or `none`, as `sink.label_studio.images`.
    """

    folder: Path
    url: str
    backend: str | None = "http://127.0.0.1:8000"
    store: str | None = None
    title: str
    root: Path | None = None
    regions: str = "polygon"
    images: str = "copy"


def create_projects(options: Options) -> list[str]:
    """Make projects, and print each step.

    Args:
        options: What to make.

    Returns:
        Addresses of the projects: one of the images, one of the videos.

    Raises:
        LabelStudioError: If Label Studio refuses a step; the project of that step is deleted again.
        ConfigError: If there is no store, or nothing in it.
    """
    client = LabelStudioClient(options.url, os.environ.get(TOKEN_VARIABLE) or None)
    version = client.call("GET", "/api/version").get("release", "?")
    user = client.call("GET", "/api/current-user/whoami").get("email", "?")
    print(f"Label Studio {version} at {client.address}, as {user}")
    sink = write_tasks(options)
    kinds = [("images", "tasks.json", ""), ("videos", "videos.json", " (videos)")]
    written = [kind for kind in kinds if (sink.folder / kind[1]).is_file() and kind[1] in sink.written]
    if not written:
        raise ConfigError(f"the store of {options.folder} has no image whose file is still there")
    addresses = []
    for kind, file, suffix in written:
        title = options.title + (suffix if len(written) > 1 else "")
        config = (
            video_labeling_config(sink.vocabulary)
            if kind == "videos"
            else image_labeling_config(sink.vocabulary, sink.kinds, True)
        )
        project = client.call("POST", "/api/projects", {"title": title[:50], "label_config": config})["id"]
        print(f"Project {project}: {title[:50]}")
        try:
            fill(client, project, sink, kind, file, options)
        except BaseException:
            try:
                client.call("DELETE", f"/api/projects/{project}")
                print(f"Project {project} was deleted again")
            except LabelStudioError:
                print(f"Project {project} is incomplete; delete it in Label Studio")
            raise
        addresses.append(f"{client.address}/projects/{project}/data")
        print(f"Open {addresses[-1]}")
    return addresses


def write_tasks(options: Options) -> LabelStudioSink:
    """Write the tasks of a store, as `sink=label_studio` does.

    Args:
        options: What to make.

    Raises:
        ConfigError: If there is no store, or the folder is in use.
    """
    folder = find_store(options.folder)
    reader = StoreReader(folder)
    output = folder.parent if folder.name == "store" else folder
    with claim(output):
        sink = LabelStudioSink(
            output,
            reader.vocabulary,
            images=options.images,  # type: ignore[arg-type]
            regions=options.regions,  # type: ignore[arg-type]
            tolerance=TOLERANCE,
        )
        with sink:
            for result in _results(reader):
                sink.write(result)
    print(f"Tasks: {sink.summary().partition(';')[0]}")
    return sink


def _results(reader: StoreReader) -> Iterator[FrameResult]:
    """Yield what is in a store, without files that are gone."""
    for key in list(reader.keys()):
        if (problem := reader.file_problem(key)) is not None:
            print(f"Left out: {reader.name(key)}: {problem}", file=sys.stderr)
            continue
        yield from reader.read(key, reader.vocabulary)


def fill(
    client: LabelStudioClient, project: int, sink: LabelStudioSink, kind: str, file: str, options: Options
) -> None:
    """Make storage and ML backend of a project, and import its tasks.

    Args:
        client: Label Studio.
        project: Id of the project.
        sink: Has written the tasks.
        kind: `images` or `videos`.
        file: Name of the file of the tasks.
        options: What to make.

    Raises:
        LabelStudioError: If Label Studio refuses a step.
    """
    tasks = json.loads((sink.folder / file).read_text(encoding="utf-8"))
    root = (options.root or sink.folder).resolve()
    folder = (sink.folder / kind).resolve()
    if not folder.is_relative_to(root):
        raise ConfigError(f"--root {root} must be above {folder}, whose files Label Studio shows")
    key, prefix = kind[:-1], LOCAL_URL.partition("images/")[0]
    for task in tasks:
        name = unquote(task["data"][key].removeprefix(prefix).partition("/")[2])
        task["data"][key] = prefix + quote((folder / name).relative_to(root).as_posix())
        task["data"] |= {} if options.store is None else {"store": options.store}
    storage = {"project": project, "path": str(folder), "title": kind, "use_blob_urls": True}
    _step("storage", client, "POST", "/api/storages/localfiles", storage, _storage_help(root))
    print(f"Local Files storage: {folder}")
    with open(os.devnull, "wb") as nowhere:
        try:
            client.download(client.file_url(tasks[0]["data"][key]), nowhere, 1 << 40)
        except LabelStudioError as error:
            raise LabelStudioError(f"storage: {error}; {_storage_help(root)}", error.http_status) from error
    if options.backend is not None:
        connect_backend(client, project, options.backend)
    count = 0
    for part in _parts(tasks):
        answer = _step("import", client, "POST", f"/api/projects/{project}/import?return_task_ids=false", part)
        count += int(answer.get("task_count", len(part)))
    # Otherwise the page shows the predictions of the backend alone, of which there are none yet.
    _step("import", client, "PATCH", f"/api/projects/{project}", {"model_version": sink.model_version})
    print(f"Import: {count_of(count, 'task')} with predictions")


def _storage_help(root: Path) -> str:
    return (
        "start Label Studio with LOCAL_FILES_SERVING_ENABLED=true LOCAL_FILES_DOCUMENT_ROOT="
        f"{shlex.quote(str(root))} (or another folder above, and --root with it)"
    )


def connect_backend(client: LabelStudioClient, project: int, address: str) -> None:
    """Connect a server as ML backend, and its webhook.

    Args:
        client: Label Studio.
        project: Id of the project.
        address: Address of the server.

    Raises:
        LabelStudioError: If Label Studio does not reach it, or refuses it.
    """
    url, token = f"{check_address(address, '--backend')}/label-studio", os.environ.get(BACKEND_TOKEN_VARIABLE)
    backend: dict[str, Any] = {"project": project, "url": url, "title": "grounded_sam", "is_interactive": True}
    if token:
        backend |= {"auth_method": "BASIC_AUTH", "basic_auth_user": "grounded_sam", "basic_auth_pass": token}
    banned = (
        "for a server on the same machine or network, start Label Studio with ML_BLOCK_LOCAL_IP=false "
        "USE_DEFAULT_BANNED_SUBNETS=false"
    )
    try:
        made = client.call("POST", "/api/ml", backend)
    except LabelStudioError as error:
        reason = str(error)
        if error.http_status == 403 or "reserved" in error.detail:
            reason += f"; {banned}"
        elif "authentication" in error.detail.lower():
            reason = f"the server refuses Label Studio; set {BACKEND_TOKEN_VARIABLE} to the token of the server"
        elif "health check failed" in error.detail:
            reason = f"Label Studio does not reach {url}; start grounded-sam-serve, or name its address with --backend"
        raise LabelStudioError(f"backend: {reason}", error.http_status) from error
    print(f"ML backend: {url}, {made.get('readable_state', '')}, {made.get('model_version')}")
    hooks = client.call("GET", f"/api/webhooks?project={project}")
    hook = next((hook for hook in hooks if hook.get("url") == f"{url}/webhook"), None)
    if hook is None:
        raise LabelStudioError(f"webhook: Label Studio did not make the webhook of the backend; {banned}")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    change = {"url": hook["url"], "send_for_all_actions": False, "actions": ACTIONS, "headers": headers}
    _step("webhook", client, "PATCH", f"/api/webhooks/{hook['id']}/", change)
    print(f"Webhook: {hook['url']}")


def _step(
    name: str, client: LabelStudioClient, method: str, path: str, body: Any = None, way_out: str | None = None
) -> Any:
    """Send a request whose error names the step."""
    try:
        return client.call(method, path, body) or {}
    except LabelStudioError as error:
        rest = "" if way_out is None else f"; {way_out}"
        raise LabelStudioError(f"{name}: {error}{rest}", error.http_status, error.detail) from error


def _parts(tasks: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield the tasks in parts that one request may have."""
    part: list[Any] = []
    size = 0
    for task in tasks:
        length = len(json.dumps(task))
        if part and (len(part) == MAX_TASKS or size + length > MAX_BYTES):
            yield part
            part, size = [], 0
        part.append(task)
        size += length
    if part:
        yield part


def parse_options(arguments: Sequence[str]) -> Options:
    """Parse the command line.

    Raises:
        ConfigError: If a command or an option is unknown, or one is missing.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(
        prog="grounded-sam-label-studio", description=HELP, epilog=CREATE_HELP, formatter_class=raw, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="create", parser_class=ArgumentParser)
    command = commands.add_parser("create", allow_abbrev=False, epilog=CREATE_HELP, formatter_class=raw)
    command.add_argument("folder", type=local_folder, help="output folder with a store, or folder of the store")
    command.add_argument("--url", required=True, help="address of Label Studio, such as http://localhost:8080")
    command.add_argument("--backend", default=Options.backend, help="address of grounded-sam-serve (%(default)s)")
    command.add_argument("--no-backend", action="store_true", help="connect no ML backend")
    command.add_argument("--store", help="name of the store in serve.stores; needed if the server has several")
    command.add_argument("--title", help="title of the project; by default the name of the folder")
    command.add_argument("--root", type=home_path, help="document root of Label Studio, above the folder")
    command.add_argument("--regions", default="polygon", choices=("polygon", "brush", "both"), help="form of masks")
    command.add_argument("--images", default="copy", choices=("link", "copy"), help="how images get into the folder")
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        raise ConfigError("a command is missing: create; --help shows examples")
    return Options(
        folder=parsed.folder,
        url=parsed.url,
        backend=None if parsed.no_backend else parsed.backend,
        store=parsed.store,
        title=parsed.title or parsed.folder.resolve().name or "labels",
        root=parsed.root,
        regions=parsed.regions,
        images=parsed.images,
    )


def main() -> None:
    """Run the command: a user's mistake ends with one line and exit code 1."""
    try:
        create_projects(parse_options(sys.argv[1:]))
    except (GroundedSamError, OSError) as error:
        sys.exit(f"grounded-sam-label-studio: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
