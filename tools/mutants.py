"""Mutation testing: makes small changes to the scientific code, each of which should make a test fail.

    python tools/mutants.py                     every module of MODULES, then docs/mutants.md
    python tools/mutants.py method/lcdm sections  modules whose path contains one of the words
    python tools/mutants.py --report            docs/mutants.md from the last results alone
    python tools/mutants.py --show method/lcdm  the survivors of the last run

Most mutations are cosmic-ray's; `own_mutations` adds others. A copy of the tree is mutated, never the tree itself. A
server process imports torch, diffusers and other libraries once and forks for each mutant. The tests that killed
earlier mutants run first. Results are kept in out/mutants/results.json: an interrupted run continues where it stopped,
survivors are run again, and a module whose source changed starts over. Docstrings, annotations and the texts of errors
and warnings are not mutated. equivalent_mutants.toml, beside this file, gives the reason why each survivor is
equivalent to the original.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import difflib
import gc
import hashlib
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cosmic_ray.ast
import cosmic_ray.mutating
import cosmic_ray.plugins
import tomllib

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "out" / "mutants"
TREE, RESULTS = WORK / "tree", WORK / "results.json"
EQUIVALENT, REPORT = ROOT / "tools" / "equivalent_mutants.toml", ROOT / "docs" / "mutants.md"
ALLOWED = 0.03
"""Largest share of a module's mutants that may survive; a single survivor is allowed in any case."""

MODULES = {
    "dcdd_core/method/calibration.py": ("tests/method/test_calibration.py", "tests/method/test_lcdm.py"),
    "dcdd_core/method/chunks.py": (
        "tests/method/test_chunks.py",
        "tests/method/test_lcdm.py",
        "tests/method/test_calibration.py",
    ),
    "dcdd_core/method/flow.py": ("tests/method/test_flow.py",),
    "dcdd_core/method/guidance.py": ("tests/method/test_guidance.py",),
    "dcdd_core/method/latents.py": ("tests/method/test_latents.py",),
    "dcdd_core/method/lcdm.py": ("tests/method/test_lcdm.py", "tests/method/test_statistics.py"),
    "dcdd_core/method/sampling.py": ("tests/method/test_sampling.py",),
    "dcdd_core/method/statistics.py": ("tests/method/test_statistics.py", "tests/method/test_lcdm.py"),
    "dcdd_core/method/uncertainty.py": ("tests/method/test_uncertainty.py",),
    "dcdd_core/models/adapter.py": ("tests/models/test_adapter_reference.py", "tests/models/test_adapter.py"),
    "dcdd_core/training/loss.py": ("tests/training/test_loss.py",),
    "dcdd_core/training/schedules.py": ("tests/training/test_schedules.py",),
    "dcdd_core/training/ema.py": ("tests/training/test_ema.py",),
    "dcdd_core/evaluation/metrics.py": ("tests/evaluation/test_metrics.py",),
    "dcdd_core/evaluation/frechet.py": ("tests/evaluation/test_frechet.py",),
    "dcdd_core/evaluation/report.py": ("tests/evaluation/test_report.py",),
    "dcdd_core/evaluation/tables.py": ("tests/evaluation/test_tables.py",),
    "dcdd_pico/results_table.py": ("tests/pico/test_results_table.py",),
    "dcdd_pico/sections.py": (
        "tests/pico/test_sections.py",
        "tests/pico/test_results_table.py",
        "tests/pico/test_paper_report.py",
    ),
    "dcdd_pico/paper_report.py": ("tests/pico/test_paper_report.py",),
}
"""Each module, and the tests that should kill its mutants."""

