"""The house rules that no unit test sees: who imports whom, what is never called, how the pack loads and ships."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.shipped import copy_shipped

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# Room -> the rooms it may import from, itself always included. A module belongs to the longest name that fits it.
FOUNDATION = ("dcdd_core.types", "dcdd_core.protocols", "dcdd_core.files", "dcdd_core.int8_rows", "dcdd_core.settings")
MODELS = ("dcdd_core.models", "dcdd_core.registry", "dcdd_core.method", *FOUNDATION)
# What of the embedded world the nodes use. It imports nothing of the library.
PICO_LEAVES = ("dcdd_pico.embedded", "dcdd_pico.scenes")
ROOMS: dict[str, tuple[str, ...]] = {
    "dcdd_core.files": ("dcdd_core.int8_rows", "dcdd_core.settings"),
    "dcdd_core.int8_rows": (),
    "dcdd_core.settings": (),
    "dcdd_core.types": ("dcdd_core.files", "dcdd_core.settings"),
    "dcdd_core.protocols": ("dcdd_core.types", "dcdd_core.settings"),
    "dcdd_core.method": FOUNDATION,
    "dcdd_core.models": ("dcdd_core.registry", "dcdd_core.method", *FOUNDATION),
    "dcdd_core.registry": FOUNDATION,  # it finds the families by name, when they are asked for
    "dcdd_core.pipelines": MODELS,
    "dcdd_core.training": ("dcdd_core.pipelines", *MODELS),
    "dcdd_core.evaluation": ("dcdd_core.pipelines", *MODELS),
    "dcdd_pico.embedded": (),
    "dcdd_pico.scenes": (),
    "dcdd_pico": ("dcdd_core.evaluation", "dcdd_core.training", "dcdd_core.pipelines", *PICO_LEAVES, *MODELS),
    "dcdd_core.cli": ("dcdd_core", "dcdd_pico"),  # all of both
    "dcdd_core": ("dcdd_core.types",),
    "nodes": ("dcdd_core.evaluation", "dcdd_core.training", "dcdd_core.pipelines", *PICO_LEAVES, *MODELS),
    "": ("nodes",),  # the pack's own __init__.py
}
# Programs and what only they use: they run as top-level packages, never inside ComfyUI, and import absolutely.
PROGRAMS = ("dcdd_core.cli", "dcdd_pico")

COMFY = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "nodes", "server"}
UNSAFE_MODULES = {"dill", "joblib", "marshal", "pickle", "pip", "subprocess"}
UNSAFE_CALLS = {"__import__", "eval", "exec", "os.popen", "os.system"}
# Rooms in which every public name has a docstring.
DOCUMENTED = (
    "dcdd_core.types",
    "dcdd_core.files",
    "dcdd_core.method",
    "dcdd_core.models",
    "dcdd_core.pipelines",
    "dcdd_core.evaluation",
    "dcdd_core.training",
    "dcdd_core.cli.parser",
)
GLOBAL_SEEDS = {
    "np.random.seed",
    "numpy.random.seed",
    "random.seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.seed",
}


def pack_files() -> list[Path]:
    """Every Python file that ComfyUI can load: the pack's __init__.py, its nodes, the library."""
    return [
        ROOT / "__init__.py",
        *(p for room in ("dcdd_core", "dcdd_pico", "nodes") for p in sorted((ROOT / room).rglob("*.py"))),
    ]


def module_name(path: Path) -> str:
    """dcdd_core/method/lcdm.py -> dcdd_core.method.lcdm; the pack's __init__.py -> the empty name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in pack_files()}
TREES = {module: ast.parse(path.read_text("utf-8"), str(path)) for module, path in MODULES.items()}


def imports(module: str) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, relative?) of every import, at any depth; relative ones resolved from the pack's root."""
    is_package = MODULES[module].name == "__init__.py"
    package = [part for part in (module if is_package else module.rpartition(".")[0]).split(".") if part]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}".lstrip(".")
                yield (submodule if submodule in MODULES else base), node.lineno, node.level > 0


