"""The attack demonstration: what it claims is true in this run, and its attackers do exactly what is said of them."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from simulation.attack import correlations, largest_by_chance, reconstruct
from simulation.attack_demo import Round, attack_round, hold_round, run_attack
from simulation.attack_report import AttackReport, ClaimFailed
from simulation.attack_session import without_known_masks
from sottovoce.errors import ConfigError
from sottovoce.secagg import keys, shamir
from sottovoce.secagg.masks import MaskExpander

PIXELS, UNITS = 64, 40


@pytest.fixture(scope="module")
def round_() -> Round:
    return hold_round(seed=3)


@pytest.fixture(scope="module")
def report(round_: Round) -> AttackReport:
    return attack_round(round_)


def layer_update(pictures: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of a first dense layer, written down from its definition: factors[picture, unit] = dL/dz."""
    return pictures.T @ factors, factors.sum(axis=0)


def test_one_picture_comes_back_whatever_its_factors_are() -> None:
    rng = np.random.default_rng(1)
    picture = rng.uniform(0, 16, (1, PIXELS))
    factors = rng.normal(size=(1, UNITS)) * 1e-4
    factors[0, :15] = 0
    found = reconstruct(*layer_update(picture, factors))
    np.testing.assert_allclose(found.picture, picture[0], rtol=1e-9)
    assert found.unit == np.abs(factors[0]).argmax()
    assert not found.of_every_unit[:15].any()


def test_of_several_pictures_the_one_that_units_show_unblended_is_found() -> None:
    rng = np.random.default_rng(2)
    pictures = rng.uniform(0, 16, (5, PIXELS))
    factors = rng.uniform(0.5, 1.5, (5, UNITS)) * 10
    factors[:, [3, 17, 29]] = 0
    factors[2, [3, 17, 29]] = 0.1, 0.3, 0.2
    found = reconstruct(*layer_update(pictures, factors))
    np.testing.assert_allclose(found.picture, pictures[2], rtol=1e-9)
    assert found.unit == 17


def test_correlations_are_pearsons_and_a_constant_has_none() -> None:
    rng = np.random.default_rng(3)
    left, right = rng.normal(size=(4, 30)), rng.normal(size=(2, 30)) + 5
    expected = np.corrcoef(np.concatenate([left, right]))[:4, 4:]
    np.testing.assert_allclose(correlations(left, right), expected, atol=1e-12)
    assert correlations(np.full(30, 7.0), right).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("attempts", [1, 64])
def test_the_bound_is_where_pearsons_p_value_is_one_in_a_million(attempts: int) -> None:
    rng = np.random.default_rng(4)
    base, other = np.linalg.qr(np.column_stack([np.ones(PIXELS), rng.normal(size=(PIXELS, 2))]))[0][:, 1:].T
    bound = largest_by_chance(PIXELS, attempts=attempts)
    at_the_bound = bound * base + np.sqrt(1 - bound**2) * other
    assert stats.pearsonr(base, at_the_bound).pvalue * attempts == pytest.approx(1e-6, rel=1e-6)


def test_a_plain_update_shows_the_picture(report: AttackReport) -> None:
    assert report.plain.correlation > 0.99
    assert correlations(np.array(report.plain.picture), np.array(report.original))[0, 0] > 0.99


@pytest.mark.parametrize("attacker", ["masked", "one_mask_left", "below_threshold"])
def test_a_masked_update_is_noise(report: AttackReport, attacker: str) -> None:
    finding = getattr(report, attacker)
    assert report.verdict(finding) == "noise"
    assert abs(finding.correlation) < report.bounds.correlation < 0.6
    assert finding.closest_unit < report.bounds.closest_unit < 0.65
    assert abs(finding.whole_update) < report.bounds.whole_update < 0.1
    assert abs(correlations(np.array(finding.picture), np.array(report.original))[0, 0]) < 0.6


