"""Measure how the images of a bucket are listed: time, time to the first one, and memory.

A server on this machine answers ListObjectsV2 with made-up keys, a thousand a page.

    python benchmarks/listing.py --keys 1000000
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PAGE = 1000


class ListServer(BaseHTTPRequestHandler):
    """Answer each request with the page of keys that follows its continuation token."""

    keys = 0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("continuation-token", ["0"])[0])
        end = min(start + PAGE, self.keys)
        rest = "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
        objects = "".join(
            f"<Contents><Key>photos/{i // PAGE:04d}/{i:08d}.jpg</Key>"
            f"<ETag>&quot;{i:032x}&quot;</ETag><Size>{100_000 + i}</Size>{rest}"
            for i in range(start, end)
        )
        more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < self.keys else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>bucket</Name><Prefix>photos/</Prefix><KeyCount>{end - start}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
            f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{objects}{more}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


def serve(keys: int) -> tuple[ThreadingHTTPServer, str]:
    """Start a server on a free port; return it and its address."""
    handler = type("Handler", (ListServer,), {"keys": keys})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


def resident_mb() -> float:
    """Return the memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure() -> None:
    """List all images, and print what it took."""
    from grounded_sam.sources.images import ImageSource

    ImageSource("s3://bucket/photos/**")  # imports, connections and the first page
    before, start = resident_mb(), time.perf_counter()
    peak, count, first = before, 0, 0.0
    for _ in ImageSource("s3://bucket/photos/**").items():
        count += 1
        if count == 1:
            first = time.perf_counter() - start
        if count % 5000 == 0:
            peak = max(peak, resident_mb())
    total = time.perf_counter() - start
    print(
        f"{count:,} images in {total:.1f} s, the first after {first:.2f} s, {peak - before:+.1f} MiB over {before:.0f}"
    )


def main() -> None:
    """Start the server, and a process that lists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--list", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        return measure()
    server, endpoint = serve(options.keys)
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    env = {**os.environ, **keys, "AWS_ENDPOINT_URL": endpoint}
    subprocess.run([sys.executable, __file__, "--list"], env=env, check=True)
    server.shutdown()


if __name__ == "__main__":
    main()
