"""The offline command `fleet-ca init | sign | revoke | list`: who belongs to the fleet.

A thin shell around `sottovoce.authority`: it reads the clock, the files and the arguments, and prints what to do next.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from cryptography import x509
from cryptography.x509.oid import NameOID

from sottovoce.authority import (
    AUTHORITY_DAYS,
    CERTIFICATE_DAYS,
    Authority,
    check_name,
    create_authority,
    open_authority,
    replace_file,
    revoke,
    sign_request,
    single_attribute,
)
from sottovoce.errors import ConfigError, SottovoceError
from sottovoce.identity import latest_time, load_certificate
from sottovoce.issued import CertifiedRole, Issued, issued_certificates

__all__ = [
    "Authority",
    "Issued",
    "create_authority",
    "issued_certificates",
    "main",
    "open_authority",
    "revoke",
    "sign_request",
]

_DESCRIPTION = """\
The fleet's certificate authority. Keep its folder on a machine of its own, offline if you can: whoever has
ca-key.pem decides who belongs to the fleet. Neither the coordinator nor the broker needs it.

  1. fleet-ca init --fleet clinic --out clinic-ca      once
  2. edge-agent init ... on the device                 writes request.csr; the key never leaves the device
  3. fleet-ca sign request.csr --ca clinic-ca          writes the certificate beside the request
  4. copy it to the device as certificate.pem, together with clinic-ca/fleet-ca.pem"""

_SIGN_DESCRIPTION = """\
Signs one request. A device id has at most one live certificate: a second one is refused until the first is
revoked, by `fleet-ca revoke` or by --replace. The coordinator's request needs --role coordinator.

A broker's TLS certificate: make key and request on the broker's machine, then sign with --role broker
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout broker.key -out broker.csr \\
    -subj "/CN=broker/O=FLEET/OU=broker" -addext "subjectAltName=DNS:broker.example"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `fleet-ca`; return 0, or 2 with one line on stderr when the user must change something."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options, latest_time(time.time()))
    except SottovoceError as error:
        print(f"fleet-ca: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fleet-ca: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="fleet-ca", description=_DESCRIPTION, formatter_class=raw)
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("--ca", type=Path, default=Path("fleet-ca"), metavar="DIR", help="its folder (./fleet-ca)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="make a new authority")
    init.add_argument("--fleet", required=True, metavar="NAME", help="the fleet's name, for example clinic")
    init.add_argument("--out", type=Path, default=Path("fleet-ca"), metavar="DIR", help="where (./fleet-ca)")
    init.add_argument("--days", type=int, default=AUTHORITY_DAYS, help="validity of the CA (%(default)s)")
    init.set_defaults(run=_run_init)

    sign = commands.add_parser(
        "sign", parents=[folder], help="sign a device's request", description=_SIGN_DESCRIPTION, formatter_class=raw
    )
    sign.add_argument("request", type=Path, metavar="CSR", help="the request.csr that `edge-agent init` wrote")
    sign.add_argument("--days", type=int, default=CERTIFICATE_DAYS, help="validity (%(default)s)")
    sign.add_argument("--out", type=Path, metavar="FILE", help="where the certificate goes (NAME.pem beside the CSR)")
    sign.add_argument("--role", choices=get_args(CertifiedRole), default="device", help="whom you mean to sign for")
    sign.add_argument("--replace", action="store_true", help="revoke the live certificate of the same id")
    sign.set_defaults(run=_run_sign)

    withdraw = commands.add_parser("revoke", parents=[folder], help="void a certificate and publish the list")
    withdraw.add_argument("certificate", metavar="SERIAL_OR_CERT", help="serial as in `list`, or a certificate file")
    withdraw.set_defaults(run=_run_revoke)

    show = commands.add_parser("list", parents=[folder], help="show what was issued (the key is not needed)")
    show.set_defaults(run=_run_list)
    return parser


def _run_init(options: argparse.Namespace, at: datetime.datetime) -> None:
    authority = create_authority(options.out, fleet=options.fleet, at=at, days=options.days)
    print(f"authority of fleet {authority.fleet}, valid until {authority.certificate.not_valid_after_utc:%F}")
    print(f"  {authority.key_file}   secret: keep it here, keep a copy in a safe")
    print(f"  {authority.certificate_file}   public: copy it to every device, the coordinator and the broker")


def _run_sign(options: argparse.Namespace, at: datetime.datetime) -> None:
    authority = open_authority(options.ca)
    request = options.request.read_bytes()
    out = options.out or options.request.with_name(f"{_requested_name(request)}.pem")
    if out.exists() and not options.replace:
        raise ConfigError(f"{out} exists already; choose another --out, or add --replace")
    issued = sign_request(authority, request, at=at, role=options.role, days=options.days, replace=options.replace)
    replace_file(out, issued.pem)
    print(f"{issued.role} {issued.name}: certificate {issued.serial}, valid until {issued.not_after:%F}")
    print(f"  {out}   copy it to {issued.name}, together with {authority.certificate_file}")
    if options.replace:
        print(f"  {authority.revoked_file}   copy it to the coordinator and the broker: the old one is void")


def _run_revoke(options: argparse.Namespace, at: datetime.datetime) -> None:
    authority = open_authority(options.ca)
    file = Path(options.certificate)
    serial = f"{load_certificate(file.read_bytes()).serial_number:x}" if file.is_file() else options.certificate
    issued = revoke(authority, serial, at=at)
    print(f"{issued.name}: certificate {issued.serial} is revoked")
    print(f"  {authority.revoked_file}   copy it to the coordinator and the broker")


def _run_list(options: argparse.Namespace, at: datetime.datetime) -> None:
    for issued in issued_certificates(options.ca):
        state = "live" if issued.live(at) else "expired" if issued.revoked is None else "revoked"
        print(f"{issued.serial:<40} {state:<8} {issued.role:<12} until {issued.not_after:%F}  {issued.name}")


def _requested_name(request_pem: bytes) -> str:
    """Return the file name for a request's certificate; what else it says is checked when it is signed."""
    try:
        name = single_attribute(x509.load_pem_x509_csr(request_pem).subject, NameOID.COMMON_NAME)
    except ValueError as error:
        raise ConfigError("not a PEM certificate signing request; `edge-agent init` writes one") from error
    check_name("device id", name)
    return name


if __name__ == "__main__":
    sys.exit(main())