def test_the_session_is_active_and_its_sum_exact(round_: Round, report: AttackReport) -> None:
    assert round_.record.parameters.mode == "active"
    assert len(round_.record.cohort.members) == report.devices == 12
    assert round_.record.total == round_.plain_total
    assert round_.plain_total != round_.plain


def test_the_attacker_reads_no_secrets_of_the_victim_and_of_one_other_device(round_: Round) -> None:
    members = {member.device for member in round_.record.cohort.members}
    spared = members - round_.record.captured.keys()
    assert len(spared) == 2
    assert round_.victim in spared
    assert all(captured.mask.secret.hex() not in repr(round_.record) for captured in round_.record.captured.values())


def test_exactly_one_mask_is_left_to_the_one_who_has_all_other_keys(round_: Round) -> None:
    record, cohort = round_.record, round_.record.cohort
    left = without_known_masks(record, round_.victim, held=record.captured, pool_shares=False)
    own = cohort.position_of[round_.victim]
    (honest,) = (m for m in cohort.members if m.device != round_.victim and m.device not in record.captured)
    other = cohort.position_of[honest.device]
    secret = mask_key_of_victim(round_).agree(honest.mask_key)
    lower, upper = sorted((round_.victim, honest.device), key=cohort.position_of.__getitem__)
    key = keys.pairwise_mask_key(
        secret, session=cohort.shape.session, lower=lower, upper=upper, cipher=record.parameters.cipher
    )
    expected = bytearray(round_.plain)
    expander = MaskExpander(record.parameters)
    (expander.add if own < other else expander.subtract)(expected, key)
    assert left == expected


def test_the_limit_is_the_threshold(round_: Round, report: AttackReport) -> None:
    record, held = round_.record, sorted(round_.record.captured)
    assert without_known_masks(record, round_.victim, held=held[:7], pool_shares=True) == round_.plain
    assert without_known_masks(record, round_.victim, held=held[:6], pool_shares=True) != round_.plain
    assert report.threshold == 7
    assert report.verdict(report.at_threshold) == "the picture"


def test_a_claim_that_does_not_come_out_fails(report: AttackReport) -> None:
    report.check()
    for wrong in (
        {"masked": report.plain},
        {"plain": report.masked},
        {"one_mask_left": report.at_threshold},
        {"below_threshold": msgspec.structs.replace(report.below_threshold, closest_unit=0.7)},
        {"masked": msgspec.structs.replace(report.masked, whole_update=-0.2)},
        {"sum_is_exact": False},
    ):
        with pytest.raises(ClaimFailed):
            msgspec.structs.replace(report, **wrong).check()


def test_the_demonstration_prints_draws_and_reports(tmp_path: Path) -> None:
    image, numbers, text = tmp_path / "attack.png", tmp_path / "attack.json", io.StringIO()
    console = Console(file=text, width=1000)
    found = run_attack(seed=1, image_path=image, console=console, devices=14, report_path=numbers)
    printed = text.getvalue()
    assert all(sentence in printed for sentence in (*found.sentences, found.limit))
    assert f"{found.plain.correlation:z.3f}" in printed
    assert f"{found.one_mask_left.correlation:z.3f}" in printed
    assert msgspec.json.decode(numbers.read_bytes(), type=AttackReport) == found
    assert found.devices == 14
    assert image_size(image) == (1800, 1140)


def test_too_few_devices_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="--devices 9"):
        hold_round(seed=1, devices=9)


def mask_key_of_victim(round_: Round) -> keys.KeyPair:
    """The victim's mask key, rebuilt from all shares that the captured devices keep."""
    cohort = round_.record.cohort
    own = cohort.position_of[round_.victim]
    kept = {cohort.position_of[d]: captured.entrusted[own] for d, captured in round_.record.captured.items()}
    limbs = shamir.parse_shares(b"".join(kept.values()))
    return keys.key_pair(shamir.secret_of(shamir.interpolate(cohort.shape.points(tuple(kept)), limbs)))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
