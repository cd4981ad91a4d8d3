"""Topics: made here, taken apart here, and whatever a stranger calls one is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.errors import ConfigError, LocalProtocolError, MalformedMessage
from sottovoce.wire.topics import NO_ROUTE, Topics, check_filter, check_topic, matches

names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
digests = st.binary(min_size=32, max_size=32)
TOPICS = Topics("choir")


@given(fleet=names, device=names, route=names, digest=digests, index=st.integers(0, 9_999_999))
def test_every_topic_made_here_is_taken_apart_again(fleet, device, route, digest, index):
    topics = Topics(fleet)
    made = {
        topics.round(): ("all", "round"),
        topics.outcome(): ("all", "outcome"),
        topics.blob_chunk(digest, index): ("all", "blob", digest.hex(), str(index)),
        topics.status(device): ("st", device),
        topics.up_message(device): ("up", device, NO_ROUTE, "m"),
        topics.up_message(device, route): ("up", device, route, "m"),
        topics.up_chunk(device, route): ("up", device, route, "c"),
        topics.down(device): ("dn", device, "m"),
    }
    for topic, levels in made.items():
        assert topics.split(topic) == levels
        assert topic.count("/") <= 6
        check_topic(topic)
    assert topics.split_blob_chunk(topics.blob_chunk(digest, index)) == (digest, index)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "sv1",
        "sv1/choir",
        "sv1/choir/",
        "sv1/choir/all",
        "sv1/choir/all/",
        "sv1/choir/all/round/",
        "sv1/choir/all/round\n",
        "sv1/choir/all/state",
        "sv1/other/all/round",
        "sv1/choirx/all/round",
        "sv2/choir/all/round",
        "/sv1/choir/all/round",
        "$share/g/sv1/choir/all/round",
        "sv1/choir/st/",
        "sv1/choir/st/a/b",
        "sv1/choir/st/pi 1",
        "sv1/choir/st/" + "a" * 65,
        "sv1/choir/up/pi-1/m",
        "sv1/choir/up/pi-1//m",
        "sv1/choir/up//0/m",
        "sv1/choir/up/pi-1/0/x",
        "sv1/choir/up/pi-1/0/m/m",
        "sv1/choir/up/../0/m",
        "sv1/choir/up/pi-1\0/0/m",
        "sv1/choir/up/pï-1/0/m",
        "sv1/choir/dn/pi-1",
        "sv1/choir/all/blob/" + "0" * 63 + "/0",
        "sv1/choir/all/blob/" + "0" * 65 + "/0",
        "sv1/choir/all/blob/" + "A" * 64 + "/0",
        "sv1/choir/all/blob/" + "0" * 64 + "/",
        "sv1/choir/all/blob/" + "0" * 64 + "/-1",
        "sv1/choir/all/blob/" + "0" * 64 + "/01",
        "sv1/choir/all/blob/" + "0" * 64 + "/١",
        "sv1/choir/all/blob/" + "0" * 64 + "/" + "9" * 8,
        "/".join(["sv1", "choir", *["x"] * 10_000]),
    ],
)
def test_a_topic_that_is_not_ours_is_refused(topic):
    with pytest.raises(MalformedMessage):
        TOPICS.split(topic)
    with pytest.raises(MalformedMessage):
        TOPICS.split_blob_chunk(topic)


@given(topic=st.text(max_size=60))
def test_any_text_is_a_topic_of_ours_or_malformed(topic):
    for each in (topic, f"sv1/choir/{topic}", f"sv1/choir/up/{topic}"):
        try:
            levels = TOPICS.split(each)
        except MalformedMessage:
            continue
        assert each == "/".join(("sv1", "choir", *levels))


def test_only_blob_chunks_are_taken_for_blob_chunks():
    for topic in (TOPICS.round(), TOPICS.down("pi-1")):
        with pytest.raises(MalformedMessage, match="blob chunk"):
            TOPICS.split_blob_chunk(topic)


@pytest.mark.parametrize("fleet", ["", "a/b", "+", "#", "a b", "a" * 65, "chœur", "choir\n"])
def test_a_fleet_name_that_cannot_stand_in_a_topic_is_refused(fleet):
    with pytest.raises(ConfigError):
        Topics(fleet)


@given(device=names, route=names, digest=digests, index=st.integers(0, 9_999_999))
def test_filters_find_what_they_are_for_and_nothing_else(device, route, digest, index):
    chunk, message, vector = (
        TOPICS.blob_chunk(digest, index), TOPICS.up_message(device, route), TOPICS.up_chunk(device, route)
    )  # fmt: skip
    expected = {
        TOPICS.blob_filter(digest): {chunk},
        TOPICS.all_blobs_filter(): {chunk},
        TOPICS.status_filter(): {TOPICS.status(device)},
        TOPICS.up_filters()[0]: {message},
        TOPICS.up_filters()[1]: {vector},
    }
    everything = {chunk, message, vector, TOPICS.status(device), TOPICS.down(device), TOPICS.round(), TOPICS.outcome()}
    for topic_filter, wanted in expected.items():
        check_filter(topic_filter)
        assert {topic for topic in everything if matches(topic_filter, topic)} == wanted


# MQTT 5, section 4.7: the specification's own examples and their edges.
@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("sport/#", "sports", False),
        ("#", "anything/at/all", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("#", "$SYS/uptime", False),
        ("+/uptime", "$SYS/uptime", False),
        ("$SYS/#", "$SYS/uptime", True),
        ("a/b", "a/b", True),
        ("a/b", "A/b", False),
        ("+/tennis/#", "sport/tennis", True),
    ],
)
def test_wildcards_match_as_the_specification_says(topic_filter, topic, expected):
    check_filter(topic_filter)
    assert matches(topic_filter, topic) is expected


@pytest.mark.parametrize("topic_filter", ["", "a/#/b", "a#", "#a", "a/b+", "+a/b", "a\0", "x" * 65_536])
def test_what_is_no_filter_is_our_own_mistake(topic_filter):
    with pytest.raises(LocalProtocolError):
        check_filter(topic_filter)


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0", "x" * 65_536])
def test_what_is_no_topic_is_our_own_mistake(topic):
    with pytest.raises(LocalProtocolError):
        check_topic(topic)
