"""What the kernel's files say, from real ones: a guest of 1 GiB and a machine of 24 GiB."""

from pathlib import Path

import pytest

from guest_agent.memory.kernel import free_chunk_count, parse_buddyinfo, parse_zoneinfo
from hintfleet.errors import Refused

DATA = Path(__file__).parents[2] / "data"


def test_zoneinfo_of_a_machine_with_three_zones() -> None:
    zones = parse_zoneinfo((DATA / "zoneinfo-24GiB.txt").read_text())
    assert [(z.name, z.start_pfn) for z in zones] == [
        ("DMA", 1),
        ("DMA32", 4096),
        ("Normal", 1048576),
    ]
    sparse = zones[1]
    assert sparse.present_pages < sparse.spanned_pages, "a hole below 4 GiB"
    assert sum(z.present_pages for z in zones) * 4096 == pytest.approx(24 << 30, rel=0.001)


def test_buddyinfo_counts_whole_chunks_only() -> None:
    lists = parse_buddyinfo((DATA / "buddyinfo-24GiB.txt").read_text())
    assert set(lists) == {(0, "DMA"), (0, "DMA32"), (0, "Normal")}
    counts = lists[0, "DMA32"]
    assert free_chunk_count([counts], 9) == counts[9] + 2 * counts[10]
    assert free_chunk_count([[9] * 9 + [0, 0]], 9) == 0


@pytest.mark.parametrize("text", ["", "Node 0, zone      DMA\n", "rubbish\n" * 10])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        parse_zoneinfo(text)
    with pytest.raises(Refused):
        parse_buddyinfo(text)


def test_a_zone_that_lacks_a_number_is_refused_not_guessed() -> None:
    text = (DATA / "zoneinfo-24GiB.txt").read_text().replace("        spanned", "        spannt")
    with pytest.raises(Refused, match="not understood"):
        parse_zoneinfo(text)
