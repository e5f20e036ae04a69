"""A certificate authority in a folder, for a fleet that spans machines.

    ca.pem, ca.key           the authority
    issued/ROLE-NAME/        one TLS folder per certificate (hintfleet.net.tls), to be moved to
                             the machine that uses it (`--out` puts it elsewhere)

Keys are EC P-256, in files of mode 0600 in folders that other users may not enter. There is no
revocation: instead a certificate expires (`hintfleet pki issue`: after 397 days by default), and a
guest's certificate is useless without the token of a running guest. `read_certificates` describes
certificates.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hintfleet.errors import InvalidInput, Refused
from hintfleet.net.tls import CA_FILE, CERT_FILE, KEY_FILE, MOST_FILE_BYTES, Peer, Role
from hintfleet.system.files import read_at_most

CA_KEY_FILE = "ca.key"
_ISSUED = "issued"
# A certificate is valid from this long before it is made: another machine's clock may be behind.
_CLOCK_SKEW = timedelta(minutes=5)
# A common name has at most 64 characters (ub-common-name, RFC 5280).
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
# A DNS name has at most 253 characters: 255 octets with the length of each label (RFC 1035).
_DNS_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")

_Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The contents of a certificate.

    :ivar role: `authority` for a file ca.pem; else a `Role`'s value, or empty if it names none.
    :ivar subjects: its subject alternative names: DNS names, addresses and URIs.
    :ivar not_before, not_after: when it is valid, ISO 8601.
    :ivar fingerprint: SHA-256, in hexadecimal.
    :ivar state: `valid`, `expired`, `not yet valid`, or `foreign` (from another authority).
    """

    path: str
    role: str
    name: str
    subjects: tuple[str, ...]
    not_before: str
    not_after: str
    fingerprint: str
    state: str


class Authority:
    """A certificate authority in a folder; `init` creates one."""

    def __init__(self, folder: Path) -> None:
        """Read the authority's certificate and key.

        :raises InvalidInput: one is missing, cannot be read, or is no certificate or EC key.
        """
        self._folder = folder
        self._cert = _read_certificate(folder / CA_FILE)
        self._key = _read_key(folder / CA_KEY_FILE)

    @classmethod
    def init(cls, folder: Path, name: str, days: int, now: datetime | None = None) -> Authority:
        """Create an authority in `folder`, valid for `days` from `now` (default: the current time).

        :raises InvalidInput: the name is not valid.
        :raises Refused: the folder has an authority already, other users may enter it, or it
            cannot be written to. No existing file was changed, and no new one is left. The folder
            may have been created.
        """
        subject = _common_name(_checked(name))
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(subject, subject, key, key, _validity(days, now))
            # path_length 0: a certificate that the authority signs cannot sign others.
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        files = {CA_KEY_FILE: _pem_of(key), CA_FILE: _sign(builder, key).public_bytes(Encoding.PEM)}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(folder)
            # Check that neither exists before one is written: a new key beside an old certificate
            # would not match it.
            for file in files:
                if (folder / file).exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), folder / file)
            _write_new(folder, files)
        except FileExistsError as error:
            raise Refused(
                f"{folder} already has an authority: {Path(error.filename).name}",
                hint="a new one would invalidate all certificates that it issued; choose another "
                "--folder",
            ) from error
        except OSError as error:
            # A failed write names no file.
            raise Refused(f"cannot write {error.filename or folder}: {error.strerror}") from error
        return cls(folder)

    def issue(
        self,
        role: Role,
        name: str,
        hosts: Sequence[str],
        days: int,
        out: Path | None = None,
        now: datetime | None = None,
    ) -> Path:
        """Create a certificate with its key in a new TLS folder; return the folder.

        :param name: the common name; for a guest, its UUID.
        :param hosts: DNS names and IP addresses at which a host is reached.
        :param out: the folder to create; default issued/ROLE-NAME in the authority's folder.
        :raises InvalidInput: `name` or one of `hosts` is not valid, or the certificate would be
            valid longer than the authority.
        :raises Refused: the folder exists already, or it cannot be written.
        """
        name = _checked_name(role, name)
        key = ec.generate_private_key(ec.SECP256R1())
        validity = _validity(days, now)
        if validity[1] > self._cert.not_valid_after_utc:
            raise InvalidInput(
                f"the authority itself is valid until {self._cert.not_valid_after_utc:%Y-%m-%d}",
                hint="choose fewer --days",
            )
        # Only a host gets SERVER_AUTH, so that no other role can pose as a host.
        purpose = (
            ExtendedKeyUsageOID.SERVER_AUTH
            if role is Role.HOST
            else ExtendedKeyUsageOID.CLIENT_AUTH
        )
        uri = role.uri + (name if role is Role.GUEST else "")
        names = [_general_name(host) for host in hosts]
        builder = (
            _builder(_common_name(name), self._cert.subject, key, self._key, validity)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([*names, x509.UniformResourceIdentifier(uri)]),
                critical=False,
            )
        )
        target = out or self._folder / _ISSUED / f"{role.value}-{name}"
        cert = _sign(builder, self._key)
        _write_folder(
            target,
            {
                CA_FILE: self._cert.public_bytes(Encoding.PEM),
                CERT_FILE: cert.public_bytes(Encoding.PEM),
                KEY_FILE: _pem_of(key),
            },
        )
        return target


