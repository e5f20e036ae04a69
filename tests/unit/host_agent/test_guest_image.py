"""Which guest image a guest gets, and what is said if it is not there."""

import json
from pathlib import Path

import pytest

from hintfleet.errors import Refused
from host_agent.guests.libvirt.image import find_image


def built(images: Path, key: str, kernel: str) -> Path:
    directory = images / key
    directory.mkdir()
    for name in ("vmlinuz", "initrd.img", "root.img"):
        (directory / name).write_text(name)
    (directory / "image.json").write_text(json.dumps({"kernel": kernel}))
    return directory


def test_each_variant_has_its_link(tmp_path: Path) -> None:
    plain, with_compiler = built(tmp_path, "1", "6.1"), built(tmp_path, "2", "6.2")
    (tmp_path / "current").symlink_to("1")
    (tmp_path / "compiler").symlink_to("2")
    assert find_image(tmp_path).directory == plain
    found = find_image(tmp_path, "compiler")
    assert (found.directory, found.kernel_release) == (with_compiler, "6.2")


def test_a_missing_variant_says_how_to_build_it(tmp_path: Path) -> None:
    built(tmp_path, "current", "6.1")
    with pytest.raises(Refused) as missing:
        find_image(tmp_path, "compiler")
    assert "make image VARIANT=compiler" in str(missing.value.hint)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '"kernel"'])
def test_a_damaged_image_is_refused(manifest: str, tmp_path: Path) -> None:
    (built(tmp_path, "current", "6.1") / "image.json").write_text(manifest)
    with pytest.raises(Refused, match=r"image\.json is damaged"):
        find_image(tmp_path)


@pytest.mark.parametrize("name", ["../current", "/root", ".", "a/b", "x" * 41])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match="not the name of a guest image"):
        find_image(tmp_path, name)
