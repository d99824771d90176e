"""Configuration: composed by Hydra from `configs/`, checked once, handed on as plain dictionaries and pydantic models.

Hydra says that a key is wrong but not which one was meant; `compose` and `validate` do. The entry points `train.py` and
`evaluate.py` are one call of `hydra_entry`, so that `--help`, `--cfg job` and `--multirun` work as everywhere.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from medsam2.errors import UserError, check_choice, did_you_mean, explain_errors

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

    Model = TypeVar("Model", bound=BaseModel)

VERSION_BASE = "1.3"
# A run's folder is `output=...`: Hydra makes none, writes no log files and stays in the working directory.
QUIET_HYDRA = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra/job_logging=stdout",
    "hydra.sweep.dir=runs/multirun",
    "hydra.sweep.subdir=.",
)
RENAMED_GROUPS = {"keep": "retention"}
SKIP_CHECK = ("--help", "-h", "--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc")


def configs_dir() -> Path:
    """The folder of yaml files: the repository's in a checkout, the copy inside the package in a wheel.

    Raises:
        UserError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"no configs/ beside {package}; reinstall medsam2 (its wheel carries medsam2/configs).")


@contextmanager
def untouched_hydra() -> Iterator[None]:
    """Run something that initialises Hydra, and leave its global state as it was found."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.version import VersionBase

    hydra, base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = hydra
        VersionBase.instance().version_base = base


# ---------------------------------------------------------------------------------------------------- composing


def compose(config_name: str, overrides: Iterable[str] = (), folder: Path | None = None) -> dict[str, Any]:
    """The configuration `config_name` with command-line `overrides`, resolved, as plain Python.

    Args:
        folder: where the yaml files are; `configs_dir()` by default.

    Raises:
        UserError: an unknown key, group option or configuration, an override that cannot be read, a value that must
            be given; each with the closest valid one.
    """
    folder, given = (folder or configs_dir()).resolve(), [_parse(text) for text in overrides]
    groups = [override for override in given if (folder / override.key_or_group).is_dir()]
    for override in groups:
        _check_option(override, folder)
    try:
        return _resolve(_hydra_compose(config_name, given, folder))
    except _hydra_errors() as error:
        _explain(error, config_name, given, groups, folder)
        raise AssertionError("unreachable") from error


def _hydra_compose(config_name: str, overrides: list[Override], folder: Path) -> Any:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    _store_listed_options(folder)
    with untouched_hydra():
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(folder), version_base=VERSION_BASE):
            return hydra.compose(config_name, overrides=[str(override.input_line) for override in overrides])


def listed_options(group: Path) -> dict[str, dict[str, Any]]:
    """The options of a configuration group that stand together in one yaml, by name.

    Small ones are listed in the group's `_options.yaml`; a name that begins with "_" holds what options share. A yaml
    in `papers/` holds what one paper gives: a `citation`, which its options get, and under the name of the group (in
    the plural) the options by name; `note` is added to the citation. Each of these builds on the group's `custom`.
    """
    import yaml

    options = {}
    for path in group.glob("_options.yaml"):
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
        options.update({name: option for name, option in listed.items() if not name.startswith("_")})
    for path in sorted(group.glob("papers/*.yaml")):
        paper = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, option in paper[f"{group.name}s"].items():
            citation = ": ".join([paper["citation"], *filter(None, [option.pop("note", "")])])
            options[name] = {"defaults": ["custom", "_self_"], "name": name, **option, "citation": citation}
    return options


def option_names(group: Path) -> list[str]:
    """The options of a configuration group: its yaml files and the listed ones; _NAME.yaml is no option."""
    files = {str(path.relative_to(group).with_suffix("")) for path in group.rglob("[!_]*.yaml")}
    return sorted({name for name in files if not name.startswith("papers/")} | listed_options(group).keys())


def _store_listed_options(folder: Path) -> None:
    """Make the listed options of all groups known to Hydra, so that they are chosen like files: group=NAME."""
    from hydra.core.config_store import ConfigStore

    for group in filter(Path.is_dir, folder.iterdir()):
        for name, option in listed_options(group).items():
            ConfigStore.instance().store(group=group.name, name=name, node=option)


def groups_taken(config_name: str, folder: Path) -> list[str]:
    """The groups in the defaults list of a configuration, in order."""
    import yaml

    defaults = yaml.safe_load((folder / f"{config_name}.yaml").read_text(encoding="utf-8"))["defaults"]
    return [group for entry in defaults if isinstance(entry, dict) for group in entry]


def describe_groups(config_name: str, folder: Path, own: Path | None = None) -> str:
    """The groups that a configuration takes, each with its options, for `--help`; Hydra would list all of the folder.

    Args:
        own: the user's `--config-dir`, whose options are listed, too.
    """
    lines = []
    for group in groups_taken(config_name, folder):
        names = {name for place in (folder, own) if place is not None for name in option_names(place / group)}
        text = f"{group}: {', '.join(sorted(names))}"
        lines.append(textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines)


def _resolve(config: Any) -> dict[str, Any]:
    """Plain Python; every `???` that is left is named at once."""
    from omegaconf import OmegaConf

    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{', '.join(missing)} must be given: add {' '.join(f'{key}=...' for key in missing)}")
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _hydra_errors() -> tuple[type[Exception], ...]:
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return HydraException, OmegaConfBaseException, yaml.YAMLError


# ---------------------------------------------------------------------------------------------------- explaining


def _parse(override: str) -> Override:
    """Hydra's form of an override.

    Raises:
        UserError: it has none.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if override.startswith("=") or ("=" not in override and not override.startswith("~")):
        raise UserError(f"{override!r} is not of the form key=value (for example optim.lr=1e-4).")
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(
            f"{override!r} cannot be read ({_one_line(error)}); put quotes around a value with spaces, commas, "
            """equal signs or brackets: 'key="a value"'."""
        ) from None


