"""Which folder of lt_train may import which: the plan of the house, read from the imports of the code."""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lt_train"

ALLOWED = {
    "runtime": "",
    "hybrid": "",
    "vllm_plugin": "hybrid",
    "benchmarks": "runtime",
    "recipe": "benchmarks runtime",
    "dataset": "benchmarks recipe runtime",
    "inference": "benchmarks dataset hybrid recipe runtime vllm_plugin",
    "selection": "benchmarks dataset hybrid inference recipe runtime",
    "training": "benchmarks dataset hybrid inference recipe runtime",
    "evaluation": "benchmarks dataset hybrid inference recipe runtime",
    "export": "benchmarks dataset hybrid inference recipe runtime vllm_plugin",
    "report": "benchmarks evaluation hybrid recipe runtime selection training",
    "planning": "benchmarks dataset hybrid inference recipe runtime selection training",
    "pipeline": "benchmarks dataset evaluation export hybrid inference planning recipe report runtime selection training",
    "serving": "benchmarks dataset export hybrid inference pipeline recipe runtime selection vllm_plugin",
    "bench": "benchmarks dataset hybrid inference planning recipe runtime selection training",
    "api": "dataset hybrid inference pipeline recipe report runtime selection",
    "commands": "bench export inference pipeline planning recipe report runtime selection serving",
    "cli": "bench commands hybrid runtime",
}
"""Folder -> the folders it may import. pipeline/ imports report/, for a run ends with its table and its rows in wandb."""

ONLY_FILE_FORMATS = {
    ("report", "training"): ("training.log", "training.probes.results"),
}
"""Arrows that are allowed to the named modules alone: report/ reads what a training writes, and trains nothing."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name below lt_train -> file."""
    files = [
        path
        for path in PACKAGE.rglob("*.py")
        if (path.name != "__main__.py" and path.parent != PACKAGE) or path.name in ("api.py", "cli.py")
    ]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module of lt_train that a file imports, at its top, inside functions, or for its types."""
    return imported_by(ast.walk(parsed(path)), path)


def imported_by(nodes: Iterable[ast.AST], path: Path) -> Iterator[str]:
    known, package = modules(), path.relative_to(PACKAGE).parts[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["lt_train", *package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            name = name.removeprefix("lt_train.")
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name and name != ".".join(package):
                yield name


@cache
def arrows() -> dict[str, set[str]]:
    return {name: set(imports(path)) - {name} for name, path in modules().items()}


def test_every_file_lies_in_a_folder_of_the_plan():
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "__main__.py", "api.py", "cli.py"}
    assert {name.partition(".")[0] for name in arrows()} == set(ALLOWED)


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_what_it_may(folder):
    refused = [
        f"{name} imports {other}"
        for name, others in arrows().items()
        if name.partition(".")[0] == folder
        for other in others
        if (there := other.partition(".")[0]) != folder
        and (there not in ALLOWED[folder].split() or other not in ONLY_FILE_FORMATS.get((folder, there), (other,)))
    ]
    assert not refused


def test_no_folder_and_no_file_imports_itself_by_a_circle():
    folders: dict[str, set[str]] = {}
    for name, others in arrows().items():
        here = name.partition(".")[0]
        folders.setdefault(here, set()).update(there for other in others if (there := other.partition(".")[0]) != here)
    for graph in (folders, arrows()):
        list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def libraries_loaded_with(*names: str) -> set[str]:
    """What importing these modules of lt_train loads at once: imports inside functions and for types come later, or never."""
    libraries, pending, loaded = set[str](), set(names), set[str]()
    while pending:
        loaded.add(name := pending.pop())
        path = modules()[name]
        at_top = parsed(path).body
        for node in at_top:
            if isinstance(node, ast.Import):
                libraries |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                libraries.add((node.module or "").partition(".")[0])
        packages = {name.rpartition(".")[0]} & modules().keys()
        pending |= (packages | set(imported_by(at_top, path))) - loaded
    return libraries


def test_libraries_that_take_seconds_to_import_are_loaded_when_they_are_needed():
    """An evaluation would otherwise wait for them in each of its processes, and vLLM and tables for torch."""
    slow = {"trl", "datasets", "matplotlib", "wandb", "deepspeed"}
    assert not slow & libraries_loaded_with("pipeline.run", "pipeline.probing")
    assert not {"torch", "transformers"} & libraries_loaded_with("commands.serving", "serving.by_vllm", "report", "report.results")
    assert {"trl", "datasets"} <= libraries_loaded_with("training.trainer", "dataset.loading")


def test_hybrid_imports_itself_and_what_a_machine_with_transformers_has():
    allowed = {"torch", "transformers", "huggingface_hub", "flash_attn", "flash_attn_interface"}
    for path in (PACKAGE / "hybrid").glob("*.py"):
        for node in ast.walk(parsed(path)):
            tops = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                tops = [node.module or ""]
            assert {name.partition(".")[0] for name in tops} <= allowed | STANDARD_LIBRARY, path


STANDARD_LIBRARY = set(__import__("sys").stdlib_module_names)


HASHES_OF_NO_RESULT = {
    "benchmarks/reading.py",  # shuffles options
    "inference/requests.py",  # seeds of samples
    "inference/sampler.py",  # random numbers
    "report/page.py",  # the page's security policy
    "training/distillation/top_k.py",  # finds a document's rows in memory
}


def test_hashes_that_files_keep_are_computed_in_one_module():
    hashing = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "hashlib" in path.read_text("utf-8")}
    assert hashing == {"runtime/fingerprints.py", *HASHES_OF_NO_RESULT}


def test_no_test_imports_another_test():
    """What several need lies in tests/support/."""
    tests = Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named = [part for name in (*modules, *names) if name.startswith("tests") for part in name.split(".")]
            imported = [name for name in names if modules and modules[0].startswith("tests")]
            assert not [part for part in (*named, *imported) if part.startswith("test_")], path
