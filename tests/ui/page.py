"""ComfyUI's page in headless Chromium: opens it, loads graphs, and tells what it shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, ConsoleMessage
from playwright.sync_api import TimeoutError as NothingCame

from tests.ui.server import FrontendServer

#: As root in a container, and without a way out of this machine.
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
VIEWPORT = {"width": 1680, "height": 1050}
#: Milliseconds for anything that the page is to show; a search that finds nothing takes them all.
PATIENCE, SEARCH_PATIENCE = 60_000, 5_000
#: How many of a search's results one sees at a glance.
GLANCE = 5
#: As long as the longest that a node of the pack says in a workflow.
NOTICE = "The condition is calibrated as the decoder was trained: temperature 0.71, mean confidence 0.62."
#: Dialogs and notices, as the versions of the page mark them.
OVERLAYS = "[role=dialog], [role=alertdialog], .p-dialog, .p-toast-message, [data-testid=error-overlay]"

#: The node search, as the versions of the page mark it.
SEARCH_FIELD = "[id^=comfy-vue-node-search-box-input], [role=dialog] input[role=combobox]"
SEARCH_RESULT = ".p-autocomplete-option, [data-testid=result-item]"

_READY = """() => {
    const app = window.app ?? window.comfyAPI?.app?.app;
    if (!app?.graph || !app.extensionManager?.setting || !LiteGraph.registered_node_types.DCDD_LoadJanus) return false;
    window.comfy = app;
    return true;
}"""

#: Returns when nothing has moved for some frames.
_SETTLE = """async () => {
    let before = "", still = 0;
    while (still < 4) {
        await new Promise(requestAnimationFrame);
        const drawn = [...document.querySelectorAll("[data-node-id]")].map((e) => [e.offsetWidth, e.offsetHeight]);
        const nodes = comfy.canvas.graph._nodes.map((node) => [...node.pos, ...node.size]);
        const now = JSON.stringify([nodes, drawn, comfy.canvas.ds.scale, comfy.canvas.ds.offset]);
        still = now === before ? still + 1 : 0;
        before = now;
    }
}"""

#: Boxes are [left, top, right, bottom] on the canvas, title bars included; with Nodes 2.0 those of what is drawn.
_SHOWN = """() => {
    const { scale, offset } = comfy.canvas.ds;
    const canvas = comfy.canvas.canvas.getBoundingClientRect();
    const drawn = (id) => {
        const box = document.querySelector(`[data-node-id="${id}"]`).getBoundingClientRect();
        const x = (box.x - canvas.x) / scale - offset[0], y = (box.y - canvas.y) / scale - offset[1];
        return [x, y, x + box.width / scale, y + box.height / scale];
    };
    const on_canvas = ({ pos: [x, y], size: [wide, tall] }, title) => [x, y - title, x + wide, y + tall];
    const nodes = comfy.canvas.graph._nodes.map((node) => ({
        id: String(node.id),
        type: node.type,
        known: node.type in LiteGraph.registered_node_types && !node.has_errors,
        box: LiteGraph.vueNodesMode ? drawn(node.id) : on_canvas(node, LiteGraph.NODE_TITLE_HEIGHT),
    }));
    const groups = comfy.canvas.graph._groups.map((group) => ({ title: group.title, box: on_canvas(group, 0) }));
    return { nodes, groups };
}"""

_OPEN = "(id) => { const node = comfy.graph.getNodeById(id); comfy.canvas.openSubgraph(node.subgraph, node); }"

#: Nodes one upon another, in sight.
_FILL = """(types) => {
    comfy.graph.clear();
    comfy.canvas.ds.reset();
    for (const type of types) {
        const node = LiteGraph.createNode(type);
        node.pos = [500, 300];
        comfy.graph.add(node);
    }
}"""

_PICTURED = """(file) =>
    [...document.querySelectorAll(".node-help-content img")].some((e) => e.src.endsWith(file) && e.naturalWidth > 0)
