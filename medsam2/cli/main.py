"""Root of the `medsam2` command.

Only the requested sub-command is imported, so that `medsam2 --help` is fast; the table below lists the others.
A new sub-command needs a file and a row.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from medsam2 import __version__
from medsam2.errors import explain_errors


@dataclass(frozen=True)
class Command:
    """A sub-command: its target ("module:attribute", a `typer.Typer` or a function) and its line in the help."""

    name: str
    target: str
    summary: str


COMMANDS = (
    Command("demo", "medsam2.cli.demo:app", "Write generated CT, MR, ultrasound, endoscopy in real file formats."),
    Command("inspect", "medsam2.cli.inspect:inspect", "Show raw data or shards: geometry, labels, problems."),
    Command("prepare", "medsam2.cli.prepare:prepare", "Turn raw data into shards, split by patient."),
    Command("clips", "medsam2.cli.clips:clips", "Draw augmented training clips of each modality."),
    Command("predict", "medsam2.cli.predict:predict", "Segment volumes and videos from boxes, points, lines or masks."),
    Command("export", "medsam2.cli.export:export", "Write a checkpoint in formats of other tools, and verify them."),
    Command("import", "medsam2.cli.importing:import_", "Convert weights of Meta, MedSAM2, Hugging Face to our format."),
    Command("interpolate", "medsam2.cli.interpolate:interpolate", "Write weights between start and end of a run."),
    Command("doctor", "medsam2.cli.doctor:doctor", "Check whether this machine can train, with remedies."),
    Command("models", "medsam2.cli.models:models", "List model sizes, parameters and official files on disk."),
)
COMMANDS_WITHOUT_ARGUMENTS = ("doctor", "models")

HELP = """Fine-tune SAM 2 on medical images and videos, evaluate it and export it.

[bold]From generated cases to an exported checkpoint[/bold]

  $ medsam2 demo cases cases --cases 16
  $ medsam2 prepare cases --out shards --split 0.75,0.25
  $ python train.py experiment=quickstart data.shards=shards output=run
  $ python evaluate.py checkpoint=run data.source=shards output=scores
  $ medsam2 export --checkpoint run --to sam2 --out exported

Hydra configures training and evaluation: [cyan]python train.py --help[/cyan].
Each command's help has examples: [cyan]medsam2 prepare --help[/cyan].
"""


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """Build the command line with the sub-command in `arguments`; the others are placeholders for the help."""
    app = typer.Typer(
        name="medsam2", help=HELP, rich_markup_mode="rich", no_args_is_help=True, add_completion=False,
        pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(_root)
    requested = next((argument for argument in arguments if not argument.startswith("-")), None)
    for command in COMMANDS:
        if command.name == requested:
            _attach(app, command)
        else:
            app.command(command.name, help=command.summary)(_placeholder)
    return app


def _print_version(flag: bool) -> None:
    if flag:
        print(__version__)
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Accept the options of the root command."""


def _placeholder() -> None:
    raise AssertionError("placeholders for the help are never run")


def _attach(app: typer.Typer, command: Command) -> None:
    module_name, attribute = command.target.split(":")
    target = getattr(importlib.import_module(module_name), attribute)
    if isinstance(target, typer.Typer):
        app.add_typer(target, name=command.name, short_help=command.summary)
    else:
        help_alone = command.name not in COMMANDS_WITHOUT_ARGUMENTS
        app.command(command.name, help=inspect.getdoc(target), no_args_is_help=help_alone)(target)


@explain_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake prints one line and exits with status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    build_app(arguments)(args=arguments, prog_name="medsam2")


if __name__ == "__main__":
    main()
