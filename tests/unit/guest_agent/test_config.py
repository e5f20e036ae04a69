"""A guest agent's configuration is read from a file, or from the first line of stdin. An error
names the source, and the key if a value is wrong. TLS is not used on a unix socket."""

import asyncio
import io
import sys
from pathlib import Path

import pytest

from guest_agent import config
from guest_agent.agent import _connect
from hintfleet.agent_config import AgentConfig
from hintfleet.errors import InvalidInput

GOOD = AgentConfig(server="unix:/x", guest_uuid="u", token="t")
WRONG = '{"server": "unix:/x", "guest_uuid": "u", "token": "t", "ram_fd": "3"}'


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(GOOD.to_json())
    assert config.read(str(path)) == GOOD


def test_the_first_line_of_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(GOOD.to_json() + "\nmore"))
    assert config.read("-") == GOOD
    monkeypatch.setattr(sys, "stdin", io.StringIO(WRONG))
    with pytest.raises(InvalidInput, match="on stdin: ram_fd must be int"):
        config.read("-")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (WRONG.encode(), "ram_fd must be int"),
        (b"\xff", "cannot read.*0xff"),
        (b" " * (1 << 17), "cannot read.*larger than"),
        (None, "cannot read.*No such file"),
    ],
)
def test_mistakes_name_the_file(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=said) as caught:
        config.read(str(path))
    assert str(path) in caught.value.message


def test_a_unix_socket_is_never_encrypted() -> None:
    async def connect(server: str) -> None:
        made = AgentConfig(server=server, guest_uuid="u", token="t", tls_folder="/nowhere")
        channel, _ = _connect(made)
        await channel.close(None)

    asyncio.run(connect("unix:/run/host.sock"))
    with pytest.raises(InvalidInput, match=r"ca\.pem"):
        asyncio.run(connect("127.0.0.1:1"))
