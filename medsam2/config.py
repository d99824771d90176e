"""Compose configurations with Hydra from `configs/`, and validate them as pydantic models.

`compose` and `validate` suggest the closest valid key after a mistake, which Hydra does not. `train.py` and
`evaluate.py` call `hydra_entry`, so that `--help`, `--cfg job` and `--multirun` work as in any Hydra program.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

from medsam2.errors import UserError, check_choice, did_you_mean, explain_errors

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

    Model = TypeVar("Model", bound=BaseModel)

VERSION_BASE = "1.3"
# The run's folder is `output=...`, so Hydra creates no folder or log file and stays in the working directory.
HYDRA_OVERRIDES = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra/job_logging=stdout",
    "hydra.sweep.dir=runs/multirun",
    "hydra.sweep.subdir=.",
)
INFO_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc")
RENAMED_GROUPS = {"keep": "retention"}
OPEN_SECTIONS = ("callbacks.", "logger.", "optim.module_lr.", "data.mixture.", "metrics.tolerances.")
"""Sections to which a user adds keys, which Hydra takes with a "+" only."""


def configs_dir() -> Path:
    """Return the folder of yaml files: in the repository for a checkout, inside the package for a wheel.

    Raises:
        UserError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"no configs/ beside {package}; reinstall medsam2 (its wheel contains medsam2/configs).")


@contextmanager
def preserve_hydra_state() -> Iterator[None]:
    """Restore Hydra's global state after code that initialises Hydra."""
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
    """Compose and resolve the configuration `config_name` with command-line `overrides`, as plain Python.

    Args:
        folder: of the yaml files; `configs_dir()` by default.

    Raises:
        UserError: a key, group option or configuration is unknown, an override cannot be read, or a mandatory value is
            missing. The message names the closest valid one.
    """
    folder, parsed = (folder or configs_dir()).resolve(), [_parse(text) for text in overrides]
    groups = [override for override in parsed if (folder / override.key_or_group).is_dir()]
    for override in groups:
        _check_option(override, folder)
    try:
        return _resolve(_hydra_compose(config_name, parsed, folder))
    except _hydra_errors() as error:
        _raise_user_error(error, config_name, parsed, groups, folder)


def _hydra_compose(config_name: str, overrides: list[Override], folder: Path) -> Any:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    _store_listed_options(folder)
    with preserve_hydra_state():
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(folder), version_base=VERSION_BASE):
            return hydra.compose(config_name, overrides=[str(override.input_line) for override in overrides])


