"""`hintfleet pki` as a user runs it: which files it makes, what it refuses and prints."""

import base64
import json
import resource
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hintfleet.errors import InvalidInput, Refused
from hintfleet.net.tls import CA_FILE, CERT_FILE, KEY_FILE, Role
from orchestrator.cli import run_command
from orchestrator.pki import Authority, read_certificates

UUID = "6f3c2b0e-5d0a-4c7e-9b52-0c4f4a1f2d10"


def pki(*arguments: str | Path) -> int:
    return run_command(["pki", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Make an authority; return its folder."""
    assert pki("init", "--folder", tmp_path / "pki") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'pki'}\n"
    return tmp_path / "pki"


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    code = pki("show", path, "-o", "json")
    return code, json.loads(capsys.readouterr().out)


def test_what_is_issued_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pki("issue", "host", "h1", "--at", "a.org", "--at", "::1", "--folder", folder) == 0
    assert pki("issue", "guest", UUID.upper(), "--folder", folder) == 0
    assert pki("issue", "operator", "alice", "--days", "3", "--folder", folder) == 0
    code, rows = shown(folder, capsys)
    assert code == 0
    assert {row["role"]: row["subjects"] for row in rows} == {
        "authority": [],
        "guest": [f"urn:uuid:{UUID}"],
        "host": ["a.org", "::1", "urn:hintfleet:host"],
        "operator": ["urn:hintfleet:operator"],
    }
    assert {row["state"] for row in rows} == {"valid"}
    until = datetime.fromisoformat(rows[-1]["not_after"])
    assert timedelta(days=2, hours=23) < until - datetime.now(UTC) <= timedelta(days=3)
    assert len({row["fingerprint"] for row in rows}) == 4
    assert pki("show", folder / "issued/operator-alice") == 0
    assert rows[-1]["fingerprint"] in capsys.readouterr().out


def test_a_host_is_reached_by_its_name_unless_said_otherwise(folder: Path) -> None:
    assert pki("issue", "host", "h1.example.org", "--folder", folder) == 0
    (_, host) = read_certificates(folder)
    assert host.subjects == ("h1.example.org", "urn:hintfleet:host")


def test_a_host_may_have_a_dns_name_that_is_too_long_for_a_common_name(folder: Path) -> None:
    long = ".".join(["x" * 63] * 3 + ["y" * 61])
    assert len(long) == 253
    assert pki("issue", "host", "h1", "--at", long, "--folder", folder) == 0
    (_, host) = read_certificates(folder)
    assert host.subjects == (long, "urn:hintfleet:host")


def test_nobody_else_can_read_keys(folder: Path) -> None:
    assert pki("issue", "operator", "alice", "--folder", folder) == 0
    for path in (folder, *folder.rglob("*")):
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


@pytest.mark.parametrize("mode", [0o755, 0o1777, 0o710])
def test_a_folder_that_others_may_enter_is_refused_and_left_as_it_is(
    mode: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    assert pki("init", "--folder", shared) == 1
    assert f"chmod 700 {shared}" in capsys.readouterr().err
    assert stat.S_IMODE(shared.stat().st_mode) == mode
    assert list(shared.iterdir()) == []
    shared.chmod(0o700)
    assert pki("init", "--folder", shared) == 0


@pytest.mark.parametrize("name", ["", "x" * 65, "a/b", "ä", "a\n"])
def test_an_authority_is_called_like_all_others(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pki("init", "--name", name, "--folder", tmp_path / "pki") == 2
    assert "1 to 64 letters" in capsys.readouterr().err
    assert not (tmp_path / "pki").exists()


def test_an_authority_that_could_not_be_written_is_made_later(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "pki"
    # 300 bytes: a key is smaller, and a certificate is larger.
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(Refused, match=f"cannot write {folder}: File too large"):
            Authority.init(folder, "test", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(folder.iterdir()) == []
    Authority.init(folder, "test", 2)


@pytest.mark.parametrize("lost", ["ca.key", "ca.pem"])
def test_an_authority_is_never_overwritten(
    folder: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / lost).unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert pki("init", "--folder", folder) == 1
    assert "already has an authority" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_certificate_is_never_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    assert pki("issue", "operator", "alice", "--out", tmp_path / "there", "--folder", folder) == 1
    assert pki("issue", "operator", "alice", "--folder", folder) == 0
    key = (folder / "issued/operator-alice" / KEY_FILE).read_bytes()
    assert pki("issue", "operator", "alice", "--folder", folder) == 1
    assert "exists already" in capsys.readouterr().err
    assert (folder / "issued/operator-alice" / KEY_FILE).read_bytes() == key
    assert [path.name for path in (folder / "issued").iterdir()] == ["operator-alice"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["guest", "not-a-uuid"], "UUID"),
        (["operator", "../alice"], "letters"),
        (["host", "h1", "--at", "a b"], "neither a DNS name"),
        (["host", "h1", "--at", "*"], "neither a DNS name"),
        (["host", "h1", "--at", "x." * 126 + "xx"], "neither a DNS name"),
        (["operator", "alice", "--at", "a.org"], "role host only"),
        (["operator", "alice", "--days", "36500"], "the authority itself is valid until"),
        (["operator", "alice", "--days", "0"], "--days"),
        (["king", "alice"], "'king'"),
    ],
)
def test_wrong_input(
    folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pki("issue", *arguments, "--folder", folder) == 2
    assert said in capsys.readouterr().err
    assert not list(folder.glob("issued/*"))


def test_what_is_not_valid_is_said_and_is_a_failure(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = Authority(folder)
    now = datetime.now(UTC)
    old = authority.issue(Role.OPERATOR, "old", (), 1, now=now - timedelta(days=2))
    early = authority.issue(Role.OPERATOR, "early", (), 1, now=now + timedelta(days=1))
    assert [row["state"] for row in shown(old, capsys)[1]] == ["expired"]
    assert [row["state"] for row in shown(early, capsys)[1]] == ["not yet valid"]
    other = Authority.init(tmp_path / "other", "other", 9).issue(Role.OPERATOR, "x", (), 1, now=now)
    (other / CA_FILE).write_bytes((folder / CA_FILE).read_bytes())
    code, rows = shown(other, capsys)
    assert (code, [row["state"] for row in rows]) == (1, ["foreign"])
    code, rows = shown(folder, capsys)
    assert (code, [row["state"] for row in rows]) == (1, ["valid", "not yet valid", "expired"])


@pytest.mark.parametrize("broken", [CERT_FILE, CA_FILE])
def test_files_that_cannot_be_read(
    folder: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    issued = Authority(folder).issue(Role.OPERATOR, "alice", (), 1)
    (issued / broken).write_text("nonsense")
    assert pki("show", issued) == 2
    assert "is not a certificate" in capsys.readouterr().err


def test_no_authority(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pki("issue", "operator", "alice", "--folder", tmp_path) == 2
    assert "hintfleet pki init" in capsys.readouterr().err
    (tmp_path / "ca.pem").write_text("x")
    with pytest.raises(InvalidInput, match="is not a certificate"):
        Authority(tmp_path)


# A key on the curve prime239v1, which OpenSSL has, but the library cryptography has not.
UNKNOWN_CURVE = """\
-----BEGIN EC PRIVATE KEY-----
MHECAQEEHhflBaHX0OFYKRl/WkGM9gyWrK+vsbC/VWAzg+oBqKAKBggqhkjOPQMB
BKFAAz4ABAD34ZdKaxENDSN9Fweb+gTM1NW7P98kFIElMEbyyz75TCTanao+v4tP
c9IYDF9n+9i3mH1Ovo2vV5U1Tg==
-----END EC PRIVATE KEY-----
"""


@pytest.mark.parametrize("key", ["x", UNKNOWN_CURVE])
def test_an_authority_without_its_key_issues_nothing(folder: Path, key: str) -> None:
    (folder / "ca.key").write_text(key)
    with pytest.raises(InvalidInput, match="is not an unencrypted private key"):
        Authority(folder)


# Self-signed, with another key on that curve.
ON_UNKNOWN_CURVE = """\
-----BEGIN CERTIFICATE-----
MIIBZDCCAQ+gAwIBAgIUNYw22VwDiNprTVePVf5RbXBk/hEwCgYIKoZIzj0EAwIw
DDEKMAgGA1UEAwwBeDAeFw0yNjExMjcxOTA4NDNaFw0yNzAzMDcxOTA4NDNaMAwx
CjAIBgNVBAMMAXgwVTATBgcqhkjOPQIBBggqhkjOPQMBBAM+AAR5I9Ur/RdR7OlR
QLA9AZyh8292w/Q5+n5nmFTL9RNrCqwfT5vRGF1hyPo+4gC0ps7svZfxdPpUZVfW
9MujUzBRMB0GA1UdDgQWBBSQQ4Cer5Pxtq72uU/u0eV7BQzDXzAfBgNVHSMEGDAW
gBSQQ4Cer5Pxtq72uU/u0eV7BQzDXzAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49
BAMCA0MAMEACHncXHP1LLc5aw5Xm6FF3zLFzcN/6i9SmkPuHDWN/CAIeCf75dE6X
AjM+I0yanBm+MZRn3g1B1ja+pFSm2gA9
-----END CERTIFICATE-----
"""


def test_a_certificate_on_a_curve_that_the_library_lacks_is_foreign(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "ca.pem").write_text(ON_UNKNOWN_CURVE)
    code, (row,) = shown(folder, capsys)
    assert (code, row["name"], row["state"]) == (1, "x", "foreign")


def test_a_certificate_whose_names_cannot_be_read_is_wrong_input(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    issued = Authority(folder).issue(Role.HOST, "h1", ("a.org",), 1) / CERT_FILE
    der = x509.load_pem_x509_certificate(issued.read_bytes()).public_bytes(Encoding.DER)
    assert der.count(b"a.org") == 1
    text = base64.encodebytes(der.replace(b"a.org", b"a\xff\xff\xff\xff")).decode()
    issued.write_text(f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n")
    assert pki("show", issued.parent) == 2
    assert "its extensions cannot be read" in capsys.readouterr().err
