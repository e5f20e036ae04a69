"""The agent refuses a hugetlb pool that is not safe to use, and leaves the guest its reserve."""

import fcntl
import os
from pathlib import Path

import pytest

from guest_agent.isolation.hugetlb_pool import CHUNK_BYTES, HugetlbPool
from hintfleet.errors import Refused, TransientError

POOL = "kernel/mm/hugepages/hugepages-2048kB"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """Return a folder with files of /sys and /proc of a guest in which nobody uses the pool;
    without kpageflags, zoneinfo and buddyinfo."""
    pool = tmp_path / POOL
    pool.mkdir(parents=True)
    for name in ("nr", "free", "resv", "surplus", "nr_overcommit"):
        (pool / f"{name}_hugepages").write_text("0\n")
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\nCmaTotal:       0 kB\n")
    (tmp_path / "cmdline").write_text("console=ttyS0 quiet\n")
    return tmp_path


def refusal(kernel: Path) -> str:
    with pytest.raises(Refused) as caught:
        HugetlbPool(kernel / "mount", kernel, kernel).open()
    assert not (kernel / "mount").exists(), "something was changed"
    return str(caught.value)


def test_others_may_take_huge_pages(kernel: Path) -> None:
    (kernel / POOL / "nr_overcommit_hugepages").write_text("7\n")
    assert "nr_overcommit_hugepages is 7" in refusal(kernel)


def test_cma(kernel: Path) -> None:
    (kernel / "meminfo").write_text("CmaTotal:   65536 kB\n")
    assert "CMA (65536 kB)" in refusal(kernel)


@pytest.mark.parametrize("name", ["nr_hugepages", "nr_overcommit_hugepages"])
def test_huge_pages_of_another_size(kernel: Path, name: str) -> None:
    """Page flags do not show the size of a huge page, so the agent cannot tell those of another
    size from its own."""
    others = kernel / "kernel/mm/hugepages/hugepages-1048576kB"
    others.mkdir()
    (others / name).write_text("0\n")
    assert "huge pages of another size" not in refusal(kernel)
    (others / name).write_text("1\n")
    assert f"{name} of hugepages-1048576kB is 1" in refusal(kernel)


def test_virtio_mem(kernel: Path) -> None:
    (kernel / "bus/virtio/drivers/virtio_mem/virtio3").mkdir(parents=True)
    assert "virtio-mem" in refusal(kernel)


def test_poisoned_pages(kernel: Path) -> None:
    (kernel / "cmdline").write_text("console=ttyS0 page_poison=on\n")
    assert "page_poison=1" in refusal(kernel)


def test_no_page_flags(kernel: Path) -> None:
    assert "kpageflags" in refusal(kernel)


def test_no_huge_pages(tmp_path: Path) -> None:
    assert "no 2 MiB huge pages" in refusal(tmp_path)


def test_the_reserve_is_a_sixteenth_and_the_low_watermarks(kernel: Path) -> None:
    text = (Path(__file__).parents[2] / "data/zoneinfo-24GiB.txt").read_text()
    (kernel / "zoneinfo").write_text(text)
    reserve = HugetlbPool(kernel / "mount", kernel, kernel).reserve_chunks()
    assert 24 * 512 / 16 < reserve < 24 * 512 / 16 + 64


