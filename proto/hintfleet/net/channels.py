"""Opening gRPC channels: all of ours are opened here, and none goes through a proxy.

Host agents and the fleet service are reached directly, over TLS too: what a proxy of the
environment is for (downloads, the web) has nothing to do with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc import aio

from hintfleet.net.addresses import grpc_target

_Option = tuple[str, str | int]

# Else gRPC obeys grpc_proxy, https_proxy and http_proxy for every target but `unix:`, loopback
# and `unix-abstract:` among them: src/core/handshaker/http_connect/http_proxy_mapper.cc
_DIRECTLY: tuple[_Option, ...] = (("grpc.enable_http_proxy", 0),)


def open_channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[_Option] = (),
) -> grpc.Channel:
    """A channel to a server.

    :param address: as for people; what gRPC takes is made of it here.
    :param credentials: None for plain text.
    """
    options = (*options, *_DIRECTLY)
    if credentials is None:
        return grpc.insecure_channel(grpc_target(address), options)
    return grpc.secure_channel(grpc_target(address), credentials, options)


def open_aio_channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[_Option] = (),
) -> aio.Channel:
    """The same on the running event loop."""
    options = (*options, *_DIRECTLY)
    if credentials is None:
        return aio.insecure_channel(grpc_target(address), options)
    return aio.secure_channel(grpc_target(address), credentials, options)