def room_of(module: str) -> str:
    return max((room for room in ROOMS if within(module, room)), key=len)


def within(module: str, room: str) -> bool:
    return room == "" or module == room or module.startswith(room + ".")


def dotted(node: ast.AST) -> str:
    """torch.random.fork_rng as written; empty for anything that is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    return ((dotted(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_imports_point_one_way():
    TopologicalSorter(ROOMS).prepare()  # raises CycleError, should the table itself run in a circle
    wrong = []
    for module, path in MODULES.items():
        room = room_of(module)
        for target, line, relative in imports(module):
            own = relative or target.split(".")[0] in ("dcdd_core", "dcdd_pico")
            if own and room_of(target) != room and not any(within(target, door) for door in ROOMS[room]):
                doors = ", ".join(ROOMS[room]) or "nothing else"
                wrong.append(f"{path}:{line}: imports {target}, but {room or 'the root'} may import {doors}")
    assert not wrong, "\n".join(wrong)


# A family's own classes -> the modules that may name them. Everything else asks the registry.
FAMILIES = {
    "FluxTransformer2DModel": ("dcdd_core.models.backbones.flux_fill",),
    "FluxFill": ("dcdd_core.models.backbones.flux_fill",),
    # In the nodes it is ComfyUI's own class of that name.
    "AutoencoderKL": ("dcdd_core.models.vae", "nodes.core_models"),
    "KLCodec": ("dcdd_core.models.vae",),
    "JanusForConditionalGeneration": ("dcdd_core.models.janus",),
    "JanusSampler": ("dcdd_core.models.janus",),
    "JanusVQVAE": ("dcdd_core.models.janus", "dcdd_core.models.llamagen", "dcdd_core.models.vq"),
    "LlamaGenSampler": ("dcdd_core.models.llamagen",),
    "LlamaGenTransformer": ("dcdd_core.models.llamagen",),
    "VQTokenizer": (
        "dcdd_core.models.janus",
        "dcdd_core.models.llamagen",
        "dcdd_core.models.masked",
        "dcdd_core.models.vq",
    ),
    "UVit2DModel": ("dcdd_core.models.masked",),
    "VQModel": ("dcdd_core.models.masked",),
}


def test_no_family_is_named_outside_its_module():
    wrong = [
        f"{MODULES[module]}:{node.lineno}: {name}"
        for module, tree in TREES.items()
        if not within(module, "dcdd_pico")  # which makes one model of each family
        for node in ast.walk(tree)
        for name in [node.id if isinstance(node, ast.Name) else node.name if isinstance(node, ast.alias) else ""]
        if name in FAMILIES and not any(within(module, home) for home in FAMILIES[name])
    ]
    assert not wrong, "\n".join(["a second family would have to change these too; ask the registry:", *wrong])


def test_own_code_is_imported_relatively():
    found = absolute_imports("", {"dcdd_core", "dcdd_pico", "nodes"})
    programs = tuple(str(ROOT / room.replace(".", "/")) for room in PROGRAMS)
    wrong = [line for line in found if not line.startswith(programs)]
    assert not wrong, "\n".join(["ComfyUI loads the pack under a name of its own; write these relatively:", *wrong])


def test_warnings_are_of_the_librarys_own_class():
    wrong = [
        f"{MODULES[module]}:{call.lineno}"
        for module, tree in TREES.items()
        for name, call in calls(tree)
        if name == "warnings.warn" and (len(call.args) < 2 or dotted(call.args[1]) != "DCDDWarning")
    ]
    assert not wrong, "\n".join(["hosts tell a user of DCDDWarning alone; these are of another class:", *wrong])


def test_library_does_not_know_comfyui():
    wrong = absolute_imports("dcdd_core", COMFY)
    assert not wrong, "\n".join(["ComfyUI belongs in nodes/, not in the library:", *wrong])


def absolute_imports(room: str, names: set[str]) -> list[str]:
    return [
        f"{MODULES[module]}:{line}: {name}"
        for module in MODULES
        if within(module, room)
        for name, line, relative in imports(module)
        if not relative and name.split(".")[0] in names
    ]


def test_root_imports_only_inside_functions():
    top = [node.lineno for node in TREES[""].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not top, f"__init__.py, lines {top}: an import at the top runs when pytest collects the folder"


def test_nothing_unsafe_is_imported_or_called():
    wrong = absolute_imports("", UNSAFE_MODULES)
    for module, path in MODULES.items():
        for name, call in calls(TREES[module]):
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            unsafe = {
                f"{name}()": name in UNSAFE_CALLS,
                "trust_remote_code": "trust_remote_code" in keywords,
                "allow_pickle=True": is_true(keywords.get("allow_pickle")),
                "torch.load without weights_only=True": name == "torch.load"
                and not is_true(keywords.get("weights_only")),
            }
            wrong += [f"{path}:{call.lineno}: {what}" for what, found in unsafe.items() if found]
    assert not wrong, "\n".join(wrong)


def test_what_is_public_says_what_it_is():
    wrong = [
        f"{MODULES[module]}:{node.lineno}: {node.name}"
        for module in MODULES
        if any(within(module, room) for room in DOCUMENTED)
        for node in public(TREES[module])
        if ast.get_docstring(node) is None and not is_bare(node)
    ]
    assert not wrong, "\n".join(["these have no docstring:", *wrong])


def public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The public classes and functions of a module with their public methods; what is inside of a function is not."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def is_bare(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether this is a protocol's method, whose body is `...` alone."""
    return isinstance(node, ast.FunctionDef) and [ast.unparse(part) for part in node.body] == ["..."]


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def test_global_seed_is_left_alone():
    wrong = []
    for module, path in MODULES.items():
        forked = {
            call
            for block in ast.walk(TREES[module])
            if isinstance(block, ast.With) and any(is_fork(item.context_expr) for item in block.items)
            for statement in block.body
            for _, call in calls(statement)
        }
        wrong += [
            f"{path}:{call.lineno}: {name}"
            for name, call in calls(TREES[module])
            if name in GLOBAL_SEEDS and call not in forked
        ]
    remedy = "these seed the whole process; use a torch.Generator, or `with torch.random.fork_rng()` around them:"
    assert not wrong, "\n".join([remedy, *wrong])


