"""Downloads from a server on this machine that speaks the part of the hub's language that is used."""

import errno
import hashlib
import json
import os
import socket
import threading
from collections import namedtuple
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import huggingface_hub
import pytest

from dcdd_core.models.download import (
    KNOWN_MODELS,
    KnownModel,
    KnownPart,
    _ReportingFile,
    download,
    download_model,
)
from dcdd_core.models.llamagen.files import CHECKPOINTS
from dcdd_core.models.llamagen.files import REPOSITORY as LLAMAGEN
from dcdd_core.models.llamagen.files import TEXT as FLAN_T5_XL
from dcdd_core.models.llamagen.tokenizer import NAME as VQ

REPOSITORY = "someone/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 400
WITH_HASH = (".safetensors", ".bin", ".pt")
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": WEIGHTS,
    "vae/model.safetensors": WEIGHTS[:5000],
    "pytorch_model.bin": b"never asked for",
    "modeling.py": b"never asked for",
}


class Hub:
    """A hub with one repository, or more, and ways to fail.

    Attributes:
        files: of the one repository, by name.
        others: of others, by the repository's name.
        asked: (path, Range header or None) of every request.
        cut_after: the next answers break off after so many bytes, one after the other.
        deny: maps a path's beginning to (status, headers) that answer it.
        tokens: the Authorization headers that came.
        spoiled: whether weights come with a wrong byte.
        ignores_ranges: whether it answers with whole files, also where a range was asked for.
    """

    def __init__(self):
        self.files, self.others = dict(FILES), {}
        self.asked, self.cut_after, self.deny = [], [], {}
        self.tokens, self.spoiled, self.ignores_ranges = set(), False, False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request):
        path = urlsplit(request.path).path
        self.asked.append((path, request.headers["Range"]))
        self.tokens.add(request.headers["Authorization"])
        for start, (status, headers) in self.deny.items():
            if path.startswith(start):
                return self.send(request, status, b"", headers)
        held = {REPOSITORY: self.files, **self.others}
        if (repository := path.removeprefix("/api/models/")) in held:
            assert urlsplit(request.path).query.lower() == "blobs=true"
            siblings = [self.sibling(*file) for file in held[repository].items()]
            body = {"id": repository, "sha": COMMIT, "siblings": siblings}
            return self.send(request, 200, json.dumps(body).encode(), {})
        for repository, files in held.items():
            name = path.removeprefix(f"/{repository}/resolve/{COMMIT}/")
            if name in files and path.endswith(WITH_HASH):
                # As the hub does it, weights lie with another server.
                return self.send(request, 302, b"", {"Location": f"/storage/{name}"})
            name = name.removeprefix("/storage/")
            if name in files:
                break
        else:
            missing = "EntryNotFound" if path.startswith(f"/{REPOSITORY}/") else "RepoNotFound"
            return self.send(request, 404, b"", {"X-Error-Code": missing})
        content = files[name]
        if self.spoiled and name.endswith(WITH_HASH):
            content = content[:-1] + b"x"
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        first = int((request.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if ranged := request.headers["Range"] is not None and not self.ignores_ranges:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.send(request, 206 if ranged else 200, content[first:] if ranged else content, headers)

    def send(self, request, status, body, headers):
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if self.cut_after and len(body) > self.cut_after[0]:
            request.wfile.write(body[: self.cut_after.pop(0)])
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)
        else:
            request.wfile.write(body)

    def sibling(self, name, content):
        value = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
        if PurePosixPath(name).suffix in WITH_HASH:
            value["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
        return value

    def asked_for(self, name):
        return [range for path, range in self.asked if path == f"/storage/{name}"]


@contextmanager
def running(hub):
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with running(Hub()) as hub:
        yield hub


def held(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_whole_download_brings_what_can_be_read_and_nothing_else(tmp_path, hub):
    seen = []
    done = download(
        REPOSITORY,
        tmp_path / "new" / "model",
        files=["*"],
        endpoint=hub.endpoint,
        token="hf_mine",
        on_progress=lambda *x: seen.append(x),
    )
    assert done == tmp_path / "new" / "model"
    assert held(done) == {"config.json", "model.safetensors", "vae/model.safetensors"}
    for name in held(done):
        assert (done / name).read_bytes() == FILES[name]
    total = sum(len(FILES[name]) for name in held(done))
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [came for came, _ in seen] == sorted(came for came, _ in seen) and len(seen) > 10
    assert hub.tokens == {"Bearer hf_mine"}


def test_only_the_files_named_come(tmp_path, hub):
    download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    assert held(tmp_path) == {"model.safetensors"}
    download(REPOSITORY, tmp_path, files=["*.json", "vae/*"], endpoint=hub.endpoint)
    assert held(tmp_path) == {"model.safetensors", "config.json", "vae/model.safetensors"}


def test_every_file_is_asked_for_by_a_range(tmp_path, hub, monkeypatch):
    """From the beginning, too: older versions of huggingface_hub give anything else to hf_transfer, if told to use it,
    which cannot write to a file that reports its length."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ENABLE_HF_TRANSFER", True, raising=False)
    download(REPOSITORY, tmp_path, files=["*"], endpoint=hub.endpoint)
    asked = {range for path, range in hub.asked if not path.startswith("/api/")}
    assert asked == {"bytes=0-"} and (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_server_that_knows_no_ranges_sends_the_whole_file(tmp_path, hub):
    hub.ignores_ranges = True
    download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_what_is_there_is_not_brought_again(tmp_path, hub):
    (tmp_path / "model.safetensors").write_bytes(b"x" * len(WEIGHTS))
    seen = []
    download(
        REPOSITORY,
        tmp_path,
        files=["*.json", "model.safetensors"],
        endpoint=hub.endpoint,
        on_progress=lambda *x: seen.append(x),
    )
    assert not hub.asked_for("model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == b"x" * len(WEIGHTS)
    assert (tmp_path / "config.json").read_bytes() == FILES["config.json"]
    assert seen[0][0] == len(WEIGHTS)


def test_another_file_of_the_same_name_is_not_written_over(tmp_path, hub):
    (tmp_path / "config.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"config\.json \(2 bytes, the hub's 8\).* move, rename or delete"):
        download(REPOSITORY, tmp_path, files=["*.json", "model.safetensors"], endpoint=hub.endpoint)
    assert (tmp_path / "config.json").read_bytes() == b"{}" and held(tmp_path) == {"config.json"}


def test_files_that_are_all_there_need_no_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    seen = []
    download(REPOSITORY, tmp_path, files=["model.safetensors"], on_progress=lambda *x: seen.append(x))
    assert seen == [(len(WEIGHTS), len(WEIGHTS))]
    for files in (["model.safetensors", "config.json"], ["*.safetensors"]):
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
            download(REPOSITORY, tmp_path, files=files)


JANUS = KnownModel(
    parts=(KnownPart(repository=REPOSITORY, files=("*.json", "*.safetensors"), needed=("config.json", "words.json")),),
    folder="janus/model",
    gigabytes=1.0,
    licence="its own",
    gated=False,
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def janus_folder(folder, weights):
    """A folder as `JANUS` comes, and the bytes in it."""
    files = {"config.json": b"{}", "words.json": b"{}", **{name: WEIGHTS for name in weights}}
    if weights == SHARDS:
        index = {"weight_map": {f"w{number}": name for number, name in enumerate(SHARDS)}}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sum(map(len, files.values()))


@pytest.fixture(params=["told to stay offline", "no network"])
def unreachable(request, monkeypatch):
    """The endpoint of a hub that cannot be asked."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", request.param == "told to stay offline")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.mark.parametrize("weights", [("model.safetensors",), SHARDS], ids=["one file", "shards"])
def test_a_whole_folder_needs_no_connection_whatever_its_files_are_called(tmp_path, unreachable, weights):
    total, seen = janus_folder(tmp_path, weights), []
    done = download_model(JANUS, tmp_path, endpoint=unreachable, on_progress=lambda *x: seen.append(x))
    assert done == tmp_path and seen == [(total, total)]


@pytest.mark.parametrize(
    ("weights", "gone", "says"),
    [
        (("model.safetensors",), ["config.json"], r"config\.json$"),
        (("model.safetensors",), ["words.json", "config.json"], r"config\.json, words\.json$"),
        (("model.safetensors",), ["model.safetensors"], r"its weights \(\.safetensors\)$"),
        (SHARDS, [SHARDS[1]], rf"{SHARDS[1]}$"),
        (
            SHARDS,
            ["model.safetensors.index.json", SHARDS[1]],
            r"the index of its weights \(\.safetensors\.index\.json\)$",
        ),
    ],
)
def test_what_a_folder_lacks_is_said_where_the_hub_cannot_be_asked(tmp_path, unreachable, weights, gone, says):
    janus_folder(tmp_path, weights)
    for name in gone:
        (tmp_path / name).unlink()
        (tmp_path / f"{name}.0123456789ab.part").write_bytes(WEIGHTS[:9])  # as an interrupted download leaves it
    way_out = r"(unset it and start again|start the download again to go on)"
    with pytest.raises(ValueError, match=rf"{way_out}.*\. Missing in \S+: {says}"):
        download_model(JANUS, tmp_path, endpoint=unreachable)


def test_all_of_a_model_is_missing_where_nothing_is_there(tmp_path, unreachable):
    with pytest.raises(ValueError, match=r"Missing in \S+: config\.json, words\.json, its weights \(\.safetensors\)$"):
        download_model(JANUS, tmp_path / "new", endpoint=unreachable)
    (tmp_path / "a.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"Missing in \S+: b\.safetensors, whatever else matches \*\.json$"):
        download(REPOSITORY, tmp_path, files=["*.json", "b.safetensors"], endpoint=unreachable)


def test_a_hub_that_fails_is_told_also_where_all_files_are_there(tmp_path, hub):
    janus_folder(tmp_path, ("model.safetensors",))
    hub.deny["/api"] = 503, {}
    with pytest.raises(ValueError, match="answered 503 for someone/model: try later; [^.]*$"):
        download_model(JANUS, tmp_path, endpoint=hub.endpoint)


def test_a_cut_connection_is_taken_up_where_it_broke(tmp_path, hub):
    hub.cut_after = [50_000]
    download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    first, second = hub.asked_for("model.safetensors")
    assert first == "bytes=0-" and 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 50_000


def test_it_goes_on_where_huggingface_hub_gives_up_as_long_as_something_comes(tmp_path, hub, monkeypatch):
    starts = []

    def give_up(url, file, *, resume_size, headers, expected_size):
        starts.append(resume_size)
        file.write(WEIGHTS[resume_size:][: 0 if len(starts) == 3 else 10_000])
        raise huggingface_hub.errors.HTTPError("broken")

    monkeypatch.setattr("dcdd_core.models.download.http_get", give_up)
    with pytest.raises(ValueError, match=r"broke or was not made \(broken\)"):
        download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    assert starts == [0, 10_000, 20_000]


def test_a_part_that_is_too_long_is_thrown_away(tmp_path, hub):
    part = tmp_path / f"model.safetensors.{hashlib.sha256(WEIGHTS).hexdigest()[:12]}.part"
    part.write_bytes(WEIGHTS + b"x")
    download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    assert held(tmp_path) == {"model.safetensors"} and (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_dead_connection_keeps_what_came_and_the_next_download_goes_on(tmp_path, hub):
    hub.cut_after = [50_000, *[0] * 20]
    with pytest.raises(ValueError, match="broke or was not made .* start the download again to go on"):
        download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    (part,) = tmp_path.iterdir()
    assert part.suffix == ".part" and 0 < part.stat().st_size <= 50_000
    came, hub.cut_after, hub.asked = part.stat().st_size, [], []
    seen = []
    download(
        REPOSITORY,
        tmp_path,
        files=["model.safetensors"],
        endpoint=hub.endpoint,
        on_progress=lambda *x: seen.append(x),
    )
    assert hub.asked_for("model.safetensors") == [f"bytes={came}-"]
    assert seen[0] == (came, len(WEIGHTS))
    assert held(tmp_path) == {"model.safetensors"} and (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_newer_version_is_not_put_onto_the_beginning_of_an_older_one(tmp_path, hub):
    hub.cut_after = [50_000, *[0] * 20]
    with pytest.raises(ValueError, match="to go on"):
        download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    hub.cut_after, hub.asked = [], []
    hub.files["model.safetensors"] = WEIGHTS[::-1]
    download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    assert hub.asked_for("model.safetensors") == ["bytes=0-"]
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS[::-1]


def test_a_damaged_file_never_gets_its_name(tmp_path, hub):
    hub.spoiled = True
    with pytest.raises(ValueError, match="came damaged and was deleted: download it again"):
        download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    assert held(tmp_path) == set()


class Interrupted(Exception):
    """As ComfyUI's, an Exception like any other."""


def test_raising_from_on_progress_stops_it_and_leaves_no_half_file_under_the_name(tmp_path, hub):
    def stop(came, total):
        if came > 30_000:
            raise Interrupted

    with pytest.raises(Interrupted):
        download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint, on_progress=stop)
    (part,) = held(tmp_path)
    assert part.startswith("model.safetensors.") and part.endswith(".part")
    assert (tmp_path / part).stat().st_size > 30_000
    download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    assert held(tmp_path) == {"model.safetensors"} and (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("path", "status", "headers", "message"),
    [
        (f"/{REPOSITORY}", 401, {"X-Error-Code": "GatedRepo"}, "accept its licence: open .*someone/model, log in and"),
        (f"/{REPOSITORY}", 403, {"X-Error-Code": "GatedRepo"}, "token with read access at .*/settings/tokens, set"),
        (f"/{REPOSITORY}", 403, {}, "this token may not read someone/model: give it access to gated"),
        (
            "/api",
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            "without a valid token: check the name, create a token .* HF_TOKEN .* `hf auth login`",
        ),
        ("/api", 401, {}, "does not give someone/model without a valid token"),
        ("/api", 404, {"X-Error-Code": "RepoNotFound"}, "has no someone/model, or hides it: check its name"),
        (f"/{REPOSITORY}", 404, {"X-Error-Code": "EntryNotFound"}, "answered 404 for someone/model: try later"),
        ("/api", 503, {}, "answered 503 for someone/model: try later"),
        ("/api", 200, {"Content-Type": "text/html"}, "did not answer as a hub does"),
    ],
)
def test_refusals_are_explained(tmp_path, hub, path, status, headers, message):
    hub.deny[path] = status, headers
    with pytest.raises(ValueError, match=message):
        download(REPOSITORY, tmp_path, files=["*.safetensors"], endpoint=hub.endpoint)
    assert not held(tmp_path)


def test_what_the_repository_does_not_have_is_named(tmp_path, hub):
    with pytest.raises(ValueError, match=r"no flux\.safetensors that can be read here .* it holds config\.json, model"):
        download(REPOSITORY, tmp_path, files=["*.json", "flux.safetensors"], endpoint=hub.endpoint)
    with pytest.raises(ValueError, match=r"no pytorch_model\.bin that can be read"):
        download(REPOSITORY, tmp_path, files=["pytorch_model.bin"], endpoint=hub.endpoint)
    assert not held(tmp_path)


@pytest.mark.parametrize("name", ["../outside.json", "/outside.json", "a/../../outside.json"])
def test_a_file_outside_of_the_folder_is_refused(tmp_path, hub, name):
    hub.files[name] = b"{}"
    with pytest.raises(ValueError, match="outside of its repository"):
        download(REPOSITORY, tmp_path / "folder", files=["*.json"], endpoint=hub.endpoint)
    assert not held(tmp_path)


def test_no_server_and_offline_mode_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ValueError, match="the connection to .* was not made"):
            download(REPOSITORY, tmp_path, files=["*.json"], endpoint=nowhere)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it"):
        download(REPOSITORY, tmp_path, files=["*.json"], endpoint=nowhere)


def test_a_disk_without_room_is_told_before_anything_comes(tmp_path, hub, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("dcdd_core.models.download.shutil.disk_usage", lambda path: usage(1, 1, 50_000))
    with pytest.raises(ValueError, match="where 0.0 GB are free: make room"):
        download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    assert not hub.asked_for("model.safetensors") and not held(tmp_path)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "is full: make room; what has come is kept"),
        (errno.EDQUOT, "is full: make room; what has come is kept"),
        (errno.EFBIG, "takes no file as large as this one: choose a folder on another disk"),
        (errno.EROFS, "cannot be written to .*: choose another folder"),
        (errno.EACCES, "cannot be written to .*: choose another folder"),
        (errno.EIO, "cannot be written to .*: choose another folder"),
        (errno.ECONNRESET, "the connection to .* broke or was not made .*: what has come is kept"),
    ],
)
def test_a_disk_that_fails_meanwhile_is_explained(tmp_path, hub, monkeypatch, number, says):
    def fail(self, chunk):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_ReportingFile, "write", fail)
    with pytest.raises(ValueError, match=says):
        download(REPOSITORY, tmp_path, files=["model.safetensors"], endpoint=hub.endpoint)
    assert "model.safetensors" not in held(tmp_path)


