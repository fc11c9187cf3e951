"""What ComfyUI's server answers to its page, without ComfyUI: the page's static files and this pack around them.

Nothing runs a prompt here. Whatever the page asks for and this server does not know is answered with 404, which the
page's console reports as an error.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import threading
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from tests.shipped import ROOT

PACK = "ComfyUI-DCDD"
SNAPSHOT = ROOT / "tests" / "comfy" / "object_info.json"
CORE_NODES = Path(__file__).with_name("core_nodes.json")
#: Keep the tutorial, the release notes, and the question where to save away from the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.InstalledVersion": "1.58.1",
    "Comfy.Validation.Workflows": True,
    # Words on nodes also where a graph is seen whole.
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
#: The kind of a binary message that carries a notice.
_TEXT = 3
#: What a node's entry says where the snapshot or the fixture leaves it out.
DEFAULTS = {
    "is_input_list": False,
    "output_tooltips": [],
    "description": "",
    "category": "core",
    "output_node": False,
    "deprecated": False,
    "experimental": False,
    "api_node": None,
    "search_aliases": [],
    "python_module": "nodes",
}


def object_info(search_aliases: dict[str, list[str]]) -> dict[str, Any]:
    """The pack's nodes and those of ComfyUI's that its workflows use, as /object_info tells them."""
    told = json.loads(SNAPSHOT.read_text("utf-8")) | json.loads(CORE_NODES.read_text("utf-8"))
    return {name: _entry(name, given, search_aliases.get(name, [])) for name, given in told.items()}


def _entry(name: str, given: dict[str, Any], search_aliases: list[str]) -> dict[str, Any]:
    entry = DEFAULTS | {"name": name, "display_name": name, "search_aliases": search_aliases} | given
    entry.setdefault("input_order", {part: list(fields) for part, fields in entry["input"].items()})
    entry.setdefault("output_name", entry["output"])
    entry.setdefault("output_is_list", [False] * len(entry["output"]))
    return entry


def translations() -> dict[str, Any]:
    """/i18n: by language, what main.json holds, and nodeDefs.json under its own name."""
    found = {}
    for folder in sorted((ROOT / "locales").iterdir()):
        words = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
        found[folder.name] = words.pop("main", {}) | words
    return found


def blueprints() -> dict[str, dict[str, Any]]:
    """/global_subgraphs, with their data."""
    return {
        hashlib.sha256(path.name.encode()).hexdigest(): {
            "source": "custom_node",
            "name": path.stem,
            "info": {"node_pack": f"custom_nodes.{PACK}"},
            "data": path.read_text("utf-8"),
        }
        for path in sorted(ROOT.glob("subgraphs/*.json"))
    }


class FrontendServer:
    """Serves one frontend's static folder and this pack on a free port, from a thread of its own."""

    def __init__(self, static: Path, info: dict[str, Any]):
        self.static, self.info = static, info
        (package,) = distributions(name="comfyui-frontend-package", path=[str(static.parents[1])])
        self.version = package.version
        #: What the page saves, settings and files; a test may set some before it opens a page.
        self.settings: dict[str, Any] = {}
        self.files = {"user.css": b"", "comfy.templates.json": b"[]"}
        self.url = ""
        self._sockets: set[web.WebSocketResponse] = set()
        self._blueprints = blueprints()
        self._folders = {
            f"/workflow_templates/{PACK}/": ROOT / "workflows",
            f"/extensions/{PACK}/": ROOT / "web",
            "/": static,
        }
        self._answers: dict[str, Callable[[], Any]] = {
            "/embeddings": list,
            "/experiment/models": list,
            "/extensions": self._extensions,
            "/features": dict,
            "/global_subgraphs": lambda: {
                key: {name: value for name, value in entry.items() if name != "data"}
                for key, entry in self._blueprints.items()
            },
            "/history": dict,
            "/internal/folder_paths": dict,  # asked where models are missing
            "/i18n": translations,
            "/jobs": lambda: {"jobs": [], "pagination": {"offset": 0, "limit": 0, "total": 0, "has_more": False}},
            "/node_replacements": dict,
            "/object_info": lambda: self.info,
            "/queue": lambda: {"queue_running": [], "queue_pending": []},
            "/settings": lambda: SETTINGS | self.settings,
            "/system_stats": self._system_stats,
            "/templates/index.json": list,
            "/userdata": list,
            "/users": lambda: {"storage": "server", "migrated": True},
            "/v2/userdata": list,
            "/workflow_templates": lambda: {PACK: sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))},
        }
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FrontendServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(60)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        """ComfyUI serves each of its routes under /api too."""
        path = request.path.removeprefix("/api")
        if path == "/ws":
            return await self._websocket(request)
        if request.method == "POST" and path == "/prompt":
            return web.json_response({"prompt_id": "run", "number": 1, "node_errors": {}})
        if request.method == "POST":
            return await self._save(request, path)
        if path in self._answers:
            return web.json_response(self._answers[path]())
        first, _, rest = path.strip("/").partition("/")
        if path in ("/user.css", "/favicon.ico"):
            return web.Response()
        if path == "/view":
            return web.FileResponse(ROOT / "web" / "icon.png")
        if first == "userdata" and rest in self.files:
            return web.Response(body=self.files[rest])
        if first == "global_subgraphs" and rest in self._blueprints:
            return web.json_response(self._blueprints[rest])
        if first == "object_info" and rest in self.info:
            return web.json_response({rest: self.info[rest]})
        for prefix, folder in self._folders.items():
            if path.startswith(prefix):
                file = (folder / (path.removeprefix(prefix) or "index.html")).resolve()
                if file.is_relative_to(folder) and file.is_file():
                    return web.FileResponse(file, headers={"Cache-Control": "max-age=600"})
        return web.Response(status=404)

    async def _save(self, request: web.Request, path: str) -> web.Response:
        first, _, rest = path.strip("/").partition("/")
        if first == "settings":
            given = await request.json()
            self.settings |= {rest: given} if rest else given
            return web.Response()
        if first == "userdata":
            self.files[rest] = await request.read()
            return web.json_response({"path": rest, "size": len(self.files[rest]), "modified": 0})
        return web.Response(status=404)

    async def _websocket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        idle = {"status": {"exec_info": {"queue_remaining": 0}}, "sid": request.query.get("clientId") or "page"}
        await socket.send_json({"type": "status", "data": idle})
        self._sockets.add(socket)
        async for message in socket:
            if message.type is WSMsgType.TEXT and json.loads(message.data).get("type") == "feature_flags":
                await socket.send_json({"type": "feature_flags", "data": {}})
        self._sockets.discard(socket)
        return socket

    # -- what a run shows on the nodes

    def show_image(self, node: int | str) -> None:
        """As after a node has run that ends in an image."""
        images = [{"filename": "image.png", "subfolder": "", "type": "temp"}]
        data = {"node": str(node), "display_node": str(node), "output": {"images": images}, "prompt_id": "run"}
        self._send(json.dumps({"type": "executed", "data": data}))

    def show_text(self, node: int | str, text: str) -> None:
        """A notice below a node."""
        name = str(node).encode()
        self._send(struct.pack(">II", _TEXT, len(name)) + name + text.encode())

    def _send(self, message: str | bytes) -> None:
        async def send() -> None:
            for socket in self._sockets:
                await (socket.send_str if isinstance(message, str) else socket.send_bytes)(message)

        asyncio.run_coroutine_threadsafe(send(), self._loop).result(60)

    def _extensions(self) -> list[str]:
        own = [f"/extensions/{PACK}/{file.relative_to(ROOT / 'web').as_posix()}" for file in ROOT.glob("web/**/*.js")]
        core = self.static / "extensions"
        return [*(f"/extensions/{file.relative_to(core).as_posix()}" for file in core.glob("**/*.js")), *own]

    def _system_stats(self) -> dict[str, Any]:
        system = {
            "os": "linux",
            "ram_total": 2**34,
            "ram_free": 2**33,
            "comfyui_version": "0.0.0",
            "required_frontend_version": self.version,
            "python_version": "3",
            "pytorch_version": "2",
            "embedded_python": False,
            "argv": ["main.py"],
        }
        return {"system": system, "devices": []}
