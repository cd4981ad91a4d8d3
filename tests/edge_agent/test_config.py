"""agent.toml: what it means, and that whatever is wrong in it is told with the key's path."""

from pathlib import Path

import pytest

from edge_agent.config import AgentConfig, BrokerConfig, Retention, default_config, parse_config
from edge_agent.policy import Policy
from sottovoce.errors import ConfigError

PATH = Path("agent.toml")
MINIMAL = 'device = "pi-1"\nfleet = "clinic"\n[broker]\nhost = "broker.example"\n'


def test_what_is_not_said_has_its_default() -> None:
    config = parse_config(MINIMAL, path=PATH)
    assert config == AgentConfig(device="pi-1", fleet="clinic", broker=BrokerConfig(host="broker.example"))
    assert config.policy == Policy(minimum_cohort=10, minimum_honest_survivors=5, modes=("active",))
    assert (config.broker.actual_port, config.broker.tls, config.runtime) == (8883, True, "auto")


def test_everything_can_be_said() -> None:
    config = parse_config(
        """
        device = "pi-1"
        fleet = "clinic"
        runtime = "tflite"
        [broker]
        host = "127.0.0.1"
        port = 1884
        protocol = "3.1.1"
        tls = false
        keepalive_s = 30
        [policy]
        collections = ["steps"]
        refused_plans = ["ads"]
        minimum_cohort = 20
        modes = ["active", "curious"]
        max_clip_norm = 2
        paused = true
        [retention.steps]
        max_age_s = 86400
        max_count = 100
        """,
        path=PATH,
    )
    assert config.runtime == "tflite"
    assert (config.broker.actual_port, config.broker.protocol, config.broker.keepalive_s) == (1884, "3.1.1", 30)
    assert config.policy == Policy(
        paused=True,
        collections=("steps",),
        refused_plans=("ads",),
        minimum_cohort=20,
        modes=("active", "curious"),
        max_clip_norm=2.0,
    )
    assert config.retention == {"steps": Retention(max_age_s=86400.0, max_count=100)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device = ", "not TOML"),
        ('fleet = "clinic"\n[broker]\nhost = "b"', "missing required field `device`"),
        ('device = "pi-1"\nfleet = "clinic"', "missing required field `broker`"),
        ('device = "pi 1"\nfleet = "clinic"\n[broker]\nhost = "b"', "device is 'pi 1'"),
        ('device = "pi-1"\nfleet = "a/b"\n[broker]\nhost = "b"', "fleet is 'a/b'"),
        ('color = "red"\n' + MINIMAL, "color: unknown key; known here are device, fleet, broker"),
        (MINIMAL + "colour = 1", r"broker\.colour: unknown key"),
        (MINIMAL + "[policy]\nminimum_cohorts = 3", r"policy\.minimum_cohorts: unknown key; .*minimum_cohort,"),
        (MINIMAL + "[retention.steps]\nmax_age_days = 3", r"retention\.steps\.max_age_days: unknown key"),
        (MINIMAL + '[policy]\nminimum_cohort = "ten"', r"policy\.minimum_cohort: Expected `int`, got `str`"),
        (MINIMAL + "[policy]\nminimum_cohort = true", r"policy\.minimum_cohort: Expected `int`, got `bool`"),
        (MINIMAL + "[policy]\nminimum_cohort = 2", r"policy\.minimum_cohort is 2; it must be at least 3"),
        (MINIMAL + "[policy]\nminimum_honest_survivors = 1", r"policy\.minimum_honest_survivors is 1"),
        (MINIMAL + "[policy]\nmodes = []", r"policy\.modes is \(\); it must name at least one of active, curious"),
        (MINIMAL + '[policy]\nmodes = ["trusting"]', r"policy\.modes\[...\]|policy\.modes\[0\]"),
        (MINIMAL + '[policy]\ncollections = "some"', r"policy\.collections: Invalid enum value 'some'"),
        (MINIMAL + "[policy]\nmax_releases_per_state = 0", r"policy\.max_releases_per_state is 0"),
        (MINIMAL + "[policy]\nmax_clip_norm = nan", r"policy\.max_clip_norm"),
        (MINIMAL + "[policy]\nthreads = 0", r"policy\.threads is 0; it must be 1 to 64"),
        (MINIMAL + "port = 70000", r"broker\.port is 70000"),
        (MINIMAL + 'protocol = "4"', r"broker\.protocol: Invalid enum value '4'"),
        ("checkpoint_s = -1\n" + MINIMAL, r"checkpoint_s is -1; it must be 0 to 3600 seconds"),
        (MINIMAL + "keepalive_s = 0", r"broker\.keepalive_s is 0"),
        (
            MINIMAL + "tls = false",
            r"broker\.tls is false and broker\.host is 'broker\.example'.*set broker\.tls = true",
        ),
        (MINIMAL.replace("broker.example", " "), r"broker\.host is empty"),
        (
            MINIMAL.replace("broker.example", "127.0.0.1") + 'tls = false\nca_file = "x.pem"',
            "a TLS file is set; remove one",
        ),
        ('runtime = "torch"\n' + MINIMAL, "runtime: Invalid enum value 'torch'"),
        (MINIMAL + "[retention.steps]\nmax_count = -1", "retention"),
        ("policy = 3\n" + MINIMAL, "policy: Expected `object`, got `int`"),
        ("retention = 3\n" + MINIMAL, "retention: Expected `object`, got `int`"),
    ],
)
def test_what_is_wrong_is_told_with_its_path(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^agent.toml:? .*(?:{message})"):
        parse_config(text, path=PATH)


@pytest.mark.parametrize("broker", [BrokerConfig(host="b.example"), BrokerConfig(host="127.0.0.1", tls=False, port=5)])
def test_the_written_file_means_the_defaults(broker: BrokerConfig) -> None:
    written = default_config(device="pi-1", fleet="clinic", broker=broker)
    config = parse_config(written, path=PATH)
    assert (config.device, config.fleet, config.policy, config.runtime) == ("pi-1", "clinic", Policy(), "auto")
    assert (config.broker.host, config.broker.actual_port, config.broker.tls) == (
        broker.host,
        broker.actual_port,
        broker.tls,
    )


def test_every_commented_setting_is_the_default_and_real() -> None:
    """Uncommenting a line of the written file changes nothing: the comments cannot go stale."""
    written = default_config(device="pi-1", fleet="clinic", broker=BrokerConfig(host="b.example"))
    lines = [
        line[2:] if line.startswith("# ") and " = " in line and line[2].islower() else line
        for line in written.partition("# Where a collection gets examples")[0].splitlines()
    ]
    uncommented = [line for line in lines if not line.startswith(("max_age_s", "max_count = 5000"))]
    assert parse_config("\n".join(uncommented), path=PATH) == parse_config(written, path=PATH)
    assert {line.split(" = ")[0] for line in uncommented} >= set(Policy.__dataclass_fields__)


def test_the_sources_in_the_comments_are_real() -> None:
    written = default_config(device="pi-1", fleet="clinic", broker=BrokerConfig(host="b.example"))
    before, _, commented = written.partition("# [source.")
    text = before + "\n".join(line.removeprefix("# ") for line in ("# [source." + commented).splitlines())
    sources = parse_config(text, path=PATH).source
    assert {name: source.kind for name, source in sources.items()} == {
        "temperature": "thermal",
        "living_room": "mqtt",
        "power": "file",
        "load": "command",
    }
    assert sources["living_room"].topic == "home/+/temperature"


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ('kind = "command"', 'source: kind = "command" needs the key command'),
        ('kind = "mqtt"', 'source: kind = "mqtt" needs the key topic'),
        ('kind = "mqtt"\ntopic = "home/#/x"', "source: topic = 'home/#/x' is no topic filter"),
        ('kind = "mqtt"\ntopic = "home+"', "source: topic = 'home+' is no topic filter"),
        ('kind = "file"\npath = "a.txt"', "source: path must end in .csv or .jsonl"),
        ('kind = "thermal"\ntopic = "a"', 'source: the key topic has no meaning for kind = "thermal"; remove it'),
        ('kind = "thermal"\nevery_s = 0', 'source: every_s must be above 0 for kind = "thermal"'),
        ('kind = "thermal"\nscale = 0', "source: scale must not be 0"),
        ('kind = "thermal"\nzone = 1', "source.t.zone: unknown key"),
        ('kind = "radio"', "Invalid enum value 'radio'"),
    ],
)
def test_an_impossible_source_is_refused_by_its_key(table: str, text: str) -> None:
    broken = MINIMAL + f"\n[source.t]\n{table}\n"
    with pytest.raises(ConfigError) as refused:
        parse_config(broken, path=PATH)
    assert text in str(refused.value)
