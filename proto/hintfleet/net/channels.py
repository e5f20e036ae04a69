"""Opens all our gRPC channels; none of them uses a proxy.

Proxies that environment variables name are for downloads and the web. Channels to host agents and
to the fleet service ignore these proxies, with and without TLS.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc import aio

from hintfleet.net.addresses import grpc_target

_Option = tuple[str, str | int]

# By default, gRPC uses grpc_proxy, https_proxy and http_proxy for every target except `unix:`,
# even for loopback and `unix-abstract:` (src/core/handshaker/http_connect/http_proxy_mapper.cc).
_NO_PROXY: tuple[_Option, ...] = (("grpc.enable_http_proxy", 0),)


def open_channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[_Option] = (),
) -> grpc.Channel:
    """Open a channel to a server.

    :param address: as users write it, not in gRPC's form: this function converts it.
    :param credentials: None for plain text.
    """
    options = (*options, *_NO_PROXY)
    if credentials is None:
        return grpc.insecure_channel(grpc_target(address), options)
    return grpc.secure_channel(grpc_target(address), credentials, options)


def open_aio_channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[_Option] = (),
) -> aio.Channel:
    """Open an asyncio channel to a server, on the running event loop; see `open_channel`."""
    options = (*options, *_NO_PROXY)
    if credentials is None:
        return aio.insecure_channel(grpc_target(address), options)
    return aio.secure_channel(grpc_target(address), credentials, options)
