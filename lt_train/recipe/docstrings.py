"""The docstrings under the settings of a part, for the pages and editors that show them.

pydantic's `use_attribute_docstrings` would read them whenever the schema is imported, which is half the time of that import.
"""

import ast
import inspect
from itertools import pairwise

from lt_train.recipe.part import Part


def setting_docstrings(part: type[Part]) -> dict[str, str]:
    """Setting -> the docstring under it, those of the parts that `part` extends too."""
    found: dict[str, str] = {}
    for owner in reversed(part.__mro__):
        if issubclass(owner, Part):
            (definition,) = ast.parse(inspect.getsource(owner)).body
            assert isinstance(definition, ast.ClassDef)
            for setting, below in pairwise(definition.body):
                match setting, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = inspect.cleandoc(text)
    return found
