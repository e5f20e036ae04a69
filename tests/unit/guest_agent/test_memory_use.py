"""What the kernels of real guests show of their memory: texts as Linux 4.15 and 6.1 print them,
real ones of a machine of 24 GiB (6.18), hostile texts, and this machine's own."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.memory.memory_use import KernelMemoryUse, memory_use_of
from hintfleet.errors import Refused
from hintfleet.units import GIB, KIB, MIB, PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

DATA = Path(__file__).parents[2] / "data"
PARTS = (
    *("used_bytes", "file_cache_bytes", "free_chunks_bytes"),
    *("free_pieces_bytes", "isolated_bytes"),
)

# Linux 4.15: 8 GiB, two processors. Lines of other counters are left out, here and below.
ZONEINFO_4_15 = b"""Node 0, zone      DMA
  per-node stats
      nr_file_pages 181233
  pages free     3977
        min      33
        low      41
        high     49
        spanned  4095
        present  3998
        managed  3977
        protection: (0, 925, 7912, 7912, 7912)
  pagesets
    cpu: 0
              count: 0
              high:  0
              batch: 1
  vm stats threshold: 4
    cpu: 1
              count: 0
              high:  0
              batch: 1
  vm stats threshold: 4
  node_unreclaimable:  0
  start_pfn:           1
Node 0, zone    DMA32
  pages free     241441
        min      1972
        low      2465
        high     2958
        spanned  1044480
        present  258032
        managed  241640
        protection: (0, 0, 6986, 6986, 6986)
  pagesets
    cpu: 0
              count: 29
              high:  186
              batch: 31
  vm stats threshold: 16
    cpu: 1
              count: 168
              high:  186
              batch: 31
  vm stats threshold: 16
  node_unreclaimable:  0
  start_pfn:           4096
Node 0, zone   Normal
  pages free     1506103
        min      14890
        low      18612
        high     22334
        spanned  1835008
        present  1835008
        managed  1790149
        protection: (0, 0, 0, 0, 0)
      nr_free_pages 1506103
  pagesets
    cpu: 0
              count: 122
              high:  186
              batch: 31
  vm stats threshold: 28
    cpu: 1
              count: 94
              high:  186
              batch: 31
  vm stats threshold: 28
  node_unreclaimable:  0
  start_pfn:           1048576
Node 0, zone  Movable
  pages free     0
        min      0
        low      0
        high     0
        spanned  0
        present  0
        managed  0
        protection: (0, 0, 0, 0, 0)
"""
BUDDYINFO_4_15 = """\
Node 0, zone      DMA      1      0      0      1      2      1      1      0      1      1      3
Node 0, zone    DMA32      5      6      3      5      5      4      3      4      5      5    232
Node 0, zone   Normal    391    412    201    108     77     52     31     17     11      6   1464
"""
MEMINFO_4_15 = b"""MemTotal:        8143064 kB
MemFree:         7006084 kB
MemAvailable:    7484920 kB
Buffers:           42272 kB
Cached:           660848 kB
SwapCached:            0 kB
Active:           591644 kB
Mapped:           116660 kB
Shmem:              1596 kB
Slab:              91820 kB
"""

# Linux 6.1 of Debian 12: a guest of 1 GiB with one processor. MemTotal is 40 MiB less than present.
ZONEINFO_6_1 = b"""Node 0, zone      DMA
  per-node stats
      nr_file_pages 40960
  pages free     3840
        boost    0
        min      22
        low      27
        high     32
        spanned  4095
        present  3998
        managed  3840
        cma      0
        protection: (0, 953, 953, 953, 953)
      nr_free_pages 3840
  pagesets
    cpu: 0
              count: 0
              high:  0
              batch: 1
  vm stats threshold: 2
  node_unreclaimable:  0
  start_pfn:           1
Node 0, zone    DMA32
  pages free     150000
        boost    0
        min      1408
        low      1760
        high     2112
        spanned  258048
        present  258048
        managed  247930
        cma      0
        protection: (0, 0, 0, 0, 0)
  pagesets
    cpu: 0
              count: 700
              high:  1760
              batch: 63
  vm stats threshold: 10
  node_unreclaimable:  0
  start_pfn:           4096
