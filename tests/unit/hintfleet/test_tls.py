"""Which TLS folders a server or a client refuses, which role a certificate has, and that a
certificate without a role is refused."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hintfleet.errors import InvalidInput, Refused
from hintfleet.net.tls import CA_FILE, KEY_FILE, Peer, Role, Tls, check_role
from orchestrator.pki import Authority

UUID = "6f3c2b0e-5d0a-4c7e-9b52-0c4f4a1f2d10"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "pki", "test", 2)


@pytest.mark.parametrize("role", Role)
def test_a_folder_is_for_its_side_only(authority: Authority, role: Role) -> None:
    hosts = ["localhost"] if role is Role.HOST else []
    folder = authority.issue(role, UUID, hosts, 1)
    serves = role is Role.HOST
    tls = Tls.read(folder, server=serves)
    assert tls.key == (folder / KEY_FILE).read_bytes()
    assert "PRIVATE" not in repr(tls)
    with pytest.raises(InvalidInput, match="purpose"):
        Tls.read(folder, server=not serves)


def expired(authority: Authority, tmp_path: Path) -> Path:
    then = datetime.now(UTC) - timedelta(days=9)
    return authority.issue(Role.OPERATOR, "old", (), 1, now=then)


def foreign(authority: Authority, tmp_path: Path) -> Path:
    folder = authority.issue(Role.OPERATOR, "a", (), 1)
    Authority.init(tmp_path / "other", "test", 1)
    shutil.copy(tmp_path / "other" / CA_FILE, folder / CA_FILE)
    return folder


def of_another_key(authority: Authority, tmp_path: Path) -> Path:
    folder = authority.issue(Role.OPERATOR, "a", (), 1)
    other = authority.issue(Role.OPERATOR, "b", (), 1)
    shutil.copy(other / KEY_FILE, folder / KEY_FILE)
    return folder


def without_key(authority: Authority, tmp_path: Path) -> Path:
    folder = authority.issue(Role.OPERATOR, "a", (), 1)
    (folder / KEY_FILE).unlink()
    return folder


def nonsense(authority: Authority, tmp_path: Path) -> Path:
    folder = authority.issue(Role.OPERATOR, "a", (), 1)
    (folder / CA_FILE).write_text("nonsense")
    return folder


def with_a_folder_for_a_file(authority: Authority, tmp_path: Path) -> Path:
    folder = authority.issue(Role.OPERATOR, "a", (), 1)
    (folder / CA_FILE).unlink()
    (folder / CA_FILE).mkdir()
    return folder


def with_a_file_that_fails(authority: Authority, tmp_path: Path) -> Path:
    folder = authority.issue(Role.OPERATOR, "a", (), 1)
    (folder / CA_FILE).unlink()
    (folder / CA_FILE).symlink_to("/proc/self/mem")  # reading it fails: EIO (proc(5))
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (expired, "expired"),
        (foreign, "signature|issuer"),
        (of_another_key, "MISMATCH"),
        (without_key, "key.pem: No such file"),
        (with_a_folder_for_a_file, "ca.pem: Is a directory"),
        (with_a_file_that_fails, "Input/output error"),
        (nonsense, "cannot be used"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_when_it_is_read(
    authority: Authority, tmp_path: Path, make: Callable[[Authority, Path], Path], said: str
) -> None:
    with pytest.raises(InvalidInput, match=said):
        Tls.read(make(authority, tmp_path), server=False)


@pytest.mark.parametrize(
    ("uris", "peer"),
    [
        ([f"urn:uuid:{UUID}"], Peer(role=Role.GUEST, guest_uuid=UUID)),
        (["urn:hintfleet:operator"], Peer(role=Role.OPERATOR)),
        (["urn:hintfleet:operator", f"urn:uuid:{UUID}"], None),
        (["urn:hintfleet:guest"], None),
        (["urn:hintfleet:operators"], None),
        ([], None),
    ],
)
def test_the_role_in_a_certificate(uris: list[str], peer: Peer | None) -> None:
    assert Peer.of_uris(uris) == peer


def test_a_connection_without_tls_has_no_peer() -> None:
    context = {"transport_security_type": [b"insecure"], "peer_uri": [b"urn:hintfleet:operator"]}
    assert check_role(context, Role.OPERATOR) is None
    assert check_role({}, Role.GUEST) is None


def test_a_certificate_without_a_role_is_refused() -> None:
    context = {"transport_security_type": [b"ssl"]}
    for role in Role:
        with pytest.raises(Refused, match="no role"):
            check_role(context, role)
