"""Loads the pack as ComfyUI does, and runs prompts in this process: `ComfyServer` of tests/comfy without a server."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.comfy.server import PACK, Prompt, Run
from tests.fake_comfy.core_nodes import CoreNode, core_nodes

MODULES = Path(__file__).with_name("modules")
_NUMBERS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


class Double:
    """ComfyUI with the pack in a base directory; a context manager.

    Outputs of nodes whose inputs are the same as once before are kept and used again, as ComfyUI does, but for those
    that end a graph and the one named `watched`.
    """

    def __init__(self, base: Path, extra: Path, watched: str = "it"):
        """
        Args:
            base: ComfyUI's base directory, with custom_nodes and models as `tests.comfy.conftest.prepare` makes them.
            extra: its extra_model_paths.yaml, in JSON.
            watched: the name of the node that always runs.
        """
        self.base, self._extra, self._watched = base, extra, watched
        self._modules = _Modules()
        self._kept: dict[str, tuple] = {}
        self._run, self._node = Run(), ""
        #: (file, line) of every frame that an exception of a node came through.
        self.raised_at: set[tuple[str, int]] = set()
        #: Previews of the last run: node -> what each report showed.
        self.shown: dict[str, list] = {}

    def __enter__(self) -> Double:
        with self._modules.installed():
            self._folders, self._comfy = self._module("folder_paths"), self._module("comfy")
            for name in ("cli_args", "model_management", "utils", "sd"):
                self._module(f"comfy.{name}")
            self._execution = self._module("comfy_execution.utils")
            self._blocker = self._module("comfy_execution.graph_utils").ExecutionBlocker
            self.show_previews("auto")
            self._folders.set_base_directory(self.base)
            for name in ("output", "temp"):
                (self.base / name).mkdir(exist_ok=True)
            for paths in json.loads(self._extra.read_text("utf-8")).values():
                self._folders.add_model_folder_path("janus", str(Path(paths["base_path"]) / paths["janus"]))
            server = self._module("server").PromptServer
            server.instance = server(lambda node, text: self._run.notices[node].append(text))
            self._comfy.utils.set_progress_bar_global_hook(self._report)
            self.pack = load(self.base / "custom_nodes" / PACK)
            extension = asyncio.run(self.pack.comfy_entrypoint())
            ours = {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}
            tools = load(self.base / "custom_nodes" / "dcdd_test_tools" / "tools_nodes.py").NODE_CLASS_MAPPINGS
            core = core_nodes(self._comfy, self._folders)
        self.nodes: dict[str, Any] = {
            **{k: _Ours(v) for k, v in ours.items()},
            **{k: _Old(v) for k, v in tools.items()},
        }
        self.nodes |= {k: _Core(v) for k, v in core.items()}
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()
        for name in [name for name in sys.modules if name.startswith(str(self.base))]:
            del sys.modules[name]

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(name)

    # --- as of a server -----------------------------------------------------------------------------------------------

    def get(self, path: str) -> dict[str, Any]:
        """/object_info."""
        assert path == "/object_info", path
        with self._modules.installed():
            return {name: node.info() for name, node in self.nodes.items()}

    def show_previews(self, method: str) -> None:
        """As --preview-method does."""
        self._comfy.cli_args.args.preview_method = self._comfy.cli_args.LatentPreviewMethod(method)

    def saved(self, name: str) -> dict[str, np.ndarray]:
        """What a TEST_Save of that name wrote."""
        with np.load(self.base / "output" / f"{name}.npz") as file:
            return dict(file)

    def run(self, prompt: Prompt) -> Run:
        """Runs a prompt in the API format; on the first fault it ends."""
        self._run, self.shown = Run(), {}
        run = self._run
        with self._modules.installed(), torch.inference_mode(), _offline(), _one_thread():
            faults = [fault for name in prompt for fault in self._faults(name, prompt)]
            if faults:
                run.status, run.error = "rejected", "\n".join(faults)
                return run
            outputs: dict[str, tuple] = {}
            for name in _ordered(prompt):
                try:
                    outputs[name] = self._executed(name, prompt, outputs)
                except self._comfy.model_management.InterruptProcessingException:
                    run.status, run.node = "interrupted", name
                    return run
                except Exception as error:
                    frames = traceback.extract_tb(error.__traceback__)
                    self.raised_at |= {(frame.filename, frame.lineno or 0) for frame in frames}
                    run.status, run.node, run.error = "error", name, str(error).strip()
                    run.error_type = type(error).__name__
                    return run
                finally:
                    self._comfy.model_management.interrupt_current_processing(False)
        run.status = "success"
        return run

    def _faults(self, name: str, prompt: Prompt) -> Iterator[str]:
        """What the server refuses before it runs anything: the least that every version does."""
        kind, given = prompt[name]["class_type"], prompt[name]["inputs"]
        entry = self.nodes[kind].info()["input"]
        yield from (
            f"{kind}: Required input is missing: {key}" for key in entry.get("required", {}) if key not in given
        )
        for key, (wanted, *more) in {**entry.get("required", {}), **entry.get("optional", {})}.items():
            value, limits = given.get(key), more[0] if more else {}
            if key not in given or not isinstance(wanted, str):
                continue
            if _is_link(value):
                came = self.nodes[prompt[value[0]]["class_type"]].info()["output"][value[1]]
                if "*" not in (came, wanted) and came != wanted:
                    yield f"{kind}: Return type mismatch: {key}, {came} to {wanted}"
            elif wanted in _NUMBERS:
                value = given[key] = _NUMBERS[wanted](value)
                if "min" in limits and value < limits["min"]:
                    yield f"{kind}: Value {value} smaller than min of {limits['min']}: {key}"
                if "max" in limits and value > limits["max"]:
                    yield f"{kind}: Value {value} bigger than max of {limits['max']}: {key}"

    def _executed(self, name: str, prompt: Prompt, outputs: Mapping[str, tuple]) -> tuple:
        node, key = self.nodes[prompt[name]["class_type"]], self._key(name, prompt)
        if key in self._kept and name != self._watched and not node.always:
            self._run.cached.append(name)
            return self._kept[key]
        given = {k: outputs[v[0]][v[1]] if _is_link(v) else v for k, v in prompt[name]["inputs"].items()}
        before = {k: _digest(v) for k, v in given.items()}
        self._run.executed.append(name)
        for value in given.values():
            if isinstance(value, self._blocker):
                if value.message is not None:
                    self._run.blocked[name] = f"Execution Blocked: {value.message}"
                return (self._blocker(None),) * len(node.info()["output"])
        self._node = name
        with self._execution.executing(name):
            result, ui = node.run(given)
        changed = [k for k, v in given.items() if _digest(v) != before[k]]
        assert not changed, f"{name} changed what came into it: {changed}"
        if ui:
            self._run.outputs[name] = ui
        told = node.info()["output"]
        assert len(result) == len(told), f"{name} has {len(told)} outputs, and gave {len(result)}"
        if isinstance(node, _Ours):
            for kind, value in zip(told, result):
                if not isinstance(value, self._blocker):
                    _check_convention(name, kind, value)
        self._kept[key] = result
        return result

    def _key(self, name: str, prompt: Prompt) -> str:
        """What makes a node's outputs: itself, its inputs, the nodes behind them, and its files."""
        node = self.nodes[prompt[name]["class_type"]]
        given = {
            k: [self._key(v[0], prompt), v[1]] if _is_link(v) else v for k, v in sorted(prompt[name]["inputs"].items())
        }
        return json.dumps([prompt[name]["class_type"], given, node.state(given)])

    def _report(self, value: int, total: int, preview: Any) -> None:
        self._run.progress[self._node].append((value, total))
        if preview is not None:
            kind, image, longest = preview
            assert kind == "JPEG" and image.mode == "RGB" and longest > 0
            self._run.previews[self._node] += 1
            self.shown.setdefault(self._node, []).append(image)


