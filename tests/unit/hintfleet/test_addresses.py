"""Which addresses may be used in plain text, that is without TLS."""

import pytest

from hintfleet.errors import InvalidInput
from hintfleet.net.addresses import check_plain_text


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:50061", "[::1]:0", "unix:/run/x"])
def test_loopback_and_unix_sockets(address: str) -> None:
    assert check_plain_text(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:1",
        "10.0.0.1:1",
        "[::]:1",
        "a.org:1",
        "127.0.0.1",
        "127.0.0.1:x",
        "127.0.0.1:" + "9" * 5000,
        ":1",
        "unix:",
    ],
)
def test_all_others_are_refused(address: str) -> None:
    with pytest.raises(InvalidInput):
        check_plain_text(address)
