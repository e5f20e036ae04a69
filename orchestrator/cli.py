"""`hintfleet`: the command line. Commands import what they need when they run, so
that `--help` is fast; data goes to stdout, all else to stderr."""

from __future__ import annotations

import logging
from contextlib import suppress

import click

from hintfleet import logs, program
from orchestrator.commands.doctor import doctor
from orchestrator.commands.experiments import experiments
from orchestrator.commands.pki import pki
from orchestrator.commands.report import report
from orchestrator.commands.run import run
from orchestrator.commands.runs import runs, show
from orchestrator.commands.savings import savings
from orchestrator.commands.serve import serve

_EPILOG = """\b
Examples:
  hintfleet doctor                      what this machine can run
  hintfleet run quickstart              an experiment of the catalogue
  hintfleet run my.yaml -o json         one of your own; data on stdout
  hintfleet show latest                 the newest run again
  hintfleet report latest               the same as one HTML file with plots
  hintfleet savings --by host --since 1h

\b
Environment: HINTFLEET_TLS, LIBVIRT_DEFAULT_URI, XDG_DATA_HOME, NO_COLOR; RAY_ADDRESS
(HOST:PORT of a Ray cluster that this machine is a node of, or auto). Proxies are not used.
Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 undecided (no figure can
be given), 130 interrupted.
Shell completion: eval "$(_HINTFLEET_COMPLETE=bash_source hintfleet)"
"""


def _version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from hintfleet import __version__

        click.echo(f"hintfleet {__version__}")
        context.exit()


@click.group(
    epilog=_EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
    help="Print the version.",
)  # fmt: skip
@click.option(
    "--log-level", type=click.Choice(logs.LEVELS),
    help="Log what happens, too, on stderr.  [default: messages for people only]",
)  # fmt: skip
@click.option(
    "--log-format", type=click.Choice(logs.FORMATS), default="text", show_default=True,
    help="Text with NAME=VALUE fields, or a JSON object a line.",
)  # fmt: skip
@click.pass_context
def cli(context: click.Context, log_level: str | None, log_format: str) -> None:
    """A lab for memory overcommit: how much host memory free page hinting gives back,
    what it costs, and which way of doing it is best, on real guests and a whole fleet."""
    if log_level is not None:
        logs.configure(log_level, log_format)
    else:
        logging.getLogger("hintfleet").addHandler(logging.NullHandler())
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (doctor, experiments, pki, report, run, runs, show, savings, serve):
    cli.add_command(command)


def run_command(arguments: list[str]) -> int:
    """Run a command line; returns its exit code. Errors are told on stderr."""
    return program.run(lambda: _invoke(arguments), _tell, "hintfleet[orchestrator]")


def _invoke(arguments: list[str]) -> int:
    try:
        return int(cli.main(arguments, prog_name="hintfleet", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as error:
        raise KeyboardInterrupt from error


def _tell(message: str) -> None:
    with suppress(OSError):
        click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    program.say(message)