def read_certificates(path: Path) -> Iterator[Certificate]:
    """Yield the certificates at `path`: a file, a TLS folder, or an authority's folder.

    For an authority, yield its own certificate, then those in its folder `issued`.

    :raises InvalidInput: there is no certificate, or one cannot be read; or the authority's,
        ca.pem in the same folder, is missing.
    """
    if not path.is_dir():
        yield _describe(path, path.parent / CA_FILE)
    elif (path / CERT_FILE).exists():
        yield _describe(path / CERT_FILE, path / CA_FILE)
    else:
        yield _describe(path / CA_FILE, path / CA_FILE)
        for issued in sorted((path / _ISSUED).glob(f"*/{CERT_FILE}")):
            yield _describe(issued, path / CA_FILE)


def _describe(path: Path, ca_path: Path) -> Certificate:
    cert = _read_certificate(path)
    subjects = _subjects(cert, path)
    uris = [s.value for s in subjects if isinstance(s, x509.UniformResourceIdentifier)]
    peer = Peer.of_uris(uris)
    is_ca = path.name == CA_FILE
    names = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Certificate(
        path=str(path),
        role="authority" if is_ca else peer.role.value if peer else "",
        name=str(names[0].value) if names else "",
        subjects=tuple(str(subject.value) for subject in subjects),
        not_before=cert.not_valid_before_utc.isoformat(),
        not_after=cert.not_valid_after_utc.isoformat(),
        fingerprint=cert.fingerprint(hashes.SHA256()).hex(),
        state=_state(cert, _read_certificate(ca_path)),
    )


def _subjects(cert: x509.Certificate, path: Path) -> list[x509.GeneralName]:
    try:
        extension = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    # Extensions are only parsed here, not when the certificate is loaded.
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise InvalidInput(f"{path}: its extensions cannot be read: {error}") from error
    return list(extension.value)


def _state(cert: x509.Certificate, ca: x509.Certificate) -> str:
    try:
        cert.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return "foreign"
    now = datetime.now(UTC)
    if now > cert.not_valid_after_utc:
        return "expired"
    return "valid" if now >= cert.not_valid_before_utc else "not yet valid"


def _checked_name(role: Role, name: str) -> str:
    if role is Role.GUEST:
        try:
            return str(uuid.UUID(name))
        except ValueError:
            raise InvalidInput(f"a guest's name is its UUID, not {name!r}") from None
    return _checked(name)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"name {name!r}: 1 to 64 letters, digits, '.', '_' and '-'")
    return name


def _check_private(folder: Path) -> None:
    # The mode is only checked, not changed: the folder may have existed before, with a mode that
    # its owner chose.
    status = folder.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise Refused(
            f"other users may enter {folder}, which would hold the authority's key",
            hint=f"choose a new --folder, or close this one to others: chmod 700 {folder}",
        )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _DNS_NAME.fullmatch(host):
            raise InvalidInput(f"{host!r} is neither a DNS name nor an IP address") from None
        return x509.DNSName(host)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: _Key,
    issuer_key: _Key,
    validity: tuple[datetime, datetime],
) -> x509.CertificateBuilder:
    own_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
        .add_extension(own_id, critical=False)
        .add_extension(issuer_id, critical=False)
    )


def _validity(days: int, now: datetime | None) -> tuple[datetime, datetime]:
    start = now or datetime.now(UTC)
    return start - _CLOCK_SKEW, start + timedelta(days=days)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _sign(builder: x509.CertificateBuilder, key: _Key) -> x509.Certificate:
    return builder.sign(key, hashes.SHA256())


def _pem_of(key: _Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(read_at_most(path, MOST_FILE_BYTES))
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path}: {error.strerror}", hint="`hintfleet pki init` makes an authority"
        ) from error
    except ValueError as error:
        raise InvalidInput(f"{path} is not a certificate") from error


def _read_key(path: Path) -> _Key:
    try:
        key = load_pem_private_key(read_at_most(path, MOST_FILE_BYTES), password=None)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    # UnsupportedAlgorithm: for example a curve that OpenSSL has and `cryptography` does not know.
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidInput(f"{path} is not an unencrypted private key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInput(f"{path} is not an EC key")
    return key


def _write_folder(target: Path, files: dict[str, bytes]) -> None:
    """Create `target`, which must not exist, with these files in it: with all of them, or not at
    all."""
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkdtemp gives the new folder mode 0700. It has the same parent as `target`, because
        # rename(2) does not cross file systems.
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
        try:
            _write_new(new, files)
            if target.exists():  # rename(2) would replace an empty folder
                raise FileExistsError
            new.rename(target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except FileExistsError as error:
        raise Refused(
            f"{target} exists already", hint="remove it first, or choose another --out"
        ) from error
    except OSError as error:
        raise Refused(f"cannot write {target}: {error.strerror}") from error


def _write_new(folder: Path, files: dict[str, bytes]) -> None:
    """Create these files in `folder`: all of them or none."""
    with contextlib.ExitStack() as undo:
        for name, content in files.items():
            path = folder / name
            # Create the file with mode 0600: before a later chmod, another user could open it.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            undo.callback(path.unlink)
            with os.fdopen(fd, "wb") as file:
                file.write(content)
        undo.pop_all()