"""

_SELECT = """(type) => {
    const node = comfy.graph._nodes.find((node) => node.type === type);
    comfy.canvas.deselectAll();
    comfy.canvas.selectItems([node]);
    comfy.canvas.setDirty(true, true);
}"""

_FOUND = """([result, glance, name]) => {
    const first = [...document.querySelectorAll(result)].slice(0, glance);
    return first.some((one) => one.innerText.split("\\n").some((line) => line.trim() === name));
}"""

#: Once images and notices are on the nodes: with Nodes 2.0 the loaded <img>, on the canvas what it draws from.
_TOLD = """([images, texts]) => {
    const last = (id) => id.split(":").at(-1);
    const node = (id) => comfy.canvas.graph._nodes.find((node) => String(node.id) === last(id));
    const drawn = (id) => {
        if (!LiteGraph.vueNodesMode) return node(id).imgs?.length;
        return [...document.querySelectorAll(`[data-node-id="${last(id)}"] img`)].some((image) => image.naturalWidth);
    };
    const told = (id) => node(id).widgets?.some((widget) => widget.name === "$$node-text-preview");
    return images.every(drawn) && texts.every(told);
}"""

#: What the canvas and Nodes 2.0 draw a socket of a type, and the links from it, with.
_COLORS = """(types) => types.map((type) => {
    const probe = document.createElement("i");
    probe.style.color = `var(--color-datatype-${type}, transparent)`;
    document.body.append(probe);
    const css = getComputedStyle(probe).color;
    const named = [comfy.canvas.colourGetter.getConnectedColor(type), LGraphCanvas.link_type_colors[type]];
    const colors = [css, ...named.map((color) => { probe.style.color = color; return getComputedStyle(probe).color; })];
    probe.remove();
    return colors;
})"""


_CHOOSE = """([type, name, option]) => {
    const node = comfy.graph._nodes.find((node) => node.type === type);
    const widget = node.widgets.find((widget) => widget.name === name);
    widget.value = option;
    widget.callback?.(option);
    const saved = comfy.graph.serialize().nodes.find((saved) => String(saved.id) === String(node.id));
    return saved.widgets_values.find((value) => value === option);
}"""

_WIDGETS = """() => comfy.graph._nodes[0].widgets.map((widget) => [widget.label ?? widget.name, widget.value])"""


class ComfyPage:
    """One tab with ComfyUI's page in it."""

    def __init__(self, name: str, context: BrowserContext, server: FrontendServer, settings: dict[str, Any]):
        """Opens it with the page's own settings."""
        self.name, self.server = name, server
        server.settings = {"Comfy.Minimap.Visible": False, **settings}
        self._errors: list[str] = []
        self.tab = context.new_page()
        self.tab.set_default_timeout(PATIENCE)
        self.tab.on("console", self._listen)
        self.tab.on("pageerror", lambda error: self._errors.append(str(error)))
        self.tab.goto(server.url, wait_until="commit")
        self.tab.wait_for_function(_READY)
        self.settle()

    def _listen(self, message: ConsoleMessage) -> None:
        """Keeps errors, but for those about other machines, which cannot be reached from here."""
        url = message.location.get("url", "")
        foreign = url.startswith("http") and not url.startswith(self.server.url)
        # The page looks for docs/NODE/en.md before docs/NODE.md.
        looked_for = re.search(r"/docs/\w+/en\.md$", url)
        # What frontend 1.35 says of every subgraph that is opened, and of model files on other machines.
        usual = message.text.startswith(
            ("Attempted to cleanup event listeners for graph", "Error fetching file size: TypeError: Failed to fetch")
        )
        if message.type == "error" and not (foreign or looked_for or usual):
            self._errors.append(f"{message.text} {url}")

    def errors(self) -> list[str]:
        """What the console has shown since this was last called."""
        taken, self._errors = self._errors, []
        return taken

    # -- graphs

    def load(self, workflow: dict[str, Any]) -> None:
        """Opens a graph in the page, seen whole."""
        self.tab.evaluate("(workflow) => comfy.loadGraphData(workflow, true, true)", workflow)
        self.settle()

    def open_subgraph(self, node: int) -> None:
        """Goes into a node that is a graph itself."""
        self.tab.evaluate(_OPEN, node)
        self.tab.wait_for_function("() => comfy.canvas.graph !== (comfy.rootGraph ?? comfy.graph)")
        self.settle()

    def draws_runs(self, in_subgraph: bool) -> bool:
        """Whether `run` tells anything: frontend 1.35 draws no images inside a subgraph, and in its first Nodes 2.0
        of any height."""
        first = self.server.version.startswith("1.35.")
        return not first or not (in_subgraph or self.server.settings.get("Comfy.VueNodes.Enabled"))

    def run(self, images: Iterable[str], notices: Iterable[str]) -> None:
        """Puts on nodes, by their ids, what a run leaves there."""
        images, notices = list(images), list(notices)
        for node in images:
            self.server.show_image(node)
        for node in notices:
            self.server.show_text(node, NOTICE)
        self.tab.wait_for_function(_TOLD, arg=[images, notices])
        self.settle()

    def settle(self) -> None:
        self.tab.evaluate(_SETTLE)

    def shown(self) -> dict[str, list[dict[str, Any]]]:
        return self.tab.evaluate(_SHOWN)

    def overlays(self) -> list[str]:
        """Texts of the dialogs and notices that can be seen."""
        found = self.tab.locator(OVERLAYS).all()
        return [text for one in found if one.is_visible() and (text := one.inner_text().strip())]

    def close_overlays(self) -> None:
        """With none of them shown, the newest page would leave the subgraph instead."""
        self.tab.keyboard.press("Escape")

    def fill(self, types: list[str]) -> None:
        """A graph of unconnected nodes at one place."""
        self.tab.evaluate(_FILL, types)
        self.settle()

    # -- help, search, colors

    def help_page(self, node: str, image: str) -> str:
        """Selects the node and opens its help: the text, once the image is there too."""
        self.tab.evaluate(_SELECT, node)
        text = self.tab.locator(".node-help-content")
        if not text.is_visible():
            self.tab.get_by_test_id("info-button").click()
        self.tab.wait_for_function(_PICTURED, arg=image)
        return text.inner_text()

    def choose_option(self, node: str, widget: str, option: str) -> str:
        """Sets a combo; returns what a saved workflow says of it."""
        chosen = self.tab.evaluate(_CHOOSE, [node, widget, option])
        self.settle()
        return chosen

    def text_of(self, node: str) -> str:
        """All that a node shows, with Nodes 2.0."""
        number = self.tab.evaluate("(type) => String(comfy.graph._nodes.find((n) => n.type === type).id)", node)
        return self.tab.locator(f'[data-node-id="{number}"]').inner_text()

    def widgets(self) -> list[tuple[str, Any]]:
        """Of the first node: what its widgets are called, and their values."""
        return [(name, value) for name, value in self.tab.evaluate(_WIDGETS)]

    def queue(self) -> None:
        """Presses Run; nothing runs."""
        self.tab.evaluate("() => comfy.queuePrompt(0, 1)")
        self.settle()

    def search(self, words: str) -> None:
        """Types words into the node search, and opens it where it is not open yet."""
        field = self.tab.locator(SEARCH_FIELD)
        if not field.is_visible():
            self.fill([])
            self._open_search()
        field.fill(words)

    def _open_search(self) -> None:
        """A page that is slow takes a double click for two single ones: then once more."""
        for _ in range(5):
            self.tab.mouse.dblclick(VIEWPORT["width"] / 2, VIEWPORT["height"] / 2)
            try:
                self.tab.locator(SEARCH_FIELD).wait_for(timeout=SEARCH_PATIENCE)
            except NothingCame:
                continue
            return

    def found(self, name: str) -> bool:
        """Whether a node of that name comes up among the first that the search shows."""
        try:
            self.tab.wait_for_function(_FOUND, arg=[SEARCH_RESULT, GLANCE, name], timeout=SEARCH_PATIENCE)
        except NothingCame:
            return False
        return True

    def results(self) -> list[str]:
        return [text.splitlines()[0].strip() for text in self.tab.locator(SEARCH_RESULT).all_inner_texts() if text]

    def colors(self, types: list[str]) -> list[list[str]]:
        """Of each type: with Nodes 2.0, on the canvas, and of links."""
        return self.tab.evaluate(_COLORS, types)

    def choose_palette(self, name: str) -> None:
        self.tab.evaluate("(name) => comfy.extensionManager.setting.set('Comfy.ColorPalette', name)", name)
        self.settle()

    def close(self) -> None:
        self.tab.close()

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=str(path))