def is_fork(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and dotted(node.func) == "torch.random.fork_rng"


# Run in a process of its own, given the pack's folder. First it loads the pack as ComfyUI does (nodes.py,
# load_custom_node), with the names that the pack must not use blocked, and every module of the library under that name.
# Then, everything else being loaded, it imports the library once more and notes what that alone touches.
LOADER = r"""
import importlib, importlib.util, json, os, sys
from importlib.abc import MetaPathFinder

folder = sys.argv[1]
report = {"blocked": [], "failed": {}, "touched": [], "global seed kept": None, "early": []}

class Blocked(MetaPathFinder):
    names = {"dcdd_core", "dcdd_pico", "nodes"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            report["blocked"].append(name)
            raise ImportError(f"{name}: an absolute import of the pack's own code")

sys.meta_path.insert(0, Blocked())
name = folder.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(
    name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
)
sys.modules[name] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)

importlib.import_module(name + ".dcdd_core")
report["early"] = sorted({"diffusers", "matplotlib", "skimage", "torch", "transformers"} & set(sys.modules))

modules = ["dcdd_pico.embedded", "dcdd_pico.scenes"]
for top, folders, files in os.walk(os.path.join(folder, "dcdd_core")):
    inside = os.path.relpath(top, folder).replace(os.sep, ".")
    modules += [inside if f == "__init__.py" else f"{inside}.{f[:-3]}" for f in files if f.endswith(".py")]
modules = [m for m in modules if not m.startswith("dcdd_core.cli")]

def import_all():
    for module in sorted(modules):
        try:
            importlib.import_module(f"{name}.{module}")
        except Exception as error:
            report["failed"][module] = f"{type(error).__name__}: {error}"

import_all()
for loaded in [m for m in sys.modules if m.startswith(name + ".")]:
    del sys.modules[loaded]

import torch
before = torch.get_rng_state()
watching = True

def watch(event, args):
    if not watching:
        return
    writes = event == "open" and (args[1] and set(args[1]) & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR))
    if writes or event.startswith(("socket.", "subprocess.", "tempfile.")) or event in {"os.mkdir", "os.rename"}:
        report["touched"].append(f"{event} {args[0]!r}")

sys.addaudithook(watch)
import_all()
watching = False
report["global seed kept"] = bool(torch.equal(before, torch.get_rng_state()))
report["modules"] = len(modules)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What LOADER saw of the pack as it ships, in a folder with a hyphen in its name, as users have it."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files ship")
    folder = tmp_path_factory.mktemp("custom_nodes") / "ComfyUI-DCDD"
    copy_shipped(folder, lambda name: name.endswith((".py", ".txt")))
    # -I: neither the working directory nor PYTHONPATH helps; -B: Python's own caches are no writing of ours.
    done = subprocess.run([sys.executable, "-I", "-B", "-c", LOADER, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_pack_loads_under_a_name_of_comfyuis(loaded: dict):
    assert not loaded["failed"] and not loaded["blocked"], loaded
    assert loaded["modules"] > 5


def test_import_does_no_work(loaded: dict):
    assert not loaded["early"], f"`import dcdd_core` alone loads {loaded['early']}"
    assert not loaded["touched"], f"importing the library touched: {loaded['touched']}"
    assert loaded["global seed kept"], "importing the library drew from, or set, the global random generator"


def test_requirements_are_those_of_the_package_without_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    required = {bounds(line) for line in lines}
    torches = {"torch", "torchaudio", "torchvision"}
    assert not {name for name, _ in required} & torches, "ComfyUI brings torch: installing one would replace it"
    assert required == {bounds(line) for line in project["dependencies"]} - {("torch", "")}
    assert all("==" not in bound and "<" not in bound for _, bound in required), "no pins: other packs live here too"
    orders = [[bounds(line)[0] for line in among] for among in (lines, project["dependencies"])]
    assert all(order.index("transformers") < order.index("diffusers") for order in orders), "see requirements.txt"


def bounds(line: str) -> tuple[str, str]:
    requirement = Requirement(line)
    assert requirement.url is None, f"{line}: only released packages"
    return canonicalize_name(requirement.name), str(requirement.specifier)


def test_constraints_pin_everything_and_name_no_place():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    loose = [str(pin) for pin in pins if pin.url or not re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier))]
    assert not loose, f"one exact version each, without a local suffix such as +cpu: {loose}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    marked = [Requirement(line) for line in wanted]
    names = {canonicalize_name(pin.name): pin for pin in pins}
    for requirement in (r for r in marked if r.marker is None):
        pin = names.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not pinned in constraints.txt"
        (version,) = (specifier.version for specifier in pin.specifier)
        assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def test_no_file_names_a_machine_or_a_registry():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are the project's")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    # In pieces, or this file would find itself.
    forbidden = re.compile(rb"files\.python" + rb"hosted|pypi" + rb"\.org|(?<![\w.~-])/(?:root|work)" + rb"/")
    wrong = {}
    for path in (ROOT / name for name in listed.stdout.decode().split("\0") if name):
        if path.is_file() and (found := forbidden.search(path.read_bytes())):
            wrong[str(path.relative_to(ROOT))] = found.group().decode()
    assert not wrong, wrong
