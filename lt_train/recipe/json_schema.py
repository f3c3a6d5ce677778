"""recipes/recipe.schema.json: the schema of a recipe as a JSON Schema, by which editors complete, explain and check a recipe.

lt-train schema > recipes/recipe.schema.json
"""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema

from lt_train.recipe.docstrings import setting_docstrings
from lt_train.recipe.part import MARKERS
from lt_train.recipe.schema import Recipe


class RecipeJsonSchema(GenerateJsonSchema):
    """Explains each setting by its docstring, and leaves out what an editor does not use: titles made from names, our markers."""

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        made = super().model_schema(schema)
        for name, text in setting_docstrings(schema["cls"]).items():
            made["properties"][name]["description"] = text
        return made

    def generate(self, schema: Any, mode: JsonSchemaMode = "validation") -> dict[str, Any]:
        made = super().generate(schema, mode)
        settings = [made, *made["$defs"].values()]
        for part in settings:
            part.pop("title", None)
            for setting in part.get("properties", {}).values():
                for name in ("title", *MARKERS):
                    setting.pop(name, None)
        return {"$schema": self.schema_dialect, "title": "Recipe of lt_train", **made}


def json_schema() -> dict[str, Any]:
    """Conflicts between settings, and what depends on files, is checked by `lt-train validate` alone."""
    return Recipe.model_json_schema(schema_generator=RecipeJsonSchema)