# --- kinds of nodes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ours:
    """A node of the version 3 schema."""

    node: type

    @property
    def always(self) -> bool:
        return self.node.define_schema().is_output_node

    def info(self) -> dict[str, Any]:
        return self.node.define_schema().info(f"custom_nodes.{PACK}")

    def state(self, given: dict[str, Any]) -> str | None:
        try:
            return self.node.fingerprint_inputs(**given) if hasattr(self.node, "fingerprint_inputs") else None
        except ValueError:
            # ComfyUI logs it and runs the node, which fails by itself.
            return None

    def run(self, given: dict[str, Any]) -> tuple[tuple, Any]:
        output = self.node.locked().execute(**given)
        return output.args, output.ui


@dataclass(frozen=True)
class _Old:
    """A node of the first schema: those of the test-only pack."""

    node: type

    @property
    def always(self) -> bool:
        return getattr(self.node, "OUTPUT_NODE", False) or hasattr(self.node, "IS_CHANGED")

    def info(self) -> dict[str, Any]:
        outputs = list(self.node.RETURN_TYPES)
        entry = {"input": self.node.INPUT_TYPES(), "output": outputs, "output_name": outputs}
        return {
            **entry,
            "output_node": getattr(self.node, "OUTPUT_NODE", False),
            "python_module": "custom_nodes.dcdd_test_tools",
        }

    def state(self, given: dict[str, Any]) -> None:
        return None

    def run(self, given: dict[str, Any]) -> tuple[tuple, Any]:
        return _answer(getattr(self.node(), self.node.FUNCTION)(**given))