def _check_option(override: Override, folder: Path) -> None:
    """Raise a `UserError` where a group has no such option."""
    key, value = override.key_or_group, override.value()
    options = option_names(folder / key)
    for name in map(str, value if isinstance(value, list) else [value] if value and not override.is_delete() else []):
        if name not in options:
            raise UserError(
                f"{key}={name}: there is no such option in {folder.name}/{key}; "
                f"choose one of {', '.join(options)}.{_instead(key, name, options)}"
            )


def _instead(group: str, option: str, options: list[str]) -> str:
    """What to type in place of an option that is not there; a model's side in pixels is a value of its own."""
    name, _, side = option.rpartition("_")
    if group == "model" and name in options and side.isdecimal():
        return f" Write {group}={name} {group}.image_size={side}."
    return did_you_mean(option, options)


def _explain(error: Exception, config_name: str, given: list[Override], groups: list[Override], folder: Path) -> None:
    """Raise a `UserError` that says what Hydra's `error` means here."""
    from omegaconf import OmegaConf

    check_choice(f"{folder}: the configuration", config_name, sorted(path.stem for path in folder.glob("*.yaml")))
    taken = groups_taken(config_name, folder)
    for override in groups:
        if not (override.is_add() or override.is_force_add() or override.key_or_group in taken):
            raise UserError(
                f"{override.input_line}: {config_name} takes no such group; it takes {', '.join(taken)}."
            ) from None
    try:
        values = _dotted(OmegaConf.to_container(_hydra_compose(config_name, groups, folder)))
    except _hydra_errors() as without:
        raise UserError(f"{folder.name}/{config_name}.yaml: {_one_line(without)}") from None
    for override in given:
        key = override.key_or_group
        if not (override in groups or override.is_add() or override.is_force_add() or key.startswith("hydra")):
            _check_key(key, values, [group for group in taken if group not in values])
    raise UserError(f"{folder.name}/{config_name}.yaml: {_one_line(error)}") from None


def _check_key(key: str, values: dict[str, Any], groups: Sequence[str]) -> None:
    """Raise a `UserError` where the dotted `key` is none of `values`, those of the composed configuration."""
    group, dot, setting = key.partition(".")
    if group in RENAMED_GROUPS:
        name = f"{RENAMED_GROUPS[group]}{dot}{setting}"
        raise UserError(f"{key}=: the group {group} is called {RENAMED_GROUPS[group]} now; write {name}=...")
    known = [*values, *groups]
    section, _, leaf = key.rpartition(".")
    if key in known:
        return
    if section in values:
        if values[section] is None:  # nothing is known of what a section that is null may hold
            return
        if not isinstance(values[section], dict | list):
            raise UserError(f"unknown key {key!r}: {section!r} is a value, not a section.")
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    close = did_you_mean(key, same_leaf) or did_you_mean(key, siblings) or did_you_mean(key, known)
    if same_leaf and not close:
        close = f" Did you mean {same_leaf[0]!r}?"
    raise UserError(f"unknown key {key!r}.{close} At this place there are: {', '.join(siblings)}.")


