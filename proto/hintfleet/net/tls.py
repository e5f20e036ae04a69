"""TLS between machines: one folder of files per party, and who a peer is by its certificate.

A TLS folder holds `ca.pem` (whom to trust), `cert.pem` and `key.pem` (who one is);
`hintfleet pki issue` makes it. Both sides of a connection show their certificates.
With a folder every TCP address speaks TLS, without one only loopback is spoken to,
in plain text; unix sockets are guarded by the file system and never encrypted.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import grpc

from hintfleet.errors import InvalidInput, Refused
from hintfleet.net.addresses import (
    check_address,
    check_plain_text,
    grpc_target,
    is_unix,
    socket_path,
)
from hintfleet.system.files import read_at_most

CA_FILE, CERT_FILE, KEY_FILE = "ca.pem", "cert.pem", "key.pem"
MOST_BYTES = 1 << 20
"""Of one of them: more is none."""

GUEST_URI = "urn:uuid:"
"""What the URI in a guest's certificate begins with; its UUID follows."""

_ISSUE_HINT = "`hintfleet pki issue` makes such a folder, `hintfleet pki show FOLDER` looks at it"


class Role(Enum):
    """What a certificate is good for: the door that it opens."""

    HOST = "host"
    """Serves: a host agent, the fleet service. Opens no door itself."""
    GUEST = "guest"
    """Opens a host agent's door for guests, as one guest."""
    OPERATOR = "operator"
    """Opens the control API, the metrics and the fleet service."""

    @property
    def uri(self) -> str:
        """The URI by which a certificate says this role; of a guest only its beginning."""
        return GUEST_URI if self is Role.GUEST else f"urn:hintfleet:{self.value}"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Who the other side of a connection has proved to be.

    :ivar guest_uuid: of role GUEST; else empty.
    """

    role: Role
    guest_uuid: str = ""

    @classmethod
    def of_uris(cls, uris: Iterable[str]) -> Peer | None:
        """Read a certificate's URIs; None unless they say one role, and that once."""
        match list(uris):
            case [uri] if uri.startswith(GUEST_URI):
                return cls(role=Role.GUEST, guest_uuid=uri.removeprefix(GUEST_URI))
            case [uri]:
                return next((cls(role=role) for role in Role if uri == role.uri), None)
        return None


def check_role(auth_context: Mapping[str, Any], wanted: Role) -> Peer | None:
    """Who speaks on a server's connection; None on one without TLS.

    :param auth_context: what gRPC says of the connection: lists of bytes by name.
    :raises Refused: its certificate is not for this door.
    """
    if list(auth_context.get("transport_security_type", ())) != [b"ssl"]:
        return None
    uris = (uri.decode(errors="replace") for uri in auth_context.get("peer_uri", ()))
    peer = Peer.of_uris(uris)
    if peer is None or peer.role is not wanted:
        raise Refused(
            f"this door is for {wanted.value}s, and the certificate is "
            + (f"a {peer.role.value}'s" if peer else "of no role"),
            hint=f"hintfleet pki issue {wanted.value}",
        )
    return peer


@dataclass(frozen=True, kw_only=True)
class Tls:
    """The contents of a TLS folder, PEM.

    :ivar folder: where they were read.
    """

    folder: Path
    ca: bytes
    cert: bytes
    key: bytes = field(repr=False)

    @classmethod
    def read(cls, folder: str | Path, *, server: bool) -> Tls:
        """Read a folder, and try its certificate as its user will: a handshake of it with
        itself, in memory. Else connections would just fail later; gRPC does not say why.

        :raises InvalidInput: a file cannot be read; or the certificate is expired, of
            another authority, not for this side, no PEM, or not that of the key.
        """
        where = Path(folder)
        try:
            ca, cert, key = (
                read_at_most(where / name, MOST_BYTES) for name in (CA_FILE, CERT_FILE, KEY_FILE)
            )
            _handshake(where, server=server)
        except ssl.SSLError as error:  # an OSError, too
            reason = getattr(error, "verify_message", "") or error.reason or str(error)
            message = f"its certificate cannot be used: {reason}"
            raise InvalidInput(f"TLS folder {where}: {message}", hint=_ISSUE_HINT) from error
        except OSError as error:
            message = f"{Path(error.filename).name}: {error.strerror}"
            raise InvalidInput(f"TLS folder {where}: {message}", hint=_ISSUE_HINT) from error
        return cls(folder=where, ca=ca, cert=cert, key=key)

    def for_client(self) -> grpc.ChannelCredentials:
        """What a client connects with."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)

    def for_server(self) -> grpc.ServerCredentials:
        """What a server listens with; a client that shows no certificate gets no further."""
        return grpc.ssl_server_credentials([(self.key, self.cert)], self.ca, True)

    def server_context(self) -> ssl.SSLContext:
        """The same rules for a server that is not gRPC's: every client shows a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / CERT_FILE, self.folder / KEY_FILE)
        context.load_verify_locations(self.folder / CA_FILE)
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def client_credentials(address: str, tls: Tls | None) -> grpc.ChannelCredentials | None:
    """What to connect to `address` with; None for plain text.

    :raises InvalidInput: it is no address, or without TLS not of this machine.
    """
    check_address(address) if tls else check_plain_text(address)
    return None if tls is None or is_unix(address) else tls.for_client()


class _Server(Protocol):
    """What `grpc.Server` and `grpc.aio.Server` have in common."""

    def add_insecure_port(self, address: str) -> int: ...

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int: ...


def listen(server: _Server, address: str, tls: Tls | None) -> str:
    """Have a server listen; returns the address with the port that it got.

    :raises InvalidInput: it is no address, or without TLS not of this machine.
    :raises Refused: it cannot be bound.
    """
    check_address(address) if tls else check_plain_text(address)
    try:
        if tls is None or is_unix(address):
            port = server.add_insecure_port(grpc_target(address))
        else:
            port = server.add_secure_port(address, tls.for_server())
    except RuntimeError as error:
        reason = _bind_problem(address)
        raise Refused(
            f"cannot listen on {address}{f': {reason}' if reason else ''}",
            hint="is another server there? choose another --listen address",
        ) from error
    return address if is_unix(address) else f"{address.rpartition(':')[0]}:{port}"


def _bind_problem(address: str) -> str:
    """Why `address` cannot be bound: gRPC says it to its own log only."""
    try:
        if path := socket_path(address):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(os.fspath(path))
            path.unlink()
        elif not is_unix(address):
            host, _, port = address.rpartition(":")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _handshake(folder: Path, *, server: bool) -> None:
    """Have `folder`'s certificate stand on one side, and its ca.pem judge it on the other."""
    shows = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    judges = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if server else ssl.PROTOCOL_TLS_SERVER)
    for context in (shows, judges):
        context.check_hostname = False
        context.load_cert_chain(folder / CERT_FILE, folder / KEY_FILE)
    shows.verify_mode = ssl.CERT_NONE
    judges.load_verify_locations(folder / CA_FILE)
    judges.verify_mode = ssl.CERT_REQUIRED
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = shows.wrap_bio(there, back, server_side=server)
    theirs = judges.wrap_bio(back, there, server_side=not server)
    # TLS 1.3 needs two flights each way at the most; a step without input asks for more.
    for side in (ours, theirs) * 3:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