def test_a_folder_that_cannot_be_made_is_explained(tmp_path, hub):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to .* choose another folder"):
        download(REPOSITORY, tmp_path / "file" / "folder", files=["config.json"], endpoint=hub.endpoint)


def test_pickles_come_only_where_they_are_named_in_full(tmp_path, hub):
    hub.files["model.pt"] = WEIGHTS[:3000]
    download(REPOSITORY, tmp_path / "all", files=["*"], endpoint=hub.endpoint)
    assert "model.pt" not in held(tmp_path / "all")
    with pytest.raises(ValueError, match=r"no \*\.pt that can be read here .*and \.pt files that are named in full"):
        download(REPOSITORY, tmp_path, files=["*.pt"], endpoint=hub.endpoint)
    download(REPOSITORY, tmp_path / "named", files=["model.pt"], endpoint=hub.endpoint)
    assert (tmp_path / "named" / "model.pt").read_bytes() == WEIGHTS[:3000]
    hub.spoiled = True
    with pytest.raises(ValueError, match=r"model\.pt came damaged and was deleted"):
        download(REPOSITORY, tmp_path / "spoiled", files=["model.pt"], endpoint=hub.endpoint)


TEXT = "someone/text"
TWO_PARTS = KnownModel(
    parts=(
        KnownPart(repository=REPOSITORY, files=("model.pt", "config.json")),
        KnownPart(repository=TEXT, files=("config.json", "model.safetensors"), below="text"),
    ),
    folder="janus/both",
    gigabytes=1.0,
    licence="of both",
    gated=False,
)


