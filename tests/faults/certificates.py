"""A certificate authority: for the stand-in's servers, and for the clients that ask it for a certificate."""

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_public_key
from cryptography.x509.oid import NameOID

_ALREADY_VALID = timedelta(minutes=5)
_LIFETIME = timedelta(days=30)


class Authority:
    def __init__(self, name: str = "stand-in authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        public_key = self._key.public_key()
        usage = {"key_cert_sign": True, "crl_sign": True}
        certificate = (
            _builder(self._name, self._name, public_key, _LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(**{**dict.fromkeys(_USAGES, False), **usage}), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = _pem(certificate)

    def server(self, *names: str) -> tuple[str, str]:
        """Certificate and private key (PEM) of a server with these DNS names and IP addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
        certificate = self._leaf(names[0], key.public_key(), _LIFETIME).add_extension(alternatives, critical=False)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return _pem(certificate.sign(self._key, hashes.SHA256())), private.decode()

    def client(self, public_key: str, lifetime: timedelta) -> str:
        """A certificate (PEM) for the client that has this public key (PEM), valid for `lifetime` from now."""
        key = load_pem_public_key(public_key.encode())
        assert isinstance(key, RSAPublicKey)  # what the connector makes
        return _pem(self._leaf("client", key, lifetime).sign(self._key, hashes.SHA256()))

    def tls(self, *names: str) -> ssl.SSLContext:
        """For a server with these names: TLS 1.3, and only clients with a certificate of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.pem)
        with TemporaryDirectory() as folder:
            pair = Path(folder, "server.pem")  # the ssl module reads keys from files only
            pair.touch(mode=0o600)
            pair.write_text("".join(self.server(*names)))
            context.load_cert_chain(pair)
        return context

    def _leaf(
        self, name: str, key: ec.EllipticCurvePublicKey | RSAPublicKey, lifetime: timedelta
    ) -> x509.CertificateBuilder:
        # Python 3.13 verifies strictly, and then the key identifier is needed
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return _builder(_name(name), self._name, key, lifetime).add_extension(issuer, critical=False)


_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey | RSAPublicKey, lifetime: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _ALREADY_VALID,
        not_valid_after=now + lifetime,
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