# Those of cosmic-ray's operator replacements after which the code still computes something.
OPERATORS = (
    *(
        f"core/ReplaceBinaryOperator_{pair}"
        for pair in (
            *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul", "LShift_RShift"),
            *("RShift_LShift", "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitOr"),
        )
    ),
    *(
        f"core/ReplaceComparisonOperator_{pair}"
        for pair in (
            *("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt", "Eq_NotEq", "NotEq_Eq"),
            *("Is_IsNot", "IsNot_Is"),
        )
    ),
    *(f"core/ReplaceUnaryOperator_{change}" for change in ("Delete_USub", "Delete_Not", "Delete_Invert")),
    *("core/AddNot", "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue", "core/ReplaceAndWithOr"),
    *("core/ReplaceOrWithAnd", "core/ReplaceBreakWithContinue", "core/ReplaceContinueWithBreak"),
    *("core/ExceptionReplacer", "core/NumberReplacer", "core/RemoveDecorator", "core/ZeroIterationForLoop"),
)
OTHER_CHOICE = {
    **{"bilinear": "nearest", "nearest": "bilinear", "vlm": "proxy", "proxy": "vlm", "mean": "sum", "sum": "mean"},
    **{"reflect": "constant", "constant": "reflect", "ij": "xy"},
}
"""A string argument that selects an option, and the other option."""

DEFAULTS = ("mode='nearest'", "align_corners=False", "indexing='ij'")
"""Arguments equal to the default: dropping one changes nothing."""


@dataclass(frozen=True)
class Mutant:
    """One changed line (or block) of a module; `ordinal` counts equal changes."""

    before: str
    after: str
    ordinal: int
    source: str
    """The whole module, mutated."""

    @property
    def key(self) -> str:
        return json.dumps([self.before, self.after, self.ordinal])


def mutants_of(source: str) -> list[Mutant]:
    silent = list(left_alone(source))
    seen, counts, found = {source}, Counter(), []
    for mutated in (*cosmic_ray_mutations(source, silent), *own_mutations(source, silent)):
        if mutated in seen:
            continue
        seen.add(mutated)
        try:
            compile(mutated, "mutant", "exec")
        except SyntaxError:
            continue
        before, after = changed_lines(source, mutated)
        counts[before, after] += 1
        found.append(Mutant(before, after, counts[before, after], mutated))
    return found


def changed_lines(source: str, mutated: str) -> tuple[str, str]:
    pair = ([], [])
    for line in difflib.unified_diff(source.splitlines(), mutated.splitlines(), lineterm="", n=0):
        if line[:1] in "-+" and line[:3] not in ("---", "+++"):
            pair[line[0] == "+"].append(line[1:].strip())
    return "\n".join(pair[0]).strip(), "\n".join(pair[1]).strip()