def test_parts_of_a_model_come_together(tmp_path, hub, monkeypatch):
    hub.files = {"model.pt": WEIGHTS, "config.json": b"{}"}
    hub.others[TEXT] = {"config.json": b'{"d": 1}', "model.safetensors": WEIGHTS[:9000], "model-2.safetensors": b"no"}
    seen = []
    done = download_model(TWO_PARTS, tmp_path / "m", endpoint=hub.endpoint, on_progress=lambda *x: seen.append(x))
    assert held(done) == {"model.pt", "config.json", "text/config.json", "text/model.safetensors"}
    assert (done / "text" / "config.json").read_bytes() == b'{"d": 1}' and (done / "config.json").read_bytes() == b"{}"
    total = len(WEIGHTS) + 9000 + 10
    assert seen[0] == (0, total) and seen[-1] == (total, total) and {whole for _, whole in seen} == {total}
    assert [came for came, _ in seen] == sorted(came for came, _ in seen)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    seen.clear()
    download_model(TWO_PARTS, tmp_path / "m", on_progress=lambda *x: seen.append(x))
    assert set(seen) == {(total, total)}


def test_nothing_of_a_model_comes_while_a_part_is_refused(tmp_path, hub, monkeypatch):
    hub.files = {"model.pt": WEIGHTS, "config.json": b"{}"}
    with pytest.raises(ValueError, match="has no someone/text, or hides it"):
        download_model(TWO_PARTS, tmp_path, endpoint=hub.endpoint)
    hub.others[TEXT] = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    usage = namedtuple("usage", "total used free")
    # Room for either of the parts, but not for both.
    monkeypatch.setattr("dcdd_core.models.download.shutil.disk_usage", lambda path: usage(1, 1, 150_000))
    with pytest.raises(ValueError, match=r"needs 0\.0 GB more in .*: make room"):
        download_model(TWO_PARTS, tmp_path, endpoint=hub.endpoint)
    assert not hub.asked_for("model.pt") and not held(tmp_path)