def listed_options(group: Path) -> dict[str, dict[str, Any]]:
    """Return the options of a configuration group that share a yaml, by name.

    `_options.yaml` lists small options; names with a leading "_" hold content that options share. A yaml in `papers/`
    holds the options from one paper: a `citation`, and the options by name under the group's name in the plural. A
    `note` extends the citation of its option. Options from papers build on the group's `custom`.
    """
    import yaml

    options = {}
    for path in group.glob("_options.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        options.update({name: option for name, option in content.items() if not name.startswith("_")})
    for path in sorted(group.glob("papers/*.yaml")):
        paper = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, option in paper[f"{group.name}s"].items():
            citation = ": ".join([paper["citation"], *filter(None, [option.pop("note", "")])])
            options[name] = {"defaults": ["custom", "_self_"], "name": name, **option, "citation": citation}
    return options


def option_names(group: Path) -> list[str]:
    """Return the names of a group's options: its yaml files except _NAME.yaml, and the listed options."""
    files = {str(path.relative_to(group).with_suffix("")) for path in group.rglob("[!_]*.yaml")}
    return sorted({name for name in files if not name.startswith("papers/")} | listed_options(group).keys())


def _store_listed_options(folder: Path) -> None:
    """Register the listed options of all groups with Hydra, so that group=NAME works as for files."""
    from hydra.core.config_store import ConfigStore

    for group in filter(Path.is_dir, folder.iterdir()):
        for name, option in listed_options(group).items():
            ConfigStore.instance().store(group=group.name, name=name, node=option)


def default_groups(config_name: str, folder: Path) -> list[str]:
    """Return the groups in the defaults list of a configuration, in order."""
    import yaml

    defaults = yaml.safe_load((folder / f"{config_name}.yaml").read_text(encoding="utf-8"))["defaults"]
    return [group for entry in defaults if isinstance(entry, dict) for group in entry]


def describe_groups(config_name: str, folder: Path, user_folder: Path | None = None) -> str:
    """List the groups of a configuration with their options, for `--help`; Hydra would list all groups in the folder.

    Args:
        user_folder: the user's `--config-dir`, whose options are listed, too.
    """
    lines = []
    for group in default_groups(config_name, folder):
        names = {name for place in (folder, user_folder) if place for name in option_names(place / group)}
        text = f"{group}: {', '.join(sorted(names))}"
        lines.append(textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines)


def _resolve(config: Any) -> dict[str, Any]:
    """Convert a configuration to plain Python; one error names all missing values (`???`)."""
    from omegaconf import OmegaConf

    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{', '.join(missing)} must be set: add {' '.join(f'{key}=...' for key in missing)}")
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
    """Parse an override with Hydra.

    Raises:
        UserError: the override cannot be parsed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if override.startswith("=") or ("=" not in override and not override.startswith("~")):
        raise UserError(f"{override!r} does not have the form key=value (for example optim.lr=1e-4).")
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(
            f"{override!r} cannot be read ({_one_line(error)}); put quotes around a value with spaces, commas, "
            """equal signs or brackets: 'key="a value"'."""
        ) from None


def _check_option(override: Override, folder: Path) -> None:
    """Raise a `UserError` if the group has no such option."""
    if override.is_delete() or override.is_sweep_override():  # Hydra explains a sweep without --multirun
        return
    key, value = override.key_or_group, override.value()
    if value is None:
        raise UserError(f"{key}=null: {folder.name}/{key} has no such option; write {key}=[] to choose none.")
    options = option_names(folder / key)
    for name in map(str, value if isinstance(value, list) else [value]):
        if name not in options:
            raise UserError(
                f"{key}={name}: {folder.name}/{key} has no such option; "
                f"choose one of {', '.join(options)}.{_option_hint(key, name, options)}"
            )


def _option_hint(group: str, option: str, options: list[str]) -> str:
    """Suggest a replacement for a missing option; a model's input size is a separate value, not part of its name."""
    name, _, side = option.rpartition("_")
    if group == "model" and name in options and side.isdecimal():
        return f" Write {group}={name} {group}.image_size={side}."
    return did_you_mean(option, options)


def _raise_user_error(
    error: Exception, config_name: str, overrides: list[Override], groups: list[Override], folder: Path
) -> NoReturn:
    """Raise a `UserError` that explains Hydra's `error`."""
    from omegaconf import OmegaConf

    check_choice(f"{folder}: the configuration", config_name, sorted(path.stem for path in folder.glob("*.yaml")))
    known_groups = default_groups(config_name, folder)
    for override in groups:
        if not (override.is_add() or override.is_force_add() or override.key_or_group in known_groups):
            raise UserError(
                f"{override.input_line}: {config_name} has no such group; its groups are {', '.join(known_groups)}."
            ) from None
    try:
        values = _dotted(OmegaConf.to_container(_hydra_compose(config_name, groups, folder)))
    except _hydra_errors() as broken_yaml:
        raise UserError(f"{folder.name}/{config_name}.yaml: {_one_line(broken_yaml)}") from None
    for override in overrides:
        key = override.key_or_group
        if not (override in groups or override.is_add() or override.is_force_add() or key.startswith("hydra")):
            _check_key(key, values, [group for group in known_groups if group not in values])
    raise UserError(f"{folder.name}/{config_name}.yaml: {_one_line(error)}") from None


def _check_key(key: str, values: dict[str, Any], groups: Sequence[str]) -> None:
    """Raise a `UserError` if the dotted `key` is not among the `values` of the composed configuration."""
    group, dot, setting = key.partition(".")
    if group in RENAMED_GROUPS:
        name = f"{RENAMED_GROUPS[group]}{dot}{setting}"
        raise UserError(f"{key}=: the group {group} is called {RENAMED_GROUPS[group]} now; write {name}=...")
    known = [*values, *groups]
    section, _, leaf = key.rpartition(".")
    if key in known:
        return
    if section in values:
        if values[section] is None:  # the keys of a null section are unknown
            return
        if not isinstance(values[section], dict | list):
            raise UserError(f"unknown key {key!r}: {section!r} is a value, not a section.")
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    close = did_you_mean(key, same_leaf) or did_you_mean(key, siblings) or did_you_mean(key, known)
    if same_leaf and not close:
        close = f" Did you mean {same_leaf[0]!r}?"
    listing = f" The keys there are: {', '.join(siblings)}." if siblings else ""
    add = f" To add it, write +{key}=..." if key.startswith(OPEN_SECTIONS) else ""
    raise UserError(f"unknown key {key!r}.{close}{listing}{add}")


def _dotted(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values and sections of a nested configuration by dotted key."""
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


def validate(model: type[Model], data: Mapping[str, Any], where: str = "", flags: bool = False) -> Model:
    """Call `model.model_validate(data)`; errors name the key, its value, the allowed values and the closest key.

    Args:
        where: a name of `data` ("the training configuration"), which precedes the message.
        flags: the keys were given as flags of a command line, and errors name them so.

    Raises:
        UserError: keys or values are invalid; the message has one line per error, at most three.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        lines = [(f"{where}: " if where else "") + _describe(model, item, flags) for item in errors[:3]]
        more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
        raise UserError("\n       ".join(lines) + more) from None


def _describe(model: type[BaseModel], item: ErrorDetails, flags: bool) -> str:
    location = item["loc"]
    key = ".".join(map(str, location))
    if flags and key in model.model_fields:
        key = f"--{key.replace('_', '-')}"
    if item["type"] == "extra_forbidden":
        fields = _fields_at(model, location[:-1])
        return f"unknown key {key!r}.{did_you_mean(str(location[-1]), fields)} Known here: {', '.join(fields)}."
    if item["type"] == "missing":
        return f"the key {key!r} must be given."
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("Input should be", "it must be")
    if not location:  # a rule over several keys, which its message names
        return message
    expected = str(item.get("ctx", {}).get("expected", ""))
    choices = [word.strip(" '\"") for word in expected.replace(" or ", ", ").split(",") if word.strip()]
    stop = "" if message.endswith((".", "?")) else "."
    return f"{key}={item['input']!r}: {message}{stop}{did_you_mean(str(item['input']), choices)}"


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the field names of the nested model at `location` in `model` (through Optional, list and dict)."""
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
    """Run `train.py` or `evaluate.py`: check the overrides, then let Hydra call `run(config)`.

    The configuration is composed once before the run, to explain mistakes. `--multirun` runs the combinations one after
    another in this process (set a separate `output` for each, e.g. `output=runs/lr_${optim.lr}`), with Hydra's own
    error messages.

    Args:
        run: called with the resolved configuration as plain Python; a `UserError` ends the program with status 2.
        argv: the arguments without the program's name; by default those of the command line.
        folder: of the yaml files; `configs_dir()` by default.
    """
    import hydra
    from hydra._internal.utils import get_args_parser
    from omegaconf import OmegaConf

    arguments = list(sys.argv[1:] if argv is None else argv)
    folder = (folder or configs_dir()).resolve()
    parsed = get_args_parser().parse_intermixed_args(arguments)
    skip = parsed.multirun or parsed.config_dir or parsed.config_path  # only Hydra can compose sweeps and other folders
    if not skip and not any(argument.split("=")[0] in INFO_FLAGS for argument in arguments):
        compose(parsed.config_name or config_name, parsed.overrides, folder)

    @hydra.main(config_path=str(folder), config_name=config_name, version_base=VERSION_BASE)
    @explain_errors
    def task(config: Any) -> None:
        run(_resolve(config))

    _store_listed_options(folder)
    user_folder = Path(parsed.config_dir) if parsed.config_dir else None
    OmegaConf.register_new_resolver("groups_of", lambda name: describe_groups(name, folder, user_folder), replace=True)
    flags = [argument for argument in arguments if argument not in parsed.overrides]
    keys = {text.partition("=")[0] for text in parsed.overrides}
    defaults = [text for text in HYDRA_OVERRIDES if text.partition("=")[0] not in keys]
    original_argv = sys.argv
    sys.argv = [sys.argv[0], *flags, *parsed.overrides, *defaults, f"hydra.job.name={config_name}"]
    try:
        task()
    finally:
        sys.argv = original_argv
