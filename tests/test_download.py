"""Fetching from a server that misbehaves, and unpacking what came."""

import hashlib
import io
import re
import tarfile
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from auxilearn.data import cub, download
from auxilearn.errors import UserError
from tests.cub_shape import write_cub_shape

PAYLOAD = hashlib.sha256(b"seed").digest() * 10_000  # 320,000 bytes
MD5 = hashlib.md5(PAYLOAD).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``payload``. Each of ``drops`` cuts one response short after that many bytes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.payload, self.drops, self.asked = PAYLOAD, [], []
        self.ranges, self.status, self.length = True, None, True
        self.url = f"http://127.0.0.1:{self.server_port}/file.tgz"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is no news


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, total = self.server, len(self.server.payload)
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            return self.send_error(server.status)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            return self.end_headers()
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if server.length:
            self.send_header("Content-Length", str(total - start))
        self.end_headers()
        end = start + server.drops.pop(0) if server.drops else total
        return self.wfile.write(server.payload[start:end])


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server, path, md5=MD5, **options):
    return download.fetch(server.url, path, md5, pause=0.001, timeout=5, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_plain_download(server, tmp_path):
    path = tmp_path / "new" / "file.tgz"
    assert fetch(server, path) == path
    assert path.read_bytes() == PAYLOAD and names(path.parent) == ["file.tgz"]
    assert fetch(server, path) == path and len(server.asked) == 1, (
        "a right file is not fetched again"
    )


def test_dropped_connections_are_continued(server, tmp_path):
    server.drops = [100_000, 0, 70_000]
    fetch(server, tmp_path / "file.tgz")
    assert (tmp_path / "file.tgz").read_bytes() == PAYLOAD
    assert server.asked == [None, "bytes=100000-", "bytes=100000-", "bytes=170000-"]


def test_a_later_run_continues(server, tmp_path):
    server.drops = [50_000] + [0] * 4
    with pytest.raises(UserError, match=f"could not download {server.url} .*run again to continue"):
        fetch(server, tmp_path / "file.tgz")
    assert (tmp_path / "file.tgz.part").read_bytes() == PAYLOAD[:50_000]
    fetch(server, tmp_path / "file.tgz")
    assert server.asked[-1] == "bytes=50000-"
    assert (tmp_path / "file.tgz").read_bytes() == PAYLOAD and names(tmp_path) == ["file.tgz"]


@pytest.mark.parametrize("length", [True, False])
def test_a_server_without_ranges_restarts_cleanly(server, tmp_path, length):
    (tmp_path / "file.tgz.part").write_bytes(PAYLOAD[:60_000])
    server.ranges, server.length = False, length
    server.drops = [90_000] if length else []
    fetch(server, tmp_path / "file.tgz")
    assert (tmp_path / "file.tgz").read_bytes() == PAYLOAD


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_part_that_is_whole_or_too_long(server, tmp_path, beyond):
    (tmp_path / "file.tgz.part").write_bytes(PAYLOAD + b"x" * beyond)
    fetch(server, tmp_path / "file.tgz")
    assert (tmp_path / "file.tgz").read_bytes() == PAYLOAD
    assert len(server.asked) == 1 + beyond


def test_a_wrong_checksum_removes_the_download(server, tmp_path):
    with pytest.raises(
        UserError, match=f"MD5 {MD5}, expected {'0' * 32}; the download was removed"
    ):
        fetch(server, tmp_path / "file.tgz", md5="0" * 32)
    assert names(tmp_path) == []


def test_a_part_of_something_else_is_removed_then_fetched_anew(server, tmp_path):
    (tmp_path / "file.tgz.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="the download was removed: run again"):
        fetch(server, tmp_path / "file.tgz")
    fetch(server, tmp_path / "file.tgz")
    assert (tmp_path / "file.tgz").read_bytes() == PAYLOAD


def test_a_wrong_file_put_there_by_hand_is_left_alone(server, tmp_path):
    (tmp_path / "file.tgz").write_bytes(b"mine")
    with pytest.raises(UserError, match=f"file.tgz has MD5 .*, expected {MD5}; .* move it away"):
        fetch(server, tmp_path / "file.tgz")
    assert (tmp_path / "file.tgz").read_bytes() == b"mine" and server.asked == []


def test_refusals_of_the_server(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match=r"\(HTTP 404 Not Found\).*put it at .*file.tgz"):
        fetch(server, tmp_path / "file.tgz")
    assert len(server.asked) == 1, "there is no use in asking again"
    server.status = 503
    with pytest.raises(UserError, match="HTTP 503"):
        fetch(server, tmp_path / "file.tgz", attempts=2)
    assert len(server.asked) == 1 + 3 and names(tmp_path) == []


def test_no_network_names_the_url_and_the_place(server, tmp_path):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=f"could not download {url} .*refused.* put it at .*/f.tgz"):
        download.fetch(url, tmp_path / "f.tgz", MD5, attempts=1, pause=0.001)
    assert names(tmp_path) == []


def test_a_full_disk_is_seen_before_the_download(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 319_999))
    with pytest.raises(UserError, match=r"0\.00 GB free, but 0\.00 GB are still to be downloaded"):
        fetch(server, tmp_path / "file.tgz")
    (tmp_path / "file.tgz.part").write_bytes(PAYLOAD[:100])
    fetch(server, tmp_path / "file.tgz")  # the rest fits


