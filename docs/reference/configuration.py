"""Write docs/reference/configuration.md: `python docs/reference/configuration.py`.

Names, types and descriptions come from the settings classes (`Attributes:` of their docstrings), the values from the
composed configuration, and the options of a group from the first comment of their yaml file.
"""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from medsam2.cases.settings import DatasetSettings
from medsam2.config import compose, configs_dir
from medsam2.evaluation.settings import EvaluateSettings
from medsam2.training.settings import TrainSettings

PAGE = Path(__file__).with_suffix(".md")
HEADINGS = ("key", "type", "default", "unit", "what it does")
REQUIRED = "required"
UNITS = (  # pattern of a key's last part, unit
    (r".*_mm", "mm"),
    (r".*_px|depth|min_pixels|peak_m..|image_size|resolution|blur\.range", "px"),
    (r".*_minutes", "minutes"),
    (r"rotation|shear", "degrees"),
    (r"bend", "radians"),
    (r"(max|schedule|warmup)_steps|steps_per_epoch|.*_every", "optimiser steps"),
    (r"clip_frames|batch_frames|conditioning_frames|correction_frames|stride_max|pruned_frames", "frames"),
    (r"clips_per_batch|clips", "clips"),
    (r"min_voxels", "voxels"),
    (r"window|windows", "HU for CT"),
    (r"percentiles", "per cent"),
    (r"grow", "1/256 of the side"),
    (r"corrections|most|each", "clicks"),
    (r"limit|limit_cases|cases", "cases per dataset"),
    (r".*probability|flip_.*|greyscale|channel_dropout|from_truth", "probability"),
    (r"max_lost_share|max_failed|replay|mask_damage|share|final_lr|translate", "share"),
)
TYPED = {"None": "null", "True": "true", "False": "false"}  # as Python has it, and as a user types it
HEAD = """# Configuration

Every key of `train.py`, `evaluate.py` and `medsam2 prepare --config`. This page is made from the code by
`python docs/reference/configuration.py` (part of `make docs`); please do not edit it.

Set a key on the command line (`optim.lr=1e-4`), or choose an option of a group (`optim=small`), which sets all keys of
that group. All keys are checked before anything starts; a wrong one is refused with the closest right one. `--cfg job`
prints the configuration that a command would use. "Default" is the value without any option: options such as
`experiment=medsam2` have other values.
"""


def describe(model: type[BaseModel]) -> dict[str, str]:
    """The description of each field, from the docstrings of the class and of its bases: `name, name: text.`"""
    found: dict[str, str] = {}
    for cls in reversed([base for base in model.__mro__ if issubclass(base, BaseModel) and base.__doc__]):
        names = "|".join(sorted(model.model_fields, key=len, reverse=True))
        entry = rf"(?:^|(?<=[.)] ))((?:{names})(?:, (?:{names}))*): "
        text = " ".join((cls.__doc__ or "").rpartition("Attributes:")[2].split())
        parts = re.split(entry, text)
        for keys, words in zip(parts[1::2], parts[2::2], strict=True):
            found |= dict.fromkeys(keys.split(", "), words.strip().rstrip("."))
    return {key: re.sub(r"\b(None|True|False)\b", lambda word: TYPED[word[0]], text) for key, text in found.items()}


def summary(model: type[BaseModel]) -> str:
    """The first paragraph of the class's docstring."""
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The settings class of a field that is a group of its own, also where the group may be null."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    return next((a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None)


def type_name(schema: dict[str, Any]) -> str:
    """A JSON schema in words: `integer ≥ 1`, `list of names`, `"a"` or `"b"`."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_name(option) for option in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any value")
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{kind}, {low:g} to {high:g}"
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(type_name(item) for item in schema['prefixItems'])}]"
        return f"list of {type_name(schema['items'])}"
    if kind == "object" or "$ref" in schema:
        return "mapping"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return f"{kind} {', '.join(bounds)}".strip()


def rows(model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, ...]]:
    """(key, type, default, unit, description) of every field; groups inside of the model follow with dotted keys."""
    texts, schema = describe(model), model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        inner, key = model_of(field.annotation), prefix + name
        default = values.get(name, REQUIRED if field.is_required() else field.get_default(call_default_factory=True))
        if inner is not None:
            given = default.model_dump() if isinstance(default, BaseModel) else default
            if given is None or (prefix and name in texts):
                kind, shown = ("group or null", "null") if given is None else ("group", "")
                yield key, kind, shown, "", texts.get(name, summary(inner))
            yield from rows(inner, given or {}, f"{key}.")
            continue
        unit = next((unit for pattern, unit in UNITS if re.fullmatch(pattern, name)), "")
        yield key, type_name(schema[name]), as_yaml(default), unit, texts.get(name, "")


def as_yaml(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(as_yaml(entry) for entry in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(entry)}" for key, entry in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or '""'


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    cells = [head, ("---",) * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in cells) + "\n"


def options(group: str) -> str:
    """The table of a group's options: the comment at the top of each file, else its citation, else its values."""
    lines = []
    for path in sorted((configs_dir() / group).glob("[!_]*.yaml")):
        text = path.read_text(encoding="utf-8").replace("# @package _global_\n", "")
        comment = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line[:1] == "#", text.splitlines())]
        values = yaml.safe_load(text)
        plain = ", ".join(f"`{key}: {as_yaml(value)}`" for key, value in values.items() if key != "defaults")
        lines.append((f"`{path.stem}`", " ".join(comment) or values.get("citation") or plain))
    return f"\nOptions of `{group}=`:\n\n{table(('option', 'what'), lines)}"


def section(program: str, config: str, model: type[BaseModel], values: dict[str, Any]) -> str:
    """The keys of a program: those without a group first, then group by group."""
    lines: dict[str, list[tuple[str, ...]]] = {}
    inner = {name: model_of(field.annotation) for name, field in model.model_fields.items()}
    for key, kind, default, *rest in rows(model, values):
        name = key.split(".")[0]
        default = default if default in (REQUIRED, "") else f"`{default}`"
        lines.setdefault(name if inner[name] else "", []).append((f"`{key}`", kind, default, *rest))
    text = f"\n## {program}\n\n" + table(HEADINGS, lines.pop(""))
    path = configs_dir() / f"{config}.yaml"
    defaults = yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"] if config else []
    groups = [next(iter(entry)) for entry in defaults if isinstance(entry, dict)]
    for name in [*lines, *(group for group in groups if group not in lines)]:
        text += f"\n### {program}: {name}\n"
        if name in lines:
            text += f"\n{summary(inner[name] or model)}\n\n{table(HEADINGS, lines[name])}"
        text += options(name) if name in groups else ""
    return text


def page() -> str:
    """The text of the page."""
    train = compose("train", ["data.shards=S", "output=O"])
    train["data"]["shards"] = train["output"] = REQUIRED
    evaluate = compose("evaluate", ["checkpoint=C", "data.source=S", "output=O"])
    evaluate["checkpoint"] = evaluate["data"]["source"] = evaluate["output"] = REQUIRED
    return (
        HEAD
        + section("train.py", "train", TrainSettings, train)
        + section("evaluate.py", "evaluate", EvaluateSettings, evaluate)
        + section("prepare", "", DatasetSettings, {})
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