def test_only_one_agent_uses_the_pool(kernel: Path) -> None:
    """A second agent would mistake the chunks that the first has in flight for chunks that a dead
    agent left."""
    with open(kernel / "mount.lock", "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        assert "another guest agent" in refusal(kernel)
    assert "kpageflags" in refusal(kernel), "the lock dies with its holder"


def test_a_lock_that_cannot_be_opened_is_refused(kernel: Path) -> None:
    """An ordinary user cannot open the lock, as it is in /run. Here it is a folder, which even root
    cannot open for writing."""
    (kernel / "mount.lock").mkdir()
    assert "cannot be locked" in refusal(kernel)


def test_each_node_keeps_its_reserve(kernel: Path) -> None:
    """If only the total were set, the kernel would take from each node in turn, and compact node 0,
    which has too few free chunks."""
    free_chunks = {0: 3, 1: 90}
    zoneinfo, buddyinfo = "", ""
    for node, free in free_chunks.items():
        pool = kernel / f"devices/system/node/node{node}/hugepages/hugepages-2048kB"
        pool.mkdir(parents=True)
        (pool / "nr_hugepages").write_text("0\n")
        zoneinfo += (
            f"Node {node}, zone   Normal\n        low      512\n        spanned  65536\n"
            f"        present  65536\n  start_pfn:           {node * 65536}\n"
        )
        buddyinfo += f"Node {node}, zone   Normal {'0 ' * 9} {free} 0\n"
    (kernel / "zoneinfo").write_text(zoneinfo)
    (kernel / "buddyinfo").write_text(buddyinfo)
    (kernel / "mount").mkdir()
    HugetlbPool(kernel / "mount", kernel, kernel).grow(75)
    asked = [
        int(
            (
                kernel / f"devices/system/node/node{n}/hugepages/hugepages-2048kB/nr_hugepages"
            ).read_text()
        )
        for n in free_chunks
    ]
    assert asked == [0, 75]
    assert (kernel / POOL / "nr_hugepages").read_text() == "0\n", "only nodes are asked"


@pytest.mark.parametrize("counts", [{"free": 2}, {"free": 3, "resv": 1}, {"free": 3, "surplus": 1}])
def test_pages_of_somebody_else_stay_where_an_agent_left_nothing_reserved(
    kernel: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]
) -> None:
    """An agent that died before it reserved its chunks leaves an empty file: the pages in the pool
    may be of somebody else."""
    (kernel / "mount").mkdir()
    (kernel / "mount/isolated").touch()
    (kernel / "kpageflags").touch()
    (kernel / "buddyinfo").touch()
    for name, count in {"nr": 3, **counts}.items():
        (kernel / POOL / f"{name}_hugepages").write_text(f"{count}\n")
    # With chunks as large as its blocks, the folder counts as a mounted hugetlbfs.
    chunk_bytes = os.statvfs(kernel).f_bsize
    monkeypatch.setattr("guest_agent.isolation.hugetlb_pool.CHUNK_BYTES", chunk_bytes)
    with pytest.raises(Refused, match="is in use"):
        HugetlbPool(kernel / "mount", kernel, kernel).open()
    assert (kernel / POOL / "nr_hugepages").read_text() == "3\n"


class SharedPool(HugetlbPool):
    """A pool into which somebody else puts seven pages, just before our pages are reserved."""

    def _reserve(self, before: int, chunks: int) -> None:
        self._set_total(self.state().total + 7)
        super()._reserve(before, chunks)


def test_pages_that_somebody_else_adds_meanwhile_stay(kernel: Path) -> None:
    (kernel / "buddyinfo").write_text(f"Node 0, zone   Normal {'0 ' * 9} 90 0\n")
    (kernel / "mount").mkdir()
    with pytest.raises(TransientError, match="somebody else"):
        SharedPool(kernel / "mount", kernel, kernel).grow(75)
    assert (kernel / POOL / "nr_hugepages").read_text() == "7"


def test_a_pool_that_somebody_has_made_smaller_meanwhile_is_emptied(kernel: Path) -> None:
    """The kernel frees surplus pages by itself as soon as they are not reserved any more."""
    (kernel / "mount").mkdir()
    pool = HugetlbPool(kernel / "mount", kernel, kernel)
    pool._open_file()
    os.ftruncate(pool._fd, 5 * CHUNK_BYTES)
    (kernel / POOL / "nr_hugepages").write_text("3\n")
    pool.empty()
    assert (kernel / POOL / "nr_hugepages").read_text() == "0"
    assert not list((kernel / "mount").iterdir())