def span(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def left_alone(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans of (line, column) that are not mutated: annotations, messages, class decorators.

    The sign of -1 is among them: the last dimension of a matrix is dimension 1.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield span(node.annotation)
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield span(node.returns)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from map(span, node.exc.args)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            yield from map(span, (*node.args, *node.keywords))
        elif isinstance(node, ast.ClassDef):
            yield from map(span, node.decorator_list)
        elif isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-1":
            yield (node.lineno, node.col_offset), (node.lineno, node.col_offset + 1)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            yield span(node)


def cosmic_ray_mutations(source: str, silent: list) -> Iterator[str]:
    class Places(cosmic_ray.ast.Visitor):
        def __init__(self, operator):
            self.operator, self.found = operator, []

        def visit(self, node):
            self.found += [start for start, _ in self.operator.mutation_positions(node)]
            return node

    lines = source.splitlines()
    for name in OPERATORS:
        operator = cosmic_ray.plugins.get_operator(name)()
        places = Places(operator)
        places.walk(cosmic_ray.ast.get_ast(source))
        for occurrence, start in enumerate(places.found):
            star = lines[start[0] - 1][start[1] : start[1] + 2] == "*,"  # the `*` of a signature
            if not star and not any(first <= start < last for first, last in silent):
                mutated = cosmic_ray.mutating.mutate_code(source, operator, occurrence)
                if mutated is not None:
                    yield mutated


def own_mutations(source: str, silent: list) -> Iterator[str]:
    """Drops arguments, statements and operands, forces branches of `if` expressions, and swaps string options."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    data = b"".join(lines)

    def at(place: tuple[int, int]) -> int:
        return starts[place[0] - 1] + place[1]

    def replaced(node: ast.AST, text: str) -> str:
        first, last = map(at, span(node))
        return (data[:first] + text.encode() + data[last:]).decode()

    for node in ast.walk(ast.parse(source)):
        if not hasattr(node, "lineno") or any(first <= span(node)[0] < last for first, last in silent):
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func) not in ("len", "range", "warnings.warn"):
            named = [word for word in node.keywords if ast.unparse(word) not in DEFAULTS]
            for dropped in (*named, *node.args[-1:] * (len(node.args) > 1)):
                kept = [ast.unparse(a) for a in (*node.args, *node.keywords) if a is not dropped]
                yield replaced(node, f"{ast.unparse(node.func)}({', '.join(kept)})")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Add | ast.Sub | ast.Div):
            sides = (node.left, node.right) if isinstance(node.op, ast.Mult | ast.Add) else (node.left,)
            for side in sides:
                if not any(isinstance(part, ast.Constant) for part in (node.left, node.right)):
                    yield replaced(node, f"({ast.unparse(side)})")
        elif isinstance(node, ast.IfExp):
            for branch in (node.body, node.orelse):
                yield replaced(node, f"({ast.unparse(branch)})")
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            other = ast.NotIn() if isinstance(node.ops[0], ast.In) else ast.In()
            yield replaced(node, ast.unparse(ast.Compare(node.left, [other, *node.ops[1:]], node.comparators)))
        elif isinstance(node, ast.Constant) and node.value in OTHER_CHOICE:
            yield replaced(node, repr(OTHER_CHOICE[node.value]))
        elif isinstance(node, ast.AugAssign | ast.Expr) and not isinstance(getattr(node, "value", None), ast.Constant):
            yield replaced(node, "pass")


class Server:
    """Runs tests in forks of this process, which has already imported the third-party modules that they need."""

    def __init__(self, tests: tuple[str, ...]):
        self.tests, self.kills, self.seconds = tests, Counter(), {}
        # Torch imports many of its modules at the first call of a function, so the tests are run, not only collected.
        for name in self._call(lambda: self._tests() and self._outside(), 3600) or ():
            try:
                importlib.import_module(name)
            except Exception:  # optional or conditional imports of a library
                continue
        # A garbage collection in a fork would write to, and so copy, all memory of the imported modules.
        gc.collect()
        gc.freeze()

    def run(self, limit: float) -> dict:
        """Exit code, the first test that failed, and the seconds of each test. The code is None after a timeout."""
        return self._call(self._tests, limit) or {"code": None, "failed": None, "seconds": {}}

    def _outside(self) -> list[str]:
        return sorted(
            name
            for name, module in list(sys.modules.items())
            if getattr(module, "__file__", None) and str(TREE) not in module.__file__ and not name.startswith("_")
        )

    def _tests(self) -> dict:
        import pytest

        known, seconds, failed = self, {}, []

        class Order:
            def pytest_collection_modifyitems(self, items):
                items.sort(key=lambda item: (-known.kills[item.nodeid], known.seconds.get(item.nodeid, 0.0)))

            def pytest_runtest_logreport(self, report):
                seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
                if report.failed:
                    failed.append(report.nodeid)

        code = pytest.main(
            ["-x", "-qqq", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", *self.tests], plugins=[Order()]
        )
        return {"code": int(code), "failed": failed[0] if failed else None, "seconds": seconds}

    def _call(self, function, limit: float):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.close(read)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            os.chdir(TREE)
            sys.path.insert(0, str(TREE))
            importlib.invalidate_caches()
            try:
                with os.fdopen(write, "w") as pipe:
                    json.dump(function(), pipe)
            finally:
                os._exit(0)
        os.close(write)
        end, parts = time.monotonic() + limit, []
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                part = pipe.read(1 << 16)
                if not part:
                    break
                parts.append(part)
        if time.monotonic() >= end:
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            return json.loads(b"".join(parts))
        except json.JSONDecodeError:  # killed while writing
            return None


def digest(*paths: Path) -> str:
    """Hash of the code in these files and folders, without comments, docstrings and formatting."""
    files = sorted(f for path in paths for f in (path.rglob("*.py") if path.is_dir() else [path]))
    trees = [ast.parse(file.read_text("utf-8")) for file in files]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                strings = [s for s in node.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
                node.body = [s for s in node.body if s not in strings] or [ast.Pass()]
    return hashlib.sha256("\n".join(map(ast.unparse, trees)).encode()).hexdigest()[:16]


def read_results() -> dict:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def write_results(results: dict) -> None:
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1), "utf-8")
    part.replace(RESULTS)


def copy_tree() -> None:
    shutil.rmtree(TREE, ignore_errors=True)
    without = shutil.ignore_patterns(".git", ".venv", "out", "build", "dist", "__pycache__", ".*_cache", "*.egg-info")
    shutil.copytree(ROOT, TREE, ignore=without)


def run(module: str, tests: tuple[str, ...], results: dict) -> None:
    missing = [name for name in (module, *tests) if not (TREE / name).exists()]
    if missing:
        raise SystemExit(f"{module}: there is no {' and no '.join(missing)}: update MODULES in tools/mutants.py")
    path = TREE / module
    source = path.read_text("utf-8")
    state = {"source": digest(path), "tests": digest(*(TREE / test for test in tests))}
    entry = results.get(module, {})
    mutants = mutants_of(source)
    if entry.get("source") != state["source"]:
        entry = {"mutants": {}}
    elif entry.get("tests") == state["tests"] and len(entry["mutants"]) == len(mutants):
        print(f"{module}: nothing changed since the last run")
        return
    kept = {key: found for key, found in entry["mutants"].items() if found["outcome"] != "survived"}
    entry = results[module] = {**state, "tests": "", **commit(), "total": len(mutants), "mutants": {}}
    server = Server(tests)
    plain = server.run(1800)
    if plain["code"] != 0:
        raise SystemExit(f"{module}: its tests fail without a mutation: {plain['failed'] or plain['code']}")
    server.seconds = plain["seconds"]
    whole = sum(plain["seconds"].values())
    limit = 20 + 4 * whole
    print(
        f"{module}: {len(mutants)} mutants, {len(kept)} known; {len(server.seconds)} tests, {whole:.1f} s", flush=True
    )
    entry["mutants"] = {mutant.key: kept[mutant.key] for mutant in mutants if mutant.key in kept}
    server.kills.update(found["by"] for found in entry["mutants"].values() if found["by"])
    began = time.monotonic()
    for mutant in mutants:
        if mutant.key in entry["mutants"]:
            continue
        # Python reuses a cached module if its size and its modification time in seconds are unchanged.
        for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
            cached.unlink()
        path.write_text(mutant.source, "utf-8")
        found = server.run(limit)
        outcome = {0: "survived", None: "timeout"}.get(found["code"], "killed")
        if found["failed"]:
            server.kills[found["failed"]] += 1
        entry["mutants"][mutant.key] = {"outcome": outcome, "by": found["failed"]}
        write_results(results)
        if outcome != "killed":
            print(f"  {outcome}:\n    - {mutant.before}\n    + {mutant.after}", flush=True)
    path.write_text(source, "utf-8")
    entry["tests"] = state["tests"]
    write_results(results)
    counts = Counter(found["outcome"] for found in entry["mutants"].values())
    print(f"{module}: {dict(counts)} in {time.monotonic() - began:.0f} s", flush=True)


def commit() -> dict:
    def git(*words: str) -> str:
        asked = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return asked.stdout.strip() if asked.returncode == 0 else ""

    edited = bool(git("status", "--porcelain", "--", "dcdd_core", "dcdd_pico", "tests"))
    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return {"commit": head + (" with edits" if edited else ""), "date": f"{datetime.date.today():%Y-%m-%d}"}


def equivalents() -> dict[tuple[str, str, str], str]:
    """(module, line before, line after) -> why the two are equivalent."""
    listed = tomllib.loads(EQUIVALENT.read_text("utf-8")) if EQUIVALENT.exists() else {}
    return {
        (module, before, after): reason["why"]
        for module, reasons in listed.items()
        for reason in reasons
        for before, after in reason["mutants"]
    }


def report(results: dict) -> bool:
    """Writes docs/mutants.md. Returns whether every mutant begun was run, and survivors are few and all explained."""
    known, rows, survivors, fine = equivalents(), [], [], True
    for module in MODULES:
        entry = results.get(module)
        if entry is None:
            rows.append(f"| `{module}` | not run | | | | |")
            continue
        outcomes = Counter(found["outcome"] for found in entry["mutants"].values())
        alive = [json.loads(key) for key, found in entry["mutants"].items() if found["outcome"] == "survived"]
        done, total = len(entry["mutants"]), entry.get("total", len(entry["mutants"]))
        share = len(alive) / max(1, done)
        fine &= len(alive) <= max(1, ALLOWED * done) and done == total
        ran = f"{done}" if done == total else f"{done} of {total} run"
        rows.append(
            f"| `{module}` | {ran} | {outcomes['killed']} | {outcomes['timeout']} | {len(alive)} "
            f"({100 * share:.1f} %) | {entry['commit']}, {entry['date']} |"
        )
        for before, after, _ in alive:
            why = known.get((module, before, after))
            fine &= why is not None
            survivors.append((module, before, after, why or "**not explained**"))
    text = [
        "# Mutation testing",
        "",
        "`make mutants` changes one place of the code at a time (an operator, a number, a comparison, an argument, a "
        "whole statement) and runs the tests of that module. A change that no test notices survives. "
        f"At most {100 * ALLOWED:g} % of a module's may, or a single one, and each has to be equivalent: no input "
        "tells it from the original. "
        "`tools/mutants.py` lists the modules and their tests, `tools/equivalent_mutants.toml` the reasons.",
        "",
        "| module | mutants | killed | timed out | survived | commit, date |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "## Survivors",
        "",
    ]
    for module in MODULES:
        own = [row for row in survivors if row[0] == module]
        text += [f"### `{module}`", ""] if own else []
        for _, before, after, why in own:
            text += [why[0].upper() + why[1:], "", "```diff"]
            text += [f"{sign}{line}" for sign, block in (("- ", before), ("+ ", after)) for line in block.splitlines()]
            text += ["```", ""]
    REPORT.write_text("\n".join(text).rstrip() + "\n", "utf-8")
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="run only modules whose path contains one of these words")
    parser.add_argument("--report", action="store_true", help="write docs/mutants.md from the last results alone")
    parser.add_argument("--show", action="store_true", help="print the survivors of the last run")
    chosen = parser.parse_args()
    modules = [m for m in MODULES if not chosen.words or any(word in m for word in chosen.words)]
    if not modules:
        raise SystemExit(f"no module contains {' or '.join(chosen.words)}: choose from {', '.join(MODULES)}")
    results = read_results()
    if chosen.show:
        for module in modules:
            for key, found in results.get(module, {"mutants": {}})["mutants"].items():
                if found["outcome"] == "survived":
                    before, after, _ = json.loads(key)
                    print(f"{module}\n  - {before}\n  + {after}")
        return
    if not chosen.report:
        # One thread: forks of a process with a thread pool can hang. Mutants share a tree, so they run one by one.
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
        WORK.mkdir(parents=True, exist_ok=True)
        copy_tree()
        for module in modules:
            run(module, MODULES[module], results)
    if not report(results):
        raise SystemExit(
            f"mutants not run or survivors not explained, or over {100 * ALLOWED:g} %: see {REPORT.relative_to(ROOT)}"
        )


if __name__ == "__main__":
    main()
