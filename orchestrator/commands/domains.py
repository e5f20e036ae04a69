"""The commands `domains` and `guests`, which list them; and `attach` and `detach`, for domains that
no host agent created."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from orchestrator.commands.options import output_option, tls_option, tls_or_none

if TYPE_CHECKING:
    from hintfleet.v1 import host_pb2
    from orchestrator.trial.host_client import HostClient

_Answer = TypeVar("_Answer")


def _this_machine() -> str:
    from hintfleet.net.addresses import default_control_address

    return default_control_address()


def _ask(
    address: str, tls_folder: str, call: Callable[[HostClient], Awaitable[_Answer]]
) -> _Answer:
    """Connect to the host agent at `address`, and return what `call` returns."""
    from orchestrator.trial.host_client import connected

    async def ask() -> _Answer:
        async with connected(address, tls_or_none(tls_folder)) as host:
            return await call(host)

    return asyncio.run(ask())


def _new_command() -> host_pb2.CommandId:
    """Return the id of a new command outside all trials. By this id the host agent recognises a
    command that gRPC sends again (host_client.py)."""
    from hintfleet.v1 import host_pb2

    return host_pb2.CommandId(run_id=str(uuid.uuid4()), sequence=1)


_host_option = click.option(
    "--host",
    "address",
    default=_this_machine,
    show_default="the host agent of this machine",
    metavar="ADDR",
    help="A running host agent: unix:PATH, or HOST:PORT; off loopback, --tls is required.",
)


@click.command(
    short_help="Show which libvirt domains of a host can be attached, and what is in the way.",
    epilog="""\b
Examples:
  hintfleet domains
  hintfleet domains --host h1.example.org:7070 --tls ~/operator-alice -o json
""",
)
@_host_option
@tls_option
@output_option
def domains(address: str, tls_folder: str, output_format: str) -> int:
    """Show for each libvirt domain of a host whether its free memory could be hinted, and
    what to change if not. Changes nothing."""
    from orchestrator.commands.output import emit
    from orchestrator.trial.host_client import HostClient
    from orchestrator.view.domain_tables import domain_as_data, domain_table

    found = _ask(address, tls_folder, HostClient.list_domains)
    emit([domain_as_data(one) for one in found], output_format, lambda: domain_table(found))
    return 0


@click.command(
    epilog="""\b
Examples:
  hintfleet attach db1 --dry-run          only say what is in the way
  hintfleet attach db1 > guest.json       then put it into the guest as /etc/hintfleet/guest.json
                                          and enable the service hintfleet-guest there
  hintfleet attach db1 --via guest-agent  the same, through the QEMU guest agent
  hintfleet attach db1 --isolator kmod --server 192.0.2.7:7071
"""
)
@click.argument("domain")
@_host_option
@click.option("--dry-run", is_flag=True, help="Only look for what is in the way.")
@click.option(
    "--via",
    type=click.Choice(("guest-agent",)),
    help="Put the configuration into the guest and start its agent, through the QEMU guest agent.",
)
@click.option(
    "--server",
    default="",
    metavar="HOST:PORT",
    help="Where the guest reaches the host agent.  [default: for user-mode networking]",
)
@click.option(
    "--isolator",
    type=click.Choice(("hugetlb", "kmod")),
    default="hugetlb",
    show_default=True,
    help="How the guest makes free memory safe; kmod needs the module hintfleet_kmod in it.",
)
@tls_option
def attach(
    domain: str,
    address: str,
    dry_run: bool,
    via: str | None,
    server: str,
    isolator: str,
    tls_folder: str,
) -> int:
    """Begin to hint in a running DOMAIN (name or UUID), which was there before.

    A device is plugged into it, through which QEMU hands over its memory; `detach` takes it
    out. Prints the configuration of the guest's agent, unless --via puts it there.
    """
    from hintfleet.errors import Refused
    from hintfleet.v1 import host_pb2
    from orchestrator.view.domain_tables import print_domain

    request = host_pb2.AttachGuestRequest(
        command=_new_command(),
        domain=domain,
        dry_run=dry_run,
        server=server,
        through_guest_agent=via is not None,
        hinting=host_pb2.HintingSettings(isolator=isolator),
    )

    answer = _ask(address, tls_folder, lambda host: host.attach_guest(request))
    if dry_run:
        print_domain(answer.domain)
        if answer.domain.obstacles:
            raise Refused(f"domain {answer.domain.name} cannot be attached")
        return 0
    click.echo(f"attached {answer.domain.name} as guest {answer.guest.name}", err=True)
    if via is None:
        click.echo(answer.agent_config)
        click.echo(
            "next: put this into the guest as /etc/hintfleet/guest.json (mode 0600), then\n"
            "      systemctl enable --now hintfleet-guest",
            err=True,
        )
    return 0


@click.command(
    epilog="""\b
Examples:
  hintfleet detach db1
  hintfleet detach db1 --via guest-agent    and stop the agent in the guest
"""
)
@click.argument("domain")
@_host_option
@click.option(
    "--via",
    type=click.Choice(("guest-agent",)),
    help="First stop the agent in the guest and remove its configuration, through the QEMU guest"
    " agent.",
)
@tls_option
def detach(domain: str, address: str, via: str | None, tls_folder: str) -> int:
    """Stop hinting in an attached DOMAIN, and take the device out of it again.

    Needed before a save, a migration or a snapshot with memory: QEMU refuses them while the
    device is there.
    """
    from hintfleet.units import format_size
    from hintfleet.v1 import host_pb2

    request = host_pb2.DetachGuestRequest(
        command=_new_command(), name=domain, through_guest_agent=via is not None
    )

    done = _ask(address, tls_folder, lambda host: host.detach_guest(request))
    both = (done.earlier, done.ledger)
    reclaimed_bytes = sum(books.reclaimed_total_bytes for books in both)
    refaulted_bytes = sum(books.refaulted_total_bytes for books in both)
    click.echo(
        f"detached {domain}: {format_size(reclaimed_bytes)} were reclaimed in all,"
        f" {format_size(refaulted_bytes)} of them used again",
        err=True,
    )
    return 0


@click.command(
    short_help="Show the guests of a host agent, and how much memory each has given back.",
    epilog="""\b
Examples:
  hintfleet guests
  hintfleet guests --memory    what the resident memory of each consists of
  hintfleet guests -o json
""",
)
@_host_option
@click.option(
    "--memory", is_flag=True, help="Show what is resident of each guest, and why (docs/memory.md)."
)
@tls_option
@output_option
def guests(address: str, memory: bool, tls_folder: str, output_format: str) -> int:
    """Show the guests of a host agent, those that it made and those that it attached: how much
    memory each has, uses, has given back, used again and has free, and since when it hints, or why
    it does not. JSON and YAML have both tables."""
    from orchestrator.commands.output import emit
    from orchestrator.trial.host_client import HostClient
    from orchestrator.view.domain_tables import guest_as_data, guest_table, memory_table

    found = _ask(address, tls_folder, HostClient.list_guests)
    emit(
        [guest_as_data(guest) for guest in found],
        output_format,
        lambda: memory_table(found) if memory else guest_table(found),
    )
    return 0