# --- unpacking ---------------------------------------------------------------------------------


def member(name, data=b""):
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info, io.BytesIO(data)


IMAGES = member("CUB_200_2011/images.txt", data=b"1 a.jpg\n")


def write_archive(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for info, data in members:
            data.seek(0)
            tar.addfile(info, data)
    return path


def test_damaged_or_foreign_archives(tmp_path):
    archive = write_archive(tmp_path / "a.tgz", IMAGES, member("CUB_200_2011/b", data=PAYLOAD))
    data = archive.read_bytes()
    for content in (data[: len(data) // 2], b"no archive", b""):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tgz"):
            download.unpack(archive, tmp_path)
    write_archive(archive, member("other/images.txt"))
    with pytest.raises(UserError, match=r"has no CUB_200_2011/images\.txt"):
        download.unpack(archive, tmp_path)
    assert names(tmp_path) == ["a.tgz"]


def test_an_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "a.tgz", IMAGES)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_move_into_place", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download.unpack(archive, tmp_path)
    assert names(tmp_path) == ["a.tgz"]


@pytest.fixture
def published(tmp_path, monkeypatch, server):
    """A small archive with the published layout, served under the published name."""
    root = write_cub_shape(tmp_path / "made" / "CUB_200_2011")
    (root / "attributes.txt").rename(root.parent / "attributes.txt")
    archive = tmp_path / "served.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root.parent / "attributes.txt", "attributes.txt")
        tar.add(root, "CUB_200_2011")
    server.payload = archive.read_bytes()
    monkeypatch.setattr(download, "CUB_URL", server.url)
    monkeypatch.setattr(download, "CUB_MD5", hashlib.md5(server.payload).hexdigest())
    return root


def test_fetch_cub(tmp_path, server, published):
    place = tmp_path / "place"
    server.drops = [len(server.payload) // 2]
    root = download.fetch_cub(place)
    assert root == place / "CUB_200_2011"
    assert names(place) == ["CUB_200_2011", "CUB_200_2011.tgz", "attributes.txt"]
    assert cub.fingerprint(root) == cub.fingerprint(published)
    assert len(cub.read_annotations(root).paths) == 40
    asked = len(server.asked)
    download.fetch_cub(place)
    assert len(server.asked) == asked, "it is there"


def test_fetch_cub_uses_an_archive_put_there_by_hand(tmp_path, server, published):
    place = tmp_path / "place"
    place.mkdir()
    (place / "CUB_200_2011.tgz").write_bytes(server.payload)
    (place / "attributes.txt").write_text("of something else")
    root = download.fetch_cub(place)
    assert server.asked == []
    assert (place / "attributes.txt").read_text() == "of something else"
    assert cub.fingerprint(root) == cub.fingerprint(published)


def test_fetch_cub_leaves_a_folder_with_content_alone(tmp_path, server, published):
    (tmp_path / "place" / "CUB_200_2011" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="already exists, but is not a complete data set"):
        download.fetch_cub(tmp_path / "place")
    assert server.asked == [] and names(tmp_path / "place") == ["CUB_200_2011"]
    (tmp_path / "place" / "CUB_200_2011" / "images").rmdir()
    assert (download.fetch_cub(tmp_path / "place") / "images.txt").is_file()


def test_the_published_address():
    """From the publishers' page; the checksum is theirs."""
    assert download.CUB_URL.endswith("/65de6-vp158/files/CUB_200_2011.tgz")
    assert download.CUB_MD5 == "97eceeb196236b17998738112f37df78"
