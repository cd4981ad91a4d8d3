"""docs/deploy.md, done: commands enrol a fleet, and it trains through the production broker over mutual TLS."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from coordinator.journal import Journal
from edge_agent.config import BrokerConfig
from edge_agent.home import init_home
from simulation.broker_process import HOST, BrokerProcess, BrokerTls
from simulation.datasets import digits
from simulation.guarded import GuardedFolder
from simulation.process_fleet import EventReader, ProcessFleet, wait_until
from sottovoce.authority import Authority, create_authority, sign_request
from sottovoce.identity import key_to_pem, new_key, subject, write_secret_file

ROOT = Path(__file__).resolve().parent.parent.parent
WITHIN_S = 90.0
TASK = f"""
name = "digits"
bundle = "{ROOT}/simulation/bundles/digits.svp"
collection = "digits"
rounds = 2
purpose = "Show that the production broker lets through what a round needs."
cohort = {{ goal = 4, minimum = 4 }}
update = {{ clip_norm = 5.0, half_range = 1.0, weight_cap = 600, bits = 16 }}
metrics.loss = {{ half_range = 10000.0 }}
metrics.correct = {{ maximum = 600 }}
"""


def enrol_broker(authority: Authority) -> BrokerTls:
    key = new_key()
    certificate, key_file = authority.folder / "broker.pem", authority.folder / "broker.key"
    request = x509.CertificateSigningRequestBuilder().subject_name(subject(name="broker", fleet="home", role="broker"))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])
    pem = request.add_extension(address, critical=False).sign(key, hashes.SHA256())
    issued = sign_request(authority, pem.public_bytes(serialization.Encoding.PEM), at=now(), role="broker")
    certificate.write_bytes(issued.pem)
    write_secret_file(key_file, key_to_pem(key))
    return BrokerTls(authority.certificate_file, certificate, key_file, authority.revoked_file)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def enrol_coordinator(fleet: ProcessFleet, authority: Authority) -> None:
    home = fleet.coordinator_home
    address = f"{HOST}:{fleet.broker.port}"
    fleet.run_command("coordinator", "init", "--home", str(home), "--fleet", "home", "--broker", address)
    request, ca = str(home / "request.csr"), str(authority.folder)
    certificate = str(home / "certificate.pem")
    fleet.run_command("sottovoce.fleet_ca", "sign", request, "--ca", ca, "--role", "coordinator", "--out", certificate)
    for name in ("fleet-ca.pem", "revoked.pem"):
        (home / name).write_bytes((authority.folder / name).read_bytes())
    text = fleet.config.read_text().replace('# ca_file = "broker-ca.pem"', 'ca_file = "fleet-ca.pem"')
    fleet.config.write_text(re.sub("(?m)^# (revoked|cert_file|key_file) =", r"\1 =", text))


def enrol_device_by_commands(fleet: ProcessFleet, authority: Authority, device: str) -> None:
    home = fleet.home(device).path
    here, address = ["--home", str(home)], f"{HOST}:{fleet.broker.port}"
    fleet.run_command("edge_agent", "init", *here, "--device", device, "--fleet", "home", "--broker", address, "--tls")
    ca, certificate = str(authority.folder), str(authority.folder / f"{device}.pem")
    fleet.run_command("sottovoce.fleet_ca", "sign", str(home / "request.csr"), "--ca", ca, "--out", certificate)
    files = ["--certificate", certificate, "--ca", str(authority.certificate_file)]
    fleet.run_command("edge_agent", "enrol", *here, *files)


def enrol_device(fleet: ProcessFleet, authority: Authority, device: str) -> None:
    """Do what the commands do, without starting three processes."""
    broker = BrokerConfig(host=HOST, port=fleet.broker.port, tls=True)
    home = init_home(fleet.home(device).path, device=device, fleet="home", broker=broker)
    home.certificate.write_bytes(sign_request(authority, home.request.read_bytes(), at=now()).pem)
    home.fleet_ca.write_bytes(authority.certificate_file.read_bytes())


def allow_a_small_cohort(settings: Path) -> None:
    text = re.sub("(?m)^# minimum_cohort = .*", "minimum_cohort = 3", settings.read_text())
    settings.write_text(re.sub("(?m)^# minimum_honest_survivors = .*", "minimum_honest_survivors = 2", text))


@pytest.fixture
def fleet() -> Iterator[ProcessFleet]:
    with GuardedFolder("sottovoce-production-") as guarded:
        authority = create_authority(guarded.path / "ca", fleet="home", at=now())
        with BrokerProcess(tls=enrol_broker(authority)) as broker:
            fleet = ProcessFleet(guarded, broker)
            enrol_coordinator(fleet, authority)
            data = digits(devices=4, seed=1)
            enrolments = [enrol_device_by_commands, enrol_device, enrol_device, enrol_device]
            for enrol, (device, examples) in zip(enrolments, data.devices.items(), strict=True):
                enrol(fleet, authority, device)
                allow_a_small_cohort(fleet.home(device).config)
                fleet.give_examples(device, "digits", examples)
            try:
                yield fleet
            finally:
                fleet.stop()


def test_a_fleet_enrolled_by_its_commands_trains_over_mutual_tls(fleet: ProcessFleet) -> None:
    task = fleet.folder / "digits.toml"
    task.write_text(TASK)
    fleet.submit(task)
    fleet.start_coordinator()
    devices = sorted(path.name for path in (fleet.folder / "devices").iterdir())
    for device in devices:
        fleet.start_agent(device)
    wait_until(lambda: fleet.watch() == 0, deadline_s=WITHIN_S)
    committed = [event for event in EventReader(fleet.events).new() if event["event"] == "committed"]
    assert [sorted(event["survivors"]) for event in committed] == [devices, devices]  # type: ignore[call-overload]
    with Journal.open_read_only(fleet.coordinator_home / "journal.sqlite") as journal:
        assert journal.state(bytes.fromhex(str(committed[-1]["state"]))) is not None
    # The broker took every name from a certificate.
    assert all(f"as {device} (p5" in fleet.broker.log() for device in devices)
