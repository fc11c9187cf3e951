"""Browser, frontends and pages. Without playwright every test here is skipped: `make ui-test` installs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.test_schemas import FIELDS, aliases

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.ui.page import ComfyPage
    from tests.ui.server import FrontendServer

#: Of the two, one is a package of this environment; `make ui-test` unpacks the other beside the packages.
NEWEST, V0_8_0 = "newest", "v0.8.0"
CANVAS, NODES_2 = "canvas", "Nodes 2.0"
BROWSER = Path("/usr/bin/chromium")
REMEDY = "run `make ui-test`, which brings it"


def static_folder(frontend: str) -> Path:
    if frontend == NEWEST:
        spec = find_spec("comfyui_frontend_package")
        package = Path(spec.origin).parent if spec else Path(sys.prefix)
    else:
        package = Path(sys.prefix) / f"frontend-{frontend}" / "comfyui_frontend_package"
    if not (package / "static" / "index.html").is_file():
        pytest.fail(f"the frontend {frontend} is not there: {REMEDY}")
    return package / "static"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason=f"playwright is not installed: {REMEDY}")
    from tests.ui.page import FLAGS

    if not BROWSER.exists():
        pytest.fail(f"no {BROWSER}: {REMEDY}")
    with playwright.sync_playwright() as run:
        running = run.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def info() -> dict[str, Any]:
    """/object_info: the pack's nodes, and those of ComfyUI's that its workflows use."""
    from tests.ui.server import object_info

    return object_info(aliases(f"{FIELDS},search_aliases"))


@pytest.fixture(scope="module", params=[NEWEST, V0_8_0])
def frontend(request: pytest.FixtureRequest, browser: Browser, info: dict[str, Any]) -> Iterator[FrontendServer]:
    from tests.ui.server import FrontendServer

    with FrontendServer(static_folder(request.param), info) as server:
        yield server


@pytest.fixture(scope="module")
def open_page(browser: Browser, frontend: FrontendServer) -> Iterator[Callable[..., ComfyPage]]:
    """Opens the frontend's page, under a name that says what for, with the page's own settings."""
    from tests.ui.page import VIEWPORT, ComfyPage

    with browser.new_context(viewport=VIEWPORT) as context:
        yield lambda name, settings: ComfyPage(f"{frontend.version}, {name}", context, frontend, settings)


@pytest.fixture(scope="module", params=[CANVAS, NODES_2])
def page(request: pytest.FixtureRequest, open_page: Callable[..., ComfyPage]) -> Iterator[ComfyPage]:
    """The page in one of its two ways to draw nodes."""
    opened = open_page(request.param, {"Comfy.VueNodes.Enabled": request.param == NODES_2})
    yield opened
    opened.close()
