"""Renew the tables of docs/reference/configuration.md: `python docs/reference/configuration.py`.

Names, types and texts come from the settings classes and their docstrings, defaults from the composed configuration,
and what an option of a group is from the comment at the top of its yaml file.
"""

import json
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from medsam2.cases.settings import DatasetSettings
from medsam2.config import compose, configs_dir, default_groups, listed_options
from medsam2.evaluation.settings import EvaluateSettings
from medsam2.training.settings import TrainSettings

PAGE = Path(__file__).with_suffix(".md")
BEGIN = "<!-- Below this line the page is made by configuration.py. -->\n"
UNIT = re.compile(r"_(mm|pixels|voxels|minutes|frames|steps)\. |\bin (HU|mm|pixels|degrees|radians|frames|steps)\b")


def texts(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of the class and its bases say of each field: `name, name: text.`"""
    names = "|".join(sorted(model.model_fields, key=len, reverse=True))
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__[:-1]):
        words = " ".join((base.__doc__ or "").rpartition("Attributes:")[2].replace("None", "null").split())
        parts = re.split(rf"(?:^|(?<=[.)] ))((?:{names})(?:, (?:{names}))*): ", words)
        for keys, text in zip(parts[1::2], parts[2::2], strict=True):
            texts |= dict.fromkeys(keys.split(", "), text.strip().rstrip("."))
    return texts


def type_name(schema: dict[str, Any]) -> str:
    """A JSON schema in words: "integer ≥ 1", "list of string", "`a`, `b`"."""
    if "anyOf" in schema:
        return " or ".join(type_name(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        return f"list of {' or '.join(dict.fromkeys(map(type_name, items)))}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = (f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)
    kind = schema.get("const") or schema.get("type", "object")
    return f"{kind} {', '.join(bounds)}".strip().replace("object", "mapping")


def rows(model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, ...]]:
    """(key, type, default, unit, text) of every field; those of a group follow it, with dotted keys."""
    text, schema = texts(model), model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        value = values.get(name, field.get_default(call_default_factory=True))
        kinds = get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else (field.annotation,)
        group = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if group and value is not None:
            yield (
                f"`{prefix}{name}`",
                "group",
                "",
                "",
                text.get(name) or " ".join((group.__doc__ or "").split("\n\n")[0].split()),
            )
        else:
            shown = value if isinstance(value, str) and value else json.dumps(value)
            units = dict.fromkeys("".join(pair) for pair in UNIT.findall(f"{name}. {text.get(name)}"))
            yield f"`{prefix}{name}`", type_name(schema[name]), f"`{shown}`", ", ".join(units), text.get(name, "")
        if group:
            yield from rows(group, dict(value or {}), f"{prefix}{name}.")


def table(lines: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown; the first line is its head."""
    head, *body = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    rule = " | ".join("---" for _ in head.split(" | "))
    return "\n" + "".join(f"| {line} |\n" for line in (head, rule, *body))


def options(group: str) -> Iterator[tuple[str, str]]:
    """Each option of a group with the comment above it, else its citation, else its values."""
    yield f"option of `{group}=`", "what"
    values, comments = listed_options(configs_dir() / group), dict[str, str]()
    for path in sorted((configs_dir() / group).glob("*.yaml")):
        text = path.read_text(encoding="utf-8").replace("# @package _global_\n", "")
        if path.stem == "_options":
            comments |= {name: comment for comment, name in re.findall(r"^((?:# .*\n)+)(\w+):", text, re.MULTILINE)}
        else:
            comments[path.stem] = "".join(re.findall(r"\A(?:# .*\n)+", text))
            values[path.stem] = yaml.safe_load(text)
    for name, entries in values.items():
        plain = ", ".join(f"{key}={json.dumps(value)}" for key, value in entries.items() if key != "defaults")
        comment = " ".join(comments.get(name, "").replace("# ", "").split())
        yield f"`{name}`", comment or entries.get("citation") or plain


def section(name: str, model: type[BaseModel], values: dict[str, Any]) -> str:
    """The keys of a program: the table of its own keys, then one for each group, with the group's options."""
    head: tuple[str, ...] = ("key", "type", "default", "unit", "what it does")
    parts: dict[str, list[tuple[str, ...]]] = {}
    for row in rows(model, values):
        group, dot, _ = row[0].strip("`").partition(".")
        parts.setdefault(group if dot else "", [head]).append(row)
    groups = default_groups(name.removesuffix(".py"), configs_dir()) if name.endswith(".py") else []
    text = f"\n## {name}\n" + table(parts.pop(""))
    for group in dict.fromkeys([*parts, *groups]):
        text += f"\n### {name}: {group}\n" + (table(parts[group]) if group in parts else "")
        text += table(options(group)) if group in groups else ""
    return text


def page() -> str:
    """The text of the page: its head as it is, and the tables."""
    train = compose("train", ["data.shards=required", "output=required"])
    evaluate = compose("evaluate", ["checkpoint=required", "data.source=required", "output=required"])
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0] + BEGIN
    text += section("train.py", TrainSettings, train) + section("evaluate.py", EvaluateSettings, evaluate)
    return text + section("prepare", DatasetSettings, {})


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
