"""The house of the design: who may import whom, no circles, small modules, no pickle."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "lit_prune"
PACKAGE = ROOT.name
MAX_LINES = 350

# The rows of the design: what a place needs at once. What those may import, it may import too
# (`reach`), and everybody may import `errors`. A new place needs a row here, or the test fails.
DIRECT = {
    "errors": set(),
    "whole_file": set(),
    "versions": set(),
    "importance": set(),
    "plan": set(),
    "amounts": set(),
    "checks": set(),
    "config": {"amounts", "checks"},
    "decoder": {"config"},
    "ranks": set(),
    "calibration": {"decoder", "config", "ranks", "whole_file"},
    "allocation": {"decoder", "plan", "config"},
    "methods": {"calibration", "importance", "allocation"},
    "surgery": {"decoder", "plan", "importance", "whole_file"},
    "metrics": {"decoder"},
    "report": {"plan", "metrics"},
    "measurement": {"calibration", "report"},
    "record": {"plan", "report"},
    "latency_table": {"calibration", "metrics"},
    "measuring": {"methods", "surgery", "latency_table"},
    "planning": {"measuring", "versions", "sequential"},
    "reading": {"calibration", "importance"},
    "writing": {"calibration", "importance", "surgery"},
    "slopes": {"calibration", "surgery"},
    "inner": {"slopes"},
    "sequential": {"methods", "reading", "writing", "inner"},
    "sweep": {"planning"},
    "targets": {"sweep"},
    "target_words": {"measurement"},
    "pruner": {"targets", "target_words", "record"},
    "views": {"plan", "report", "whole_file"},
    "saving": {"plan", "decoder", "surgery", "report", "record", "views", "versions"},
    "running": {"pruner", "views", "checkpoints"},
    "checkpoints": {"surgery", "record"},
    "callback": {"pruner", "views", "saving", "running"},
    "texts": {"decoder"},
    "finetune": {"texts", "saving"},
    "testing": {"callback"},
    "cli": {"callback", "texts", "sweep"},
    "": {"cli", "finetune", "testing", "sweep"},  # lit_prune/__init__.py, the façade
}
PURE = {"importance"}  # third parties: torch only
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
KNOWS_LIGHTNING = {"callback", "running", "finetune", "cli"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def reach(place):
    """Every place that `place` may import from: its row, and the rows of its row."""
    found, todo = {"errors", place}, set(DIRECT[place])
    while todo:
        step = todo.pop()
        found.add(step)
        todo |= DIRECT[step] - found
    return found


def read_package(root):
    """Dotted module name -> source; a package's `__init__` goes by the package's own name."""
    sources = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return sources


def place_of(module):
    """`lit_prune.decoder.spec` -> `decoder`; the package itself -> ``."""
    return [*module.split("."), ""][1]


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def import_nodes(tree, *, inside_functions):
    """Import statements that run: not those under `if TYPE_CHECKING`, in functions where asked."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif is_type_checking(node):
            todo += node.orelse
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)


def targets(module, sources, *, inside_functions):
    """Dotted names that a module imports; of the own package, the modules that are meant."""
    for node in import_nodes(ast.parse(sources[module]), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            continue
        base = node.module or ""
        if node.level:
            is_package = any(other.startswith(f"{module}.") for other in sources)
            parts = module.split(".")
            parts = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parts, base] if base else parts)
        for alias in node.names:
            full = f"{base}.{alias.name}"
            yield full if full in sources else base


def circle(sources):
    """A list of modules whose module-level imports form a circle, or None.

    An import of `p.a.x` also runs `p/a/__init__.py`; the packages that the importer itself lies in
    are already being imported then, so they make no edge unless they are named.
    """
    edges = {}
    for module in sources:
        edges[module] = set()
        for target in targets(module, sources, inside_functions=False):
            parts = target.split(".")
            parents = {".".join(parts[:n]) for n in range(1, len(parts))}
            running = {p for p in parents if not f"{module}.".startswith(f"{p}.")}
            edges[module] |= (running | {target}) & sources.keys()
        edges[module].discard(module)
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def layering_faults(sources):
    faults = []
    for module in sources:
        place = place_of(module)
        if place not in DIRECT:
            faults.append(f"{module}: {place!r} has no row in DIRECT")
            continue
        for target in targets(module, sources, inside_functions=True):
            top = target.split(".")[0]
            if top == module.split(".")[0]:
                if place_of(target) not in reach(place):
                    faults.append(f"{module} may not import {target}")
            elif top in LIGHTNING and place not in KNOWS_LIGHTNING:
                faults.append(f"{module} may not import {target}: Lightning stays in the callback")
            elif place in PURE and top != "torch" and top not in sys.stdlib_module_names:
                faults.append(f"{module} may not import {target}: it is pure, torch only")
    return faults