def _dotted(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted keys, sections included."""
    values = {}
    for name, value in config.items():
        values[f"{prefix}{name}"] = value
        if isinstance(value, dict):
            values |= _dotted(value, f"{prefix}{name}.")
    return values


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:6]).rstrip(".") or type(error).__name__


# ---------------------------------------------------------------------------------------------------- validating


def validate(model: type[Model], data: Mapping[str, Any], where: str = "") -> Model:
    """`model.model_validate(data)`, with errors that name the key, its value, what is allowed and the closest key.

    Args:
        where: what `data` is ("the training configuration"), put before the message.

    Raises:
        UserError: one line for each of at most three wrong keys.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [f"{where}: {line}" if where else line for line in (_describe(model, item) for item in found[:3])]
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise UserError("\n       ".join(lines) + more) from None


def _describe(model: type[BaseModel], item: ErrorDetails) -> str:
    location = item["loc"]
    key = ".".join(map(str, location))
    if item["type"] == "extra_forbidden":
        fields = _fields_at(model, location[:-1])
        return f"unknown key {key!r}.{did_you_mean(str(location[-1]), fields)} Known here: {', '.join(fields)}."
    if item["type"] == "missing":
        return f"the key {key!r} must be given."
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("Input should be", "it must be")
    if not location:  # a rule over several keys: the message names them
        return message
    expected = str(item.get("ctx", {}).get("expected", ""))
    choices = [word.strip(" '\"") for word in expected.replace(" or ", ", ").split(",") if word.strip()]
    return f"{key}={item['input']!r}: {message}.{did_you_mean(str(item['input']), choices)}"


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names of the fields of the model found at `location` inside `model` (through Optional, list and dict)."""
    models: list[type[BaseModel]] = [model]
    for part in map(str, location):
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [inner for annotation in annotations for inner in _models_in(annotation)] or models
    return [name for m in models for name in m.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


# ---------------------------------------------------------------------------------------------------- entry points


@explain_errors
def hydra_entry(
    config_name: str,
    run: Callable[[dict[str, Any]], Any],
    argv: Sequence[str] | None = None,
    folder: Path | None = None,
) -> None:
    """The whole of `train.py` and `evaluate.py`: check the overrides, then let Hydra call `run(config)`.

    Overrides are composed first, so that a mistake is explained before anything starts. `--multirun` runs the
    combinations one after another in this process (give each its own `output`, e.g. `output=runs/lr_${optim.lr}`);
    there mistakes are told in Hydra's words.

    Args:
        run: gets the resolved configuration as plain Python; a `UserError` in it ends the program with status 2.
        argv: the arguments without the program's name; the command line's by default.
        folder: where the yaml files are; `configs_dir()` by default.
    """
    import hydra
    from hydra._internal.utils import get_args_parser
    from omegaconf import OmegaConf

    arguments = list(sys.argv[1:] if argv is None else argv)
    folder = (folder or configs_dir()).resolve()
    parsed = get_args_parser().parse_intermixed_args(arguments)
    skip = parsed.multirun or parsed.config_dir or parsed.config_path  # Hydra alone knows sweeps and other folders
    if not skip and not any(argument.split("=")[0] in SKIP_CHECK for argument in arguments):
        compose(parsed.config_name or config_name, parsed.overrides, folder)

    @hydra.main(config_path=str(folder), config_name=config_name, version_base=VERSION_BASE)
    @explain_errors
    def task(config: Any) -> None:
        run(_resolve(config))

    _store_listed_options(folder)
    own_folder = Path(parsed.config_dir) if parsed.config_dir else None
    OmegaConf.register_new_resolver("groups_of", lambda name: describe_groups(name, folder, own_folder), replace=True)
    flags = [argument for argument in arguments if argument not in parsed.overrides]
    keys = {text.partition("=")[0] for text in parsed.overrides}
    own = [text for text in QUIET_HYDRA if text.partition("=")[0] not in keys]
    before = sys.argv
    sys.argv = [sys.argv[0], *flags, *parsed.overrides, *own, f"hydra.job.name={config_name}"]
    try:
        task()
    finally:
        sys.argv = before
