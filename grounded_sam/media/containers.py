"""Open video files and addresses without what they may name: other files, or another host."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from grounded_sam.errors import ImageError
from grounded_sam.files import require_regular

#: Containers of videos that are read, by FFmpeg's names, among them those of all `media.files.VIDEO_SUFFIXES`. Those
#: that open other files (concat, hls, dash, sdp, image2) are absent.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,flv,live_flv,f4v,"
    "asf,mxf,ogg,nut,dv,dhav,gxf,wtv,nsv,rm,nuv,yuv4mpegpipe,gif,apng,mjpeg,mjpeg_2000,mpjpeg,avs2,avs3,cavsvideo,"
    "dirac,vc1,h261,h263,swf,amv,roq,smk,bink,flic,hxvs,smjpeg"
)
#: Containers of sound alone, by FFmpeg's names.
SOUND_CONTAINERS = "wav,w64,mp3,aac,flac,ac3,eac3,aiff,au,caf,amr"
#: What FFmpeg may open on the way from a file, and from a URL.
FILE_PROTOCOLS, URL_PROTOCOLS = "file", "http,https,tcp,tls,udp,rtp,rtsp,rtsps,rtmp,rtmps,rtmpt,srt,httpproxy,crypto"
#: Formats of streams, and of playlists, which name the addresses that are opened next.
STREAM_FORMATS, PLAYLISTS = "rtsp,rtp,sdp,mpegtsraw", {".m3u8": "hls", ".mpd": "dash"}
#: Seconds that a server may take to answer.
URL_TIMEOUT = 20.0


def open_video_file(path: Path) -> Any:
    """Open a file of video or sound with PyAV, but no playlist, whatever its suffix; bad text in it is replaced.

    Args:
        path: The file.

    Raises:
        OSError: If it is no file.
        av.FFmpegError: If it cannot be opened; damaged headers raise other errors, too.
    """
    import av

    require_regular(path)
    options = {"protocol_whitelist": FILE_PROTOCOLS, "format_whitelist": f"{CONTAINERS},{SOUND_CONTAINERS}"}
    url = f"file:{path}"  # or FFmpeg takes `12:30.mp4` for a protocol
    return av.open(url, options=options, metadata_errors="replace")


def open_url(url: str) -> Any:
    """Open a URL with PyAV; redirects are not followed, and a playlist only if the URL ends as one.

    Raises:
        av.FFmpegError: If it cannot be opened; damaged headers raise other errors, too.
    """
    import av

    playlist = PLAYLISTS.get(Path(urlsplit(url).path).suffix.lower())
    formats = ",".join(filter(None, [CONTAINERS, STREAM_FORMATS, playlist]))
    options = {"protocol_whitelist": URL_PROTOCOLS, "format_whitelist": formats}
    if url.startswith("rtsp"):
        options["rtsp_transport"] = "tcp"
    if url.startswith("http"):
        options["max_redirects"] = "0"
    return av.open(url, options=options, timeout=URL_TIMEOUT, metadata_errors="replace")


def video_stream(container: Any) -> Any:
    """Return the first video stream that is not a cover image."""
    cover = 0x400  # AV_DISPOSITION_ATTACHED_PIC
    return next((stream for stream in container.streams.video if not int(stream.disposition) & cover), None)


class _SameHost(HTTPRedirectHandler):
    """Follows redirects that stay on the host."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        moved_to_https = (old.scheme, new.scheme) == ("http", "https") and old.port == new.port is None
        if old.hostname != new.hostname or not (moved_to_https or (old.scheme, old.port) == (new.scheme, new.port)):
            raise ImageError(
                f"{req.full_url}: redirects to another host, {new.scheme}://{new.netloc}, which is not followed; if "
                "you trust it, give the new address as input"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def redirect_target(url: str) -> str | None:
    """Return where a URL redirects to, on the same host; None if it does not.

    Raises:
        ImageError: If it redirects to another host.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        return None
    try:
        with build_opener(_SameHost).open(url, timeout=URL_TIMEOUT) as response:
            target = str(response.url)
            return None if target == url else target
    except (OSError, ValueError):
        return None