def unsafe_uses(sources):
    faults = []
    for module, source in sources.items():
        for target in targets(module, sources, inside_functions=True):
            if target.split(".")[0] in PICKLES:
                faults.append(f"{module} imports {target}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                faults.append(f"{module}:{node.lineno} uses torch.load")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                faults.append(f"{module}:{node.value.lineno} sets trust_remote_code")
    return faults


@pytest.fixture(scope="module")
def sources():
    return read_package(ROOT)


def test_rows_of_the_design_have_no_circle():
    TopologicalSorter(DIRECT).prepare()


def test_package_has_no_import_circle(sources):
    assert circle(sources) is None


def test_package_keeps_its_layers(sources):
    assert layering_faults(sources) == []


def test_package_reads_no_pickle_and_trusts_no_remote_code(sources):
    assert unsafe_uses(sources) == []


def test_no_module_is_too_long(sources):
    lengths = {module: len(source.splitlines()) for module, source in sources.items()}
    assert {module: n for module, n in lengths.items() if n > MAX_LINES} == {}


# ---- the checks themselves, on packages that break the rule ----


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"p.a": "import p.b", "p.b": "from p import a"}, True),
        ({"p.a": "from . import b", "p.b": "from .a import x"}, True),
        ({"p.a": "", "p.a.x": "from p.b import y", "p.b": "import p.a.x"}, True),
        ({"p": "from p.a import x", "p.a": "from p import b", "p.b": ""}, False),
        ({"p": "from p.a import x", "p.a": "from p import version"}, True),
        ({"p.a": "import p.b", "p.b": "def f():\n    import p.a"}, False),
        ({"p.a": "import p.b", "p.b": "if TYPE_CHECKING:\n    import p.a"}, False),
        ({"p.a": "import p.b", "p.b": "try:\n    import p.a\nexcept ImportError: pass"}, True),
        # running p/a/__init__.py is part of importing p.a.x
        ({"p.a": "import p.b", "p.a.x": "", "p.b": "import p.a.x"}, True),
        ({"p.a": "import p.a.x", "p.a.x": "import p.a.y", "p.a.y": ""}, False),
    ],
)
def test_circle_is_found(sources, expected):
    assert (circle(sources) is not None) == expected


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("surgery.apply", "from lit_prune.decoder.spec import DecoderSpec", True),
        ("surgery.apply", "from lit_prune.methods import paper", False),
        ("surgery.apply", "def f():\n    from lit_prune import methods", False),
        ("methods.paper", "from lit_prune.plan import PruningPlan", True),
        ("importance.gaussian", "import math\nimport torch\nfrom lit_prune.errors import E", True),
        ("importance.gaussian", "import numpy", False),
        ("importance.gaussian", "from lit_prune.decoder import spec", False),
        ("pruner", "import lightning.pytorch as pl", False),
        ("callback", "import lightning.pytorch as pl", True),
        ("surprise", "", False),
    ],
)
def test_layers_are_checked(module, source, allowed):
    names = ["decoder", "decoder.spec", "methods", "methods.paper", "plan", "errors"]
    package = {f"lit_prune.{name}": "" for name in names} | {"lit_prune": ""}
    assert (layering_faults(package | {f"lit_prune.{module}": source}) == []) == allowed


@pytest.mark.parametrize(
    ("source", "safe"),
    [
        ("import pickle", False),
        ("def f():\n    from joblib import load", False),
        ("x = torch.load(path, weights_only=True)", False),
        ("load(path, trust_remote_code=True)", False),
        ("load(path, trust_remote_code=flag)", False),
        ("read = torch.load", False),
        ("'No pickle, no torch.load( here.'", True),
    ],
)
def test_unsafe_use_is_found(source, safe):
    assert (unsafe_uses({"p.a": source}) == []) == safe