@dataclass(frozen=True)
class _Core:
    """One of ComfyUI's own."""

    node: CoreNode

    @property
    def always(self) -> bool:
        return self.node.shows

    def info(self) -> dict[str, Any]:
        return self.node.info()

    def state(self, given: dict[str, Any]) -> None:
        return None

    def run(self, given: dict[str, Any]) -> tuple[tuple, Any]:
        assert self.node.run is not None, "the double knows the sockets of this node alone"
        return _answer(self.node.run(**given))


def _answer(value: Any) -> tuple[tuple, Any]:
    return (tuple(value.get("result", ())), value.get("ui")) if isinstance(value, dict) else (tuple(value), None)


# --- parts ------------------------------------------------------------------------------------------------------------


class _Modules:
    """The stand-ins in the place of whatever has their names, for as long as one looks; then all is as before."""

    def __init__(self):
        self._tops = {path.stem for path in MODULES.iterdir() if not path.name.startswith("_")}
        self._ours: dict[str, ModuleType] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        theirs = self._taken()
        sys.modules.update(self._ours)
        sys.path.insert(0, str(MODULES))
        try:
            yield
        finally:
            sys.path.remove(str(MODULES))
            self._ours = self._taken()
            sys.modules.update(theirs)

    def _taken(self) -> dict[str, ModuleType]:
        found = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in self._tops}
        for name in found:
            del sys.modules[name]
        return found


def load(path: Path) -> ModuleType:
    """A folder or file of custom_nodes as a module of the name that ComfyUI gives it: its path, without dots."""
    name = str(path.with_suffix("")).replace(".", "_x_")
    file, inside = (path / "__init__.py", [str(path)]) if path.is_dir() else (path, None)
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _offline() -> Iterator[None]:
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """For models this small, threads waiting for each other cost more than they bring, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_link(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str)


def _ordered(prompt: Prompt) -> list[str]:
    """Every node behind those that it needs."""
    done: list[str] = []

    def visit(name: str) -> None:
        for value in prompt[name]["inputs"].values():
            if _is_link(value):
                visit(value[0])
        if name not in done:
            done.append(name)

    for name in prompt:
        visit(name)
    return done


def _digest(value: Any) -> Any:
    """Changes when a tensor in it does."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), hash(value.contiguous().view(-1).numpy().tobytes())
    if is_dataclass(value):
        return tuple(_digest(getattr(value, one.name)) for one in fields(value))
    if isinstance(value, dict):
        return tuple((key, _digest(one)) for key, one in sorted(value.items()))
    return None


def _check_convention(node: str, kind: str, value: Any) -> None:
    """What other packs' nodes rely on."""
    match kind:
        case "IMAGE" | "MASK":
            assert value.ndim == (4 if kind == "IMAGE" else 3), f"{node}: {kind} {list(value.shape)}"
            assert kind == "MASK" or value.shape[3] == 3, f"{node}: {kind} {list(value.shape)}"
            assert value.dtype == torch.float32 and value.device.type == "cpu" and value.is_contiguous(), node
            assert value.min() >= 0 and value.max() <= 1, f"{node}: {kind} from {value.min()} to {value.max()}"
        case "LATENT":
            samples, area = value["samples"], value.get("noise_mask")
            assert samples.ndim == 4 and samples.dtype == torch.float32 and samples.device.type == "cpu", node
            assert area is None or (area.ndim == 4 and area.shape[1] == 1), f"{node}: noise_mask {list(area.shape)}"
        case "STRING":
            assert isinstance(value, str), f"{node}: {type(value)}"
