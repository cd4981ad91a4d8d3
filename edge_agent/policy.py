"""What this device's owner allows; it refuses a plan before anything of it runs.

The owner writes the policy into `[policy]` of agent.toml. A plan that asks for more is refused with the rule's name and
the numbers on both sides; nothing is negotiated.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from edge_agent.extraction import EXTRACTORS
from sottovoce.errors import ConfigError, PolicyRefusal
from sottovoce.plan import Aggregation, Counted, Plan, Quantised, counts_devices
from sottovoce.secagg.client import ClientTerms
from sottovoce.wire.messages import Mode

Allowed: TypeAlias = Literal["all"] | tuple[str, ...]
COHORT_FLOOR = 3
"""Below three devices a sum hides nobody; no setting goes lower."""
_DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The owner's limits; every default is the careful one.

    Attributes:
        paused: Take part in nothing.
        collections: Collections of examples that plans may read: names, or `all`.
        plans: Plans that may run, by name: names, or `all`.
        refused_plans: Plans that may not run; this wins over `plans`.
        minimum_cohort: Fewest devices in a sum, at least 3.
        minimum_honest_survivors: Fewest honest devices that must remain in a sum when the assumed corrupt ones are
            taken away, at least 2.
        minimum_corrupt_share_bp: The coordinator must assume at least this share of the fleet to be corrupt, in
            hundredths of a per cent.
        modes: Modes of secure aggregation; `active` withstands a coordinator that lies to devices.
        max_releases_per_state: How often an update for one and the same state may leave, at least 1; counted as long
            as the plan would use examples that were used then.
        max_weight: A plan may count at most this many examples of this device; 0 is no limit.
        max_clip_norm: Every real-valued aggregation must be clipped to at most this norm; 0 is no limit.
        max_entries: All counted aggregations of a plan together, and all of one that reads messages, may have at most
            this many entries of this device that are not 0 (the plan's `entries`, or the size where it sets no limit;
            what counts devices in the entries of another one is no more); 0 is no limit.
        max_count: An entry of such an aggregation may be at most this large; 0 is no limit.
        minimum_threshold: A plan that gives its sums to every device must take out of all of them what fewer devices
            than this have contributed; 0 asks for nothing.
        minimum_vocabulary: Fewest words in each vocabulary of a plan that reads messages. Who asks for one word tests
            whether it is said at all, so the default is 2; 1 allows that. More is a demand on honest authors
            only: others fill up with words that nobody says.
        discovery: Plans may ask for words that they do not list (the sketches `text.word_sketch/1` and
            `text.word_table/1`): then the coordinator may read words of this device that nobody has thought of, among
            them, if it lies about which are frequent, rare ones.
        max_client_state_bytes: What programs may keep on this device from one round to the next, all slots together;
            0 refuses every program that keeps anything.
        threads: Processor threads that a program may use, 1 to 64.
    """

    paused: bool = False
    collections: Allowed = "all"
    plans: Allowed = "all"
    refused_plans: tuple[str, ...] = ()
    minimum_cohort: int = 10
    minimum_honest_survivors: int = 5
    minimum_corrupt_share_bp: int = 500
    modes: tuple[Mode, ...] = ("active",)
    max_releases_per_state: int = 2
    max_weight: int = 0
    max_clip_norm: float = 0.0
    max_entries: int = 0
    max_count: int = 0
    minimum_threshold: int = 3
    minimum_vocabulary: int = 2
    discovery: bool = False
    max_client_state_bytes: int = 1024 * 1024
    threads: int = 1

    def __post_init__(self) -> None:
        """Raise ConfigError, with the key's path, where a number is impossible."""
        checks = (
            ("minimum_cohort", self.minimum_cohort >= COHORT_FLOOR, f"must be at least {COHORT_FLOOR}"),
            ("minimum_honest_survivors", self.minimum_honest_survivors >= 2, "must be at least 2"),
            ("minimum_corrupt_share_bp", 0 <= self.minimum_corrupt_share_bp <= 9999, "must be 0 to 9999"),
            ("modes", bool(self.modes), f"must name at least one of {', '.join(get_args(Mode))}"),
            ("max_releases_per_state", self.max_releases_per_state >= 1, "must be at least 1"),
            ("max_weight", self.max_weight >= 0, "must be 0 (no limit) or more"),
            ("max_clip_norm", 0 <= self.max_clip_norm < float("inf"), "must be 0 (no limit) or more"),
            ("max_entries", self.max_entries >= 0, "must be 0 (no limit) or more"),
            ("max_count", self.max_count >= 0, "must be 0 (no limit) or more"),
            ("minimum_threshold", self.minimum_threshold >= 0, "must be 0 (none is asked for) or more"),
            ("minimum_vocabulary", self.minimum_vocabulary >= 1, "must be at least 1"),
            ("max_client_state_bytes", self.max_client_state_bytes >= 0, "must be 0 (nothing is kept) or more"),
            ("threads", 1 <= self.threads <= 64, "must be 1 to 64"),
        )
        for key, holds, text in checks:
            if not holds:
                raise ConfigError(f"policy.{key} is {getattr(self, key)!r}; it {text}")


