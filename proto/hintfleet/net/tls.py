"""TLS between machines: reads TLS folders, determines a peer's role from its certificate, makes
credentials, and makes gRPC servers listen, with TLS or in plain text.

A TLS folder has `ca.pem` (the authority to trust), `cert.pem` (the certificate of the program that
reads the folder) and `key.pem` (the key of that certificate); `hintfleet pki issue` makes such
folders. On a TLS connection, both sides present a certificate. A program may have TLS folders for
some of its addresses: on those that are TCP it uses TLS, also on loopback. Without a TLS folder,
servers listen, and operators connect, only on loopback or a unix socket, in plain text; a guest
agent connects in plain text to whatever address its configuration names. Unix sockets are never
encrypted.
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
    ABSTRACT,
    check_address,
    check_plain_text,
    grpc_target,
    is_unix,
    socket_path,
)
from hintfleet.system.files import read_at_most

CA_FILE, CERT_FILE, KEY_FILE = "ca.pem", "cert.pem", "key.pem"
MOST_FILE_BYTES = 1 << 20
"""The largest allowed size of a file in a TLS folder."""

GUEST_URI = "urn:uuid:"
"""The start of the URI in a guest's certificate; the guest's UUID follows."""

_ISSUE_HINT = "`hintfleet pki issue` makes such a folder, `hintfleet pki show FOLDER` shows it"


class Role(Enum):
    """What the owner of a certificate may do."""

    HOST = "host"
    """Serve, as a host agent or the fleet service. May not call any service."""
    GUEST = "guest"
    """Call a host agent's service for guests, as one guest."""
    OPERATOR = "operator"
    """Call the control API, the metrics and the fleet service."""

    @property
    def uri(self) -> str:
        """The URI of this role in a certificate; for a guest, the part before its UUID."""
        return GUEST_URI if self is Role.GUEST else f"urn:hintfleet:{self.value}"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The authenticated other side of a connection.

    :ivar guest_uuid: for role GUEST; else empty.
    """

    role: Role
    guest_uuid: str = ""

    @classmethod
    def of_uris(cls, uris: Iterable[str]) -> Peer | None:
        """Return the peer that a certificate's URIs name.

        None if there is not exactly one URI, or if that URI names no role.
        """
        match list(uris):
            case [uri] if uri.startswith(GUEST_URI):
                return cls(role=Role.GUEST, guest_uuid=uri.removeprefix(GUEST_URI))
            case [uri]:
                return next((cls(role=role) for role in Role if uri == role.uri), None)
        return None


def check_role(auth_context: Mapping[str, Any], wanted: Role) -> Peer | None:
    """Return the client at the other end of a server's connection; None if it has no TLS.

    :param auth_context: gRPC's authentication context of the connection: lists of bytes by name.
    :raises Refused: the peer's certificate has another role than `wanted`, or none.
    """
    # gRPC sets `transport_security_type` to "ssl" on a TLS connection, and `peer_uri` to the URIs
    # of the peer's verified certificate (grpc/grpc_security_constants.h).
    if list(auth_context.get("transport_security_type", ())) != [b"ssl"]:
        return None
    uris = (uri.decode(errors="replace") for uri in auth_context.get("peer_uri", ()))
    peer = Peer.of_uris(uris)
    if peer is None or peer.role is not wanted:
        raise Refused(
            f"this service is for {wanted.value}s, but the certificate "
            + (f"is for a {peer.role.value}" if peer else "has no role"),
            hint=f"hintfleet pki issue {wanted.value}",
        )
    return peer


@dataclass(frozen=True, kw_only=True)
class Tls:
    """The contents of a TLS folder, PEM.

    :ivar folder: the folder itself; `server_context` reads its files again.
    """

    folder: Path
    ca: bytes
    cert: bytes
    key: bytes = field(repr=False)

    @classmethod
    def read(cls, folder: str | Path, *, server: bool) -> Tls:
        """Read a folder, and check its certificate in a handshake.

        :param server: whether the certificate must be one for a server; else for a client.
        :raises InvalidInput: a file cannot be read; or the certificate has expired, is from
            another authority than `ca.pem`, is for the other side of a connection, is not PEM, or
            does not match the key.
        """
        where = Path(folder)
        try:
            ca, cert, key = (
                read_at_most(where / name, MOST_FILE_BYTES)
                for name in (CA_FILE, CERT_FILE, KEY_FILE)
            )
            # Try the certificate now: with a bad one, connections would fail later, and gRPC's
            # errors do not contain the reason.
            _handshake(where, server=server)
        except ssl.SSLError as error:  # before OSError, its base class
            reason = getattr(error, "verify_message", "") or error.reason or str(error)
            message = f"its certificate cannot be used: {reason}"
            raise InvalidInput(f"TLS folder {where}: {message}", hint=_ISSUE_HINT) from error
        except OSError as error:
            # The error of a failed open() names the file, that of a failed read() does not.
            message = f"{Path(error.filename or where).name}: {error.strerror}"
            raise InvalidInput(f"TLS folder {where}: {message}", hint=_ISSUE_HINT) from error
        return cls(folder=where, ca=ca, cert=cert, key=key)

    def for_client(self) -> grpc.ChannelCredentials:
        """Return the credentials that a client connects with."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)

    def for_server(self) -> grpc.ServerCredentials:
        """Return the credentials that a server listens with; every client needs a certificate."""
        return grpc.ssl_server_credentials([(self.key, self.cert)], self.ca, True)

    def server_context(self) -> ssl.SSLContext:
        """Return the context for a server that does not use gRPC; every client needs a
        certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / CERT_FILE, self.folder / KEY_FILE)
        context.load_verify_locations(self.folder / CA_FILE)
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def client_credentials(address: str, tls: Tls | None) -> grpc.ChannelCredentials | None:
    """Return the credentials for connecting to `address`.

    None for plain text: without `tls`, and for a unix socket in any case.

    :raises InvalidInput: `address` is not valid; or, without `tls`, neither on loopback nor a unix
        socket.
    """
    check_address(address) if tls else check_plain_text(address)
    return None if tls is None or is_unix(address) else tls.for_client()


class _Server(Protocol):
    """The methods of `grpc.Server` and `grpc.aio.Server` that `listen` calls."""

    def add_insecure_port(self, address: str) -> int: ...

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int: ...


def listen(server: _Server, address: str, tls: Tls | None) -> str:
    """Make a server listen at `address`; return the address, with the port that was bound.

    :param address: port 0 binds a free port.
    :param tls: None for plain text, which unix sockets use in any case.
    :raises InvalidInput: `address` is not valid, or is an abstract socket; or, without `tls`,
        neither on loopback nor a unix socket.
    :raises Refused: `address` cannot be bound.
    """
    check_address(address) if tls else check_plain_text(address)
    if address.startswith(ABSTRACT):
        raise InvalidInput(
            f"cannot listen on {address}: an abstract socket has no file with permissions, so every"
            " user of this machine could connect to it",
            hint="unix:PATH, or HOST:PORT with --tls FOLDER",
        )
    return bind(server, address, None if is_unix(address) else tls)


def bind(server: _Server, address: str, tls: Tls | None) -> str:
    """Do as `listen`, without its checks. The caller must know who may connect to `address`.

    :param tls: None for plain text.
    :raises Refused: `address` cannot be bound.
    """
    try:
        if tls is None:
            port = server.add_insecure_port(grpc_target(address))
        else:
            port = server.add_secure_port(address, tls.for_server())
    except RuntimeError as error:
        reason = _bind_problem(address)
        raise Refused(
            f"cannot listen on {address}{f': {reason}' if reason else ''}",
            hint="stop the server that uses this address, or choose another --listen address",
        ) from error
    return address if is_unix(address) else f"{address.rpartition(':')[0]}:{port}"


def _bind_problem(address: str) -> str:
    """Try to bind `address`; return why that fails, or empty if it succeeds or cannot be tried."""
    # gRPC only logs the reason, and does not put it into its RuntimeError. So bind without gRPC.
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
    """Run a TLS handshake in memory: one side presents the certificate, the other verifies it.

    :param server: whether the side that presents it is the server; else it is the client.
    :raises ssl.SSLError: the certificate cannot be loaded, or is not valid for that side.
    """
    presenter = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    verifier = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if server else ssl.PROTOCOL_TLS_SERVER)
    for context in (presenter, verifier):
        context.check_hostname = False
        context.load_cert_chain(folder / CERT_FILE, folder / KEY_FILE)
    presenter.verify_mode = ssl.CERT_NONE
    verifier.load_verify_locations(folder / CA_FILE)
    verifier.verify_mode = ssl.CERT_REQUIRED
    to_presenter, to_verifier = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = presenter.wrap_bio(to_presenter, to_verifier, server_side=server)
    theirs = verifier.wrap_bio(to_verifier, to_presenter, server_side=not server)
    # TLS 1.3 needs at most two flights each way (RFC 8446, 2). A side that needs input from the
    # other side raises SSLWantReadError; then the other side runs next.
    for side in (ours, theirs) * 3:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
