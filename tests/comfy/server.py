"""A real ComfyUI server in a folder of its own, and a client for it: what tests/comfy runs the nodes in.

COMFYUI_DIR says where ComfyUI is (~/ComfyUI by default), COMFYUI_PYTHON which Python runs it (by default that of a venv
or .venv inside). Only the standard library is needed on this side.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.shipped import copy_shipped

#: With a hyphen in its name, as users have it.
PACK = "ComfyUI-DCDD"

Prompt = dict[str, dict[str, Any]]


def locate(environment: Mapping[str, str] = os.environ) -> tuple[Path, Path]:
    """ComfyUI's folder and the Python that runs it.

    Raises:
        LookupError: saying how to get what is not there.
    """
    folder = Path(environment.get("COMFYUI_DIR") or "~/ComfyUI").expanduser()
    if not (folder / "main.py").is_file():
        raise LookupError(
            f"no ComfyUI in {folder}: `git clone https://github.com/comfyanonymous/ComfyUI`, make a venv inside, "
            "install its requirements.txt and this pack's into that, and set COMFYUI_DIR to the clone"
        )
    inside = ("venv/bin/python", ".venv/bin/python", "venv/Scripts/python.exe", ".venv/Scripts/python.exe")
    named = environment.get("COMFYUI_PYTHON")
    for python in [Path(named).expanduser()] if named else [folder / path for path in inside]:
        if python.is_file():
            return folder, python
    raise LookupError(
        f"no Python at {named}"
        if named
        else f"no venv or .venv in {folder}: set COMFYUI_PYTHON to the Python that "
        "runs ComfyUI, with its requirements.txt and this pack's installed"
    )


@dataclass
class Run:
    """What became of a prompt.

    Attributes:
        status: "success", "error", "interrupted", or "rejected" where the server's own check refused (a part of) it.
        error: all that the user gets to read; `error_type` and `node` only where a node failed.
        executed: ids of the nodes that ran, in order.
        cached: ids of those that did not need to.
        progress: id -> (value, total) of each report.
        previews: id -> number of pictures.
        notices: id -> texts shown on the node.
        outputs: id -> what the node shows.
        blocked: id -> what is said on a node that did not run because an output that it takes is none.
    """

    status: str = ""
    error: str = ""
    error_type: str = ""
    node: str | None = None
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    progress: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    previews: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    notices: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, Any] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


#: Called with (node, value, total) while a prompt runs.
OnProgress = Callable[[str, int, int], None]


class ComfyServer:
    """A server on a free port and a temporary base directory, offline, on the CPU; a context manager."""

    def __init__(self, comfy: Path, python: Path, base: Path, arguments: Sequence[str] = ()):
        """
        Args:
            base: ComfyUI's base directory, with custom_nodes and models as they are to be.
            arguments: further ones of ComfyUI's command line.
        """
        self.base, self._comfy, self._python, self._arguments = base, comfy, python, arguments
        self._client = uuid.uuid4().hex
        self._log = base / "server.log"
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ComfyServer:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [self._python, "-u", self._comfy / "main.py", "--cpu", "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--listen", "127.0.0.1", "--port", self._port, "--base-directory", self.base]
        # By default the database lies in ComfyUI's own folder.
        command += ["--database-url", "sqlite:///:memory:", *self._arguments]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                list(map(str, command)),
                cwd=self.base,
                env=os.environ | offline,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_up()
            self._events = _Events(self._port, self._client)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _wait_until_up(self, seconds: float = 1800) -> None:
        deadline = time.monotonic() + seconds
        while True:
            if not self.alive:
                raise RuntimeError(f"ComfyUI ended while starting:\n{self.log()[-4000:]}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"ComfyUI did not answer in {seconds:g} s:\n{self.log()[-4000:]}") from None
                time.sleep(0.25)

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        return self._log.read_text("utf-8", errors="replace")

    def rss(self) -> float | None:
        """Memory of the process in MiB; None where the system has no /proc."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        except FileNotFoundError:
            return None
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))

    def saved(self, name: str) -> dict[str, np.ndarray]:
        """What a TEST_Save of that name wrote."""
        with np.load(self.base / "output" / f"{name}.npz") as file:
            return dict(file)

    # --- requests -----------------------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        """Raises ValueError if the answer is not JSON."""
        return json.loads(self.text(path))

    def text(self, path: str) -> str:
        return self._request(path, None)[1].decode()

    def post(self, path: str, values: Any) -> tuple[int, Any]:
        """-> (HTTP status, answer)."""
        status, text = self._request(path, json.dumps(values).encode())
        return status, json.loads(text) if text else None

    def show_previews(self, method: str) -> None:
        """As --preview-method does; takes the test-only pack."""
        self.post("/test/preview_method", {"method": method})

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self) -> None:
        """What the menu's "unload models and execution cache" asks for; what runs next finds it done.

        A prompt that is queued too early is run first. So this waits, which takes the test-only pack.
        """
        asked = self._ask_to_free()
        while self.get("/test/freeing"):
            time.sleep(0.05)
            # Asked while a prompt was just ending, ComfyUI's worker may sleep on.
            if time.monotonic() - asked > 1:
                asked = self._ask_to_free()

    def _ask_to_free(self) -> float:
        self.post("/free", {"unload_models": True, "free_memory": True})
        return time.monotonic()

    def waiting(self) -> list[tuple[str, dict[str, Any]]]:
        """The events that have come and that `run` has not read yet."""
        return self._events.waiting()

    def _request(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    # --- runs ---------------------------------------------------------------------------------------------------------

    def run(self, prompt: Prompt, *, on_progress: OnProgress | None = None, seconds: float = 600) -> Run:
        """Queues a prompt in the API format and follows it to its end.

        Raises:
            TimeoutError: if it has not ended after `seconds`; it is interrupted then.
            RuntimeError: if the server closes its websocket.
        """
        self._events.clear()
        run, began = Run(), time.monotonic()
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": self._client})
        refused = [
            f"{prompt[node]['class_type']}: {error['message']}: {error['details']}"
            for node, found in (answer.get("node_errors") or {}).items()
            for error in found["errors"]
        ]
        if status != 200:
            run.status, run.error = "rejected", "\n".join(refused) or json.dumps(answer["error"])
            return run
        running = True
        while running:
            try:
                kind, data = self._events.next(began + seconds - time.monotonic())
            except TimeoutError:
                self.interrupt()
                raise TimeoutError(f"still running after {seconds:g} s:\n{self.log()[-4000:]}") from None
            if kind == "closed":
                raise RuntimeError(f"the server tells nothing any more:\n{self.log()[-4000:]}")
            if data.get("prompt_id", answer["prompt_id"]) == answer["prompt_id"]:
                running = _note(run, kind, data)
                if kind == "progress" and on_progress is not None:
                    on_progress(str(data["node"]), int(data["value"]), int(data["max"]))
        run.seconds = time.monotonic() - began
        if refused:
            run.status, run.error = "rejected", "\n".join(refused)
        return run


def _note(run: Run, kind: str, data: dict[str, Any]) -> bool:
    """Writes an event down; whether the prompt goes on after it."""
    match kind:
        case "execution_cached":
            run.cached = data["nodes"]
        case "executing" if data["node"] is None:
            return False
        case "executing":
            run.executed.append(data["node"])
        case "progress":
            run.progress[data["node"]].append((int(data["value"]), int(data["max"])))
        case "preview":
            # Older servers do not say whose it is.
            run.previews[data.get("node_id") or run.executed[-1]] += 1
        case "notice":
            run.notices[data["node_id"]].append(data["text"])
        case "executed" if data["output"]:
            run.outputs[data["node"]] = data["output"]
        case "execution_success":
            run.status = "success"
        case "execution_interrupted":
            run.status, run.node = "interrupted", data["node_id"]
        case "execution_error" if data["exception_type"] == "ExecutionBlocked":
            run.blocked[data["node_id"]] = data["exception_message"].strip()
        case "execution_error":
            run.status, run.node = "error", data["node_id"]
            run.error, run.error_type = data["exception_message"].strip(), data["exception_type"]
    return True


class _Events:
    """What the server tells over its websocket (RFC 6455), as (kind, data); read by a thread of its own."""

    def __init__(self, port: int, client: str):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=300)
        self._stream = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        asking = [
            f"GET /ws?clientId={client} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
        ]
        self._socket.sendall("".join(f"{line}\r\n" for line in [*asking, ""]).encode())
        answer = list(iter(lambda: self._stream.readline().strip(), b""))
        if b" 101 " not in answer[0]:
            raise RuntimeError(f"the server opened no websocket: {answer[0]!r}")
        self._socket.settimeout(None)
        self._queue: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        # Asks for previews that say whose they are.
        self._send(1, json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}).encode())
        threading.Thread(target=self._follow, daemon=True).start()

    def next(self, seconds: float) -> tuple[str, dict[str, Any]]:
        """Raises TimeoutError if nothing comes in that time."""
        try:
            return self._queue.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError from None

    def waiting(self) -> list[tuple[str, dict[str, Any]]]:
        with self._queue.mutex:
            return list(self._queue.queue)

    def clear(self) -> None:
        while not self._queue.empty():
            self._queue.get()

    def _send(self, kind: int, data: bytes) -> None:
        """One short frame; a client has to mask it, with zeros if it likes."""
        self._socket.sendall(bytes([0x80 | kind, 0x80 | 126]) + struct.pack(">H", len(data)) + bytes(4) + data)

    def _follow(self) -> None:
        try:
            self._read()
        finally:
            self._queue.put(("closed", {}))

    def _read(self) -> None:
        whole, binary = b"", False
        while len(head := self._stream.read(2)) == 2:
            length = head[1] & 0x7F
            if length > 125:
                size = {126: 2, 127: 8}[length]
                length = int.from_bytes(self._stream.read(size), "big")
            data = self._stream.read(length)
            match head[0] & 0x0F:
                case 8:
                    return
                case 9:
                    self._send(10, data)
                case 1 | 2 | 0 as kind:
                    binary = kind == 2 or (kind == 0 and binary)
                    whole += data
                    if head[0] & 0x80:
                        self._queue.put(_event(whole, binary))
                        whole = b""


def _event(message: bytes, binary: bool) -> tuple[str, dict[str, Any]]:
    if not binary:
        values = json.loads(message)
        return values["type"], values["data"]
    kind, first = struct.unpack(">II", message[:8])
    match kind:
        case 3:
            return "notice", {"node_id": message[8 : 8 + first].decode(), "text": message[8 + first :].decode()}
        case 4:
            return "preview", json.loads(message[8 : 8 + first])
        case _:
            return "preview", {}


def copy_pack(custom_nodes: Path) -> Path:
    """The pack as ComfyUI's Manager installs it, in ComfyUI's folder."""
    return copy_shipped(custom_nodes / PACK)