def check_plan(policy: Policy, plan: Plan, now_s: float) -> None:
    """Raise PolicyRefusal unless the owner allows `plan`; called before anything of it is fetched or runs.

    Args:
        policy: The owner's.
        plan: As announced.
        now_s: The latest time this device knows, Unix seconds.

    Raises:
        PolicyRefusal: With the first rule that is broken, as `rule`, and the numbers in the text.
    """
    for rule, broken in _RULES.items():
        detail = broken(policy, plan, now_s)
        if detail:
            raise PolicyRefusal(rule, detail)


def check_participation(plan: Plan, *, round: int, last: tuple[int, float] | None, now_s: float) -> None:
    """Raise PolicyRefusal if the plan's own terms say that this device has answered plans of its name for now.

    Another attempt of the round that was answered last is no second participation: `max_releases_per_state` limits it.

    Args:
        plan: As announced.
        round: Number of the round.
        last: Round and time (Unix seconds) of this device's last release for that plan name; None before the first.
        now_s: The latest time this device knows, Unix seconds.
    """
    terms = plan.privacy.participation
    if last is None or last[0] == round:
        return
    again_s = last[1] + terms.every_days * _DAY_S
    if terms.once:
        raise PolicyRefusal("participation", f"plan {plan.name!r} asks once, and was answered in round {last[0]}")
    if now_s < again_s:
        raise PolicyRefusal(
            "participation",
            f"plan {plan.name!r} asks every {terms.every_days:g} days, and was answered in round {last[0]}; "
            f"it is too early until {datetime.datetime.fromtimestamp(again_s, datetime.UTC):%Y-%m-%d %H:%M} UTC",
        )


def client_terms(policy: Policy) -> ClientTerms:
    """Return what `policy` demands of a secure aggregation session."""
    return ClientTerms(
        minimum_cohort=policy.minimum_cohort,
        minimum_honest_survivors=policy.minimum_honest_survivors,
        modes=policy.modes,
        minimum_corrupt_share_bp=policy.minimum_corrupt_share_bp,
    )


def _paused(policy: Policy, _plan: Plan, _now_s: float) -> str:
    return "this device is paused; set policy.paused = false to take part again" if policy.paused else ""


def _refused_plan(policy: Policy, plan: Plan, _now_s: float) -> str:
    return f"plan {plan.name!r} stands in policy.refused_plans" if plan.name in policy.refused_plans else ""


def _plan_not_allowed(policy: Policy, plan: Plan, _now_s: float) -> str:
    return "" if _allows(policy.plans, plan.name) else f"plan {plan.name!r} is not among policy.plans"


def _collection_not_allowed(policy: Policy, plan: Plan, _now_s: float) -> str:
    allowed = _allows(policy.collections, plan.collection)
    return "" if allowed else f"plan {plan.name!r} reads collection {plan.collection!r}, not among policy.collections"


def _purpose_missing(_policy: Policy, plan: Plan, _now_s: float) -> str:
    return "" if plan.privacy.purpose.strip() else f"plan {plan.name!r} does not say what it is for"


def _expired(_policy: Policy, plan: Plan, now_s: float) -> str:
    expires = plan.privacy.expires_unix_s
    return f"plan {plan.name!r} expired {now_s - expires:.0f} s ago" if expires and now_s > expires else ""


def _cohort_too_small(policy: Policy, plan: Plan, _now_s: float) -> str:
    least, offered = max(policy.minimum_cohort, COHORT_FLOOR), plan.privacy.minimum_cohort
    return f"sums of {offered} devices; this device asks for at least {least}" if offered < least else ""


def _noise_requested(_policy: Policy, plan: Plan, _now_s: float) -> str:
    noise = plan.privacy.noise_multiplier
    return f"it promises noise ({noise:g}), which this release cannot add" if noise != 0 else ""


def _weight_too_large(policy: Policy, plan: Plan, _now_s: float) -> str:
    most, cap = policy.max_weight, plan.privacy.weight_cap
    return f"it counts up to {cap} examples of a device; this one allows {most}" if most and cap > most else ""