"""
BUDDYINFO_6_1 = """\
Node 0, zone      DMA      0      0      0      0      0      0      0      0      1      1      3
Node 0, zone    DMA32    200    100     50     25     10      5      2      1      1     30    128
"""
MEMINFO_6_1 = b"""MemTotal:        1007080 kB
MemFree:          600000 kB
MemAvailable:     760000 kB
Buffers:           10240 kB
Cached:           153600 kB
SwapCached:            0 kB
Shmem:              5120 kB
SReclaimable:      20480 kB
"""


def use_of(
    zoneinfo: bytes,
    buddyinfo: str,
    meminfo: bytes,
    *,
    chunk_order: int = 9,
    isolated_pages: int = 0,
    crash_kernel_bytes: int = 0,
) -> pb.MemoryUse:
    return memory_use_of(
        zoneinfo=zoneinfo,
        buddyinfo=buddyinfo,
        meminfo=meminfo,
        chunk_order=chunk_order,
        isolated_pages=isolated_pages,
        crash_kernel_bytes=crash_kernel_bytes,
    )


def in_all(use: pb.MemoryUse) -> int:
    return sum(getattr(use, name) for name in PARTS)


OLD = (ZONEINFO_4_15, BUDDYINFO_4_15, MEMINFO_4_15)
DEBIAN = (ZONEINFO_6_1, BUDDYINFO_6_1, MEMINFO_6_1)


def test_an_old_kernel() -> None:
    use = use_of(*OLD)
    assert use.total_bytes == (3998 + 258032 + 1835008) * PAGE_BYTES
    assert in_all(use) == use.total_bytes
    assert use.file_cache_bytes == (42272 + 660848 - 1596) * KIB
    assert use.free_chunks_bytes == (12 + 2 * (3 + 232 + 1464)) * 2 * MIB
    below_a_chunk = [397, 418, 204, 114, 84, 57, 35, 21, 17]
    blocks = sum(count << order for order, count in enumerate(below_a_chunk))
    in_lists_of_processors = 29 + 168 + 122 + 94
    assert use.free_pieces_bytes == (blocks + in_lists_of_processors) * PAGE_BYTES


def test_what_the_kernel_keeps_for_itself_counts_as_used() -> None:
    use = use_of(*DEBIAN)
    assert use.total_bytes == pytest.approx(GIB, rel=0.001), "with the page structs"
    assert in_all(use) == use.total_bytes
    kept_bytes = use.total_bytes - 1007080 * KIB
    assert use.used_bytes > kept_bytes > 36 * MIB


def test_smaller_chunks_leave_fewer_pieces() -> None:
    pieces = [use_of(*DEBIAN, chunk_order=order).free_pieces_bytes for order in (9, 4, 0)]
    assert pieces[0] > pieces[1] > pieces[2] == 700 * PAGE_BYTES, "lists of processors are no chunk"


def test_what_is_isolated_is_not_in_use() -> None:
    """A huge page in the pool of hugetlb is in no free list."""
    before, after = use_of(*DEBIAN), use_of(*DEBIAN, isolated_pages=4 << 9)
    assert after.isolated_bytes == before.used_bytes - after.used_bytes == 8 * MIB


def test_memory_for_a_crash_kernel_is_not_the_kernels() -> None:
    use = use_of(*DEBIAN, crash_kernel_bytes=16 * MIB)
    assert use.total_bytes == use_of(*DEBIAN).total_bytes - 16 * MIB
    assert in_all(use) == use.total_bytes


def test_a_machine_with_many_counters_and_zones() -> None:
    zoneinfo = (DATA / "zoneinfo-24GiB.txt").read_bytes()
    meminfo = b"Buffers: 37800 kB\nCached: 266164 kB\nShmem: 8872 kB\n"
    use = use_of(zoneinfo, (DATA / "buddyinfo-24GiB.txt").read_text(), meminfo)
    assert use.total_bytes == pytest.approx(24 * GIB, rel=0.001)
    assert use.free_pieces_bytes > 500 * MIB, "this machine is fragmented"


@pytest.mark.parametrize("missing", ["zoneinfo", "buddyinfo", "meminfo", "Shmem"])
def test_a_text_that_is_not_understood_is_refused(missing: str) -> None:
    zoneinfo, buddyinfo, meminfo = DEBIAN
    with pytest.raises(Refused, match=missing):
        use_of(
            b"" if missing == "zoneinfo" else zoneinfo,
            "" if missing == "buddyinfo" else buddyinfo,
            b"" if missing == "meminfo" else meminfo.replace(missing.encode(), b"Other"),
        )


SOME = st.integers(0, 1 << 40)


@given(
    present=SOME,
    count=SOME,
    buddyinfo=st.lists(st.integers(0, 10**12), min_size=1, max_size=12),
    cached=SOME,
    shmem=SOME,
    junk=st.binary(max_size=40),
    isolated=SOME,
    crash=st.integers(0, 1 << 62),
)
def test_no_text_makes_more_of_the_memory_than_there_is(
    present: int,
    count: int,
    buddyinfo: list[int],
    cached: int,
    shmem: int,
    junk: bytes,
    isolated: int,
    crash: int,
) -> None:
    try:
        use = use_of(
            b"  present  %d\n%b\n     count: %d\n" % (present, junk, count),
            "Node 0, zone Normal " + " ".join(map(str, buddyinfo)),
            b"Buffers: 0 kB\nCached: %d kB\nShmem: %d kB\n" % (cached, shmem),
            isolated_pages=isolated,
            crash_kernel_bytes=crash,
        )
    except Refused:
        return
    assert in_all(use) == use.total_bytes


def test_this_machine_is_understood() -> None:
    use = KernelMemoryUse(9)(0)
    assert use is not None
    assert in_all(use) == use.total_bytes
    assert use.total_bytes == pytest.approx(os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES, rel=0.1)
    assert use.used_bytes > 0


def test_a_kernel_that_hides_it_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read = KernelMemoryUse(9, proc_root=tmp_path)
    assert (read(0), read(0)) == (None, None)
    assert [record.message for record in caplog.records] == ["memory use is not known"]
    (tmp_path / "zoneinfo").write_bytes(ZONEINFO_6_1)
    (tmp_path / "buddyinfo").write_text(BUDDYINFO_6_1)
    (tmp_path / "meminfo").write_bytes(MEMINFO_6_1)
    assert read(0) is not None, "it is tried again"