@pytest.mark.parametrize("model", KNOWN_MODELS.values(), ids=KNOWN_MODELS)
def test_known_models_say_all_that_a_user_must_know(model):
    assert model.licence and model.gigabytes > 0 and not model.folder.startswith("/")
    for part in model.parts:
        assert part.repository.count("/") == 1 and part.files and not part.below.startswith("/")
        assert all(name.endswith((".safetensors", ".json", ".pt")) for name in part.files)
        assert not any("*" in name for name in part.files if name.endswith(".pt"))
        assert bool(part.needed) == any("*" in name for name in part.files), "what is there could not be used offline"
        assert model.gated == part.repository.startswith("black-forest-labs/")


@pytest.mark.parametrize(("name", "checkpoint"), list(zip(("LlamaGen-XL, 256 px", "LlamaGen-XL, 512 px"), CHECKPOINTS)))
def test_llamagen_comes_as_its_folder_is_read(name, checkpoint):
    weights, text = KNOWN_MODELS[name].parts
    assert (weights.repository, weights.files, weights.below) == (LLAMAGEN, (checkpoint, f"{VQ}.pt"), "")
    assert text.below == FLAN_T5_XL and set(text.files) >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert "not known to us: see the page of peizesun/llamagen_t2i" in KNOWN_MODELS[name].licence