def _not_clipped(policy: Policy, plan: Plan, _now_s: float) -> str:
    if not policy.max_clip_norm:
        return ""
    for aggregation in plan.aggregations:
        clip = aggregation.clip_norm
        if isinstance(aggregation.encoding, Quantised) and (clip is None or clip > policy.max_clip_norm):
            asked = "is not clipped" if clip is None else f"is clipped to {clip:g}"
            return f"aggregation {aggregation.name!r} {asked}; this device asks for {policy.max_clip_norm:g} or less"
    return ""


def _too_many_entries(policy: Policy, plan: Plan, _now_s: float) -> str:
    named = {aggregation.name: aggregation for aggregation in plan.aggregations}
    # What follows another one has that one's entries, and is limited by them, of whatever kind that one is.
    bounded = [(a, named.get(a.follows, a)) for a in plan.aggregations if _counts(plan, a) and not a.presence_of]
    entries = {bound.name: bound.entries or bound.size for _, bound in bounded}
    total = sum(entries.values())
    if not policy.max_entries or total <= policy.max_entries:
        return ""
    names = ", ".join(repr(a.name) for a, _ in bounded)
    one = "aggregation" if len(bounded) == 1 else "aggregations"
    takes = "takes" if len(bounded) == 1 else "together take"
    return f"{one} {names} {takes} up to {total} entries of a device; this one allows {policy.max_entries}"


def _count_too_large(policy: Policy, plan: Plan, _now_s: float) -> str:
    for aggregation in plan.aggregations:
        if policy.max_count and _counts(plan, aggregation):
            encoding = aggregation.encoding
            maximum = encoding.maximum if isinstance(encoding, Counted) else encoding.half_range
            if maximum > policy.max_count:
                name = aggregation.name
                return f"aggregation {name!r} counts up to {maximum:.15g}; this device allows {policy.max_count}"
    return ""


def _counts(plan: Plan, aggregation: Aggregation) -> bool:
    """Say whether the owner's limits on counts hold for `aggregation`: rows of messages are counted in any encoding."""
    return isinstance(aggregation.encoding, Counted) or plan.extraction is not None


def _threshold_too_low(policy: Policy, plan: Plan, _now_s: float) -> str:
    least, offered = policy.minimum_threshold, plan.privacy.threshold
    if not plan.publish or not least:
        return ""
    if offered < least:
        return f"it publishes what {max(1, offered)} devices have contributed; this device asks for at least {least}"
    known = {a.presence_of for a in plan.aggregations} | {a.name for a in plan.aggregations if counts_devices(a)}
    for aggregation in plan.aggregations:
        if (aggregation.presence_of or aggregation.follows or aggregation.name) not in known:
            return (
                f"it publishes aggregation {aggregation.name!r} without counting devices in its entries, so its "
                f"threshold of {offered} takes nothing out of it"
            )
    return ""


def _unknown_extractor(_policy: Policy, plan: Plan, _now_s: float) -> str:
    if plan.extraction is None or plan.extraction.extractor in EXTRACTORS:
        return ""
    return f"it reads messages by {plan.extraction.extractor!r}; this device has {', '.join(EXTRACTORS)}"


def _discovers(policy: Policy, plan: Plan, _now_s: float) -> str:
    if policy.discovery or plan.extraction is None or plan.extraction.sketch is None:
        return ""
    return (
        f"it asks for words that it does not list ({plan.extraction.extractor}); set policy.discovery = true to allow "
        "that"
    )


def _vocabulary_too_small(policy: Policy, plan: Plan, _now_s: float) -> str:
    sizes = [len(vocabulary) for vocabulary in plan.extraction.vocabularies] if plan.extraction else []
    if not sizes or min(sizes) >= policy.minimum_vocabulary:
        return ""
    test = ": a test whether that one word is said" if min(sizes) == 1 else ""
    words = "a vocabulary of one word" if min(sizes) == 1 else f"a vocabulary of {min(sizes)} words"
    return f"{words}{test}; this device asks for at least {policy.minimum_vocabulary}"


_RULES: dict[str, Callable[[Policy, Plan, float], str]] = {
    "paused": _paused,
    "refused_plans": _refused_plan,
    "plans": _plan_not_allowed,
    "collections": _collection_not_allowed,
    "purpose": _purpose_missing,
    "expired": _expired,
    "minimum_cohort": _cohort_too_small,
    "noise": _noise_requested,
    "max_weight": _weight_too_large,
    "max_clip_norm": _not_clipped,
    "max_entries": _too_many_entries,
    "max_count": _count_too_large,
    "extractor": _unknown_extractor,
    "discovery": _discovers,
    "minimum_vocabulary": _vocabulary_too_small,
    "minimum_threshold": _threshold_too_low,
}


def _allows(allowed: Allowed, name: str) -> bool:
    return allowed == "all" or name in allowed
