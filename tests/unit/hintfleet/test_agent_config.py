"""The guest agent and the guest image's init read what a host agent writes. An error names the
file; if one value is wrong, also its key and what the value must be."""

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import guest_agent.config
from hintfleet.agent_config import FW_CFG_NAME, AgentConfig, Memory
from hintfleet.errors import InvalidInput
from hintfleet.settings import HUGE_PAGE_ORDER, PARTS, Driver, IsolatorKind, Method, TrackerKind

ROOT = Path(__file__).parents[3]
GOOD = {"server": "unix:/x", "guest_uuid": "u", "token": "t"}

texts = st.text(st.characters(exclude_categories=["Cs"]))  # no surrogates
sizes = st.integers(0, (1 << 52) - 1)


@st.composite
def configs(draw: st.DrawFn) -> AgentConfig:
    driver = draw(st.sampled_from(Driver))
    isolator, tracker = draw(st.sampled_from(PARTS[driver]))
    hugetlb = isolator is IsolatorKind.HUGETLB
    return AgentConfig(
        server=draw(texts),
        guest_uuid=draw(texts),
        token=draw(texts),
        tls_folder=draw(texts),
        method=draw(st.sampled_from([Method.NONE, Method.HINTING])),
        isolator=isolator,
        tracker=tracker,
        chunk_order=HUGE_PAGE_ORDER if hugetlb else draw(st.integers(0, 10)),
        threshold_chunks=draw(st.integers(1, 1 << 20)),
        memory=Memory.EMBEDDED if driver is Driver.EMBEDDED else Memory.KERNEL,
        ram_fd=draw(st.integers(-1, 1000)),
        memory_bytes=draw(sizes),
        max_memory_bytes=draw(sizes),
        orphan_after_s=draw(st.integers(0, 1 << 19)),
    )


@given(configs())
def test_round_trip(config: AgentConfig) -> None:
    text = config.to_json()
    assert "\n" not in text, "an embedded guest reads one line"
    read = AgentConfig.from_json(text, "written")
    assert read == config
    assert type(read.isolator) is IsolatorKind


@pytest.mark.parametrize(
    ("memory", "isolator", "tracker"),
    [
        ("embedded", "embedded", "bitmap"),
        ("kernel", "kmod", "reported"),
        ("kernel", "hugetlb", "bitmap"),
    ],
)
@pytest.mark.parametrize("unsaid", [{}, {"tracker": ""}])
def test_a_missing_tracker_is_that_of_the_isolator(
    memory: str, isolator: str, tracker: str, unsaid: dict[str, str]
) -> None:
    said = {"memory": memory, "isolator": isolator}
    read = AgentConfig.from_json(json.dumps(GOOD | said | unsaid), "f")
    assert read.tracker is TrackerKind(tracker)


@pytest.mark.parametrize("method", [Method.NONE, Method.HINTING])
def test_init_reads_the_method_with_sed(method: Method, tmp_path: Path) -> None:
    path = tmp_path / "config"
    config = AgentConfig(server="unix:/x", guest_uuid="u", token="t", method=method)
    path.write_text(config.to_json())
    init = (ROOT / "deploy/image/init").read_text().splitlines()
    (reads,) = (line for line in init if line.startswith("method() {"))
    script = f"CONFIG={path}\n{reads}\nmethod"
    assert subprocess.check_output(["sh", "-c", script], text=True).split() == [method]


@pytest.mark.parametrize(
    "reader",
    ["deploy/image/init", "deploy/systemd/hintfleet-guest.service"],
)
def test_all_readers_use_the_same_fw_cfg_file(reader: str) -> None:
    path = f"/sys/firmware/qemu_fw_cfg/by_name/{FW_CFG_NAME}/raw"
    assert path in (ROOT / reader).read_text()
    assert str(guest_agent.config._FW_CFG) == path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        (json.dumps({"server": "x"}), "'guest_uuid' is missing"),
        (json.dumps(GOOD | {"colour": 1}), "unknown key 'colour'"),
        (json.dumps(GOOD | {"method": "magic"}), "none or hinting"),
        (json.dumps(GOOD | {"method": "balloon"}), 'method is "balloon", must be none or hinting$'),
        (json.dumps(GOOD | {"isolator": "magic"}), "kmod or hugetlb or embedded"),
        (json.dumps(GOOD | {"isolator": ["kmod"]}), "isolator must be str"),
        (json.dumps(GOOD | {"isolator": "embedded"}), '"embedded", must be kmod or hugetlb$'),
        (json.dumps(GOOD | {"memory": "embedded"}), 'is "kmod", must be embedded$'),
        (json.dumps(GOOD | {"tracker": None}), "tracker must be str"),
        (json.dumps(GOOD | {"isolator": "kmod", "tracker": "bitmap"}), "must be reported$"),
        (json.dumps(GOOD | {"chunk_order": 11}), "0 to 10"),
        (json.dumps(GOOD | {"isolator": "hugetlb", "chunk_order": 10}), "must be 9"),
        (json.dumps(GOOD | {"chunk_order": True}), "must be int"),
        (json.dumps(GOOD | {"chunk_order": 9.0}), "must be int"),
        (json.dumps(GOOD | {"token": 5}), "token must be str"),
        (json.dumps(GOOD | {"token": "\ud800"}), "not JSON.*surrogates"),
        (json.dumps(GOOD | {"memory_bytes": -1}), "memory_bytes is -1, must be 0 to"),
        (json.dumps(GOOD | {"max_memory_bytes": -1}), "max_memory_bytes is -1, must be 0 to"),
        (json.dumps(GOOD | {"ram_fd": 1 << 64}), "must be -1 to"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=f"^agent configuration /run/config: .*{said}"):
        AgentConfig.from_json(text, "/run/config")


def test_an_impossible_configuration_cannot_be_built() -> None:
    with pytest.raises(InvalidInput, match="threshold_chunks is 0, must be 1 to 1048576"):
        AgentConfig(server="unix:/x", guest_uuid="u", token="t", threshold_chunks=0)
