import ast
import sys

from lt_train.export.code_files import hybrid_code_files


def imports(file):
    """(module names imported from outside, names imported relatively)."""
    outside, relative = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            (relative if node.level else outside).add(node.module.partition(".")[0])
    return outside, relative


def test_every_relative_import_is_among_the_files():
    files = hybrid_code_files()
    names = {file.stem for file in files}
    assert set().union(*(imports(file)[1] for file in files)) | {"families"} == names
    assert {"configuration", "cache", "mask", "spec"} <= names
    assert "loading" not in names and "__init__" not in names


def test_the_files_need_torch_and_transformers_alone():
    outside = set().union(*(imports(file)[0] for file in hybrid_code_files()))
    assert outside - set(sys.stdlib_module_names) <= {
        "torch",
        "transformers",
        "huggingface_hub",
    }  # the last comes with transformers
