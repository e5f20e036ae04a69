"""Which old images and layers the builder of the guest image removes."""

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import pytest

BUILDER = Path(__file__).parents[2] / "deploy/image/build.py"


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BUILDER.parent))
    spec = importlib.util.spec_from_file_location("image_builder", BUILDER)
    assert spec is not None
    assert spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    return builder


def test_images_that_were_used_last_are_kept(builder: Any, tmp_path: Path) -> None:
    for age_s in range(builder.KEPT_IMAGES + 3):
        image = tmp_path / f"{age_s:016x}"
        image.mkdir()
        (image / "image.json").write_text("{}")
        os.utime(image, (0, 1_000_000 - age_s))
    oldest = f"{builder.KEPT_IMAGES + 2:016x}"
    (tmp_path / "current").symlink_to(oldest)
    (tmp_path / "compiler").symlink_to(f"{builder.KEPT_IMAGES + 1:016x}")
    (tmp_path / "layers").mkdir()
    builder.prune(tmp_path)
    kept = {path.name for path in tmp_path.iterdir() if len(path.name) == 16}
    # The 8 that were used last are kept, and 2 older ones that are linked: of 11, one is removed.
    assert kept == {f"{age_s:016x}" for age_s in range(builder.KEPT_IMAGES + 3)} - {
        f"{builder.KEPT_IMAGES:016x}"
    }


def test_layers_of_no_image_go_after_a_day(builder: Any, tmp_path: Path) -> None:
    for name in ("root-used", "root-old", "root-new"):
        (tmp_path / "layers" / name).mkdir(parents=True)
        (tmp_path / "layers" / name / "root.img").write_text(name)
    image = tmp_path / "image"
    image.mkdir()
    (image / "image.json").write_text("{}")
    os.link(tmp_path / "layers/root-used/root.img", image / "root.img")
    day_ago = time.time() - builder.KEPT_LAYERS_S - 1
    for name in ("root-used", "root-old"):
        os.utime(tmp_path / "layers" / name, (day_ago, day_ago))
    builder.prune(tmp_path)
    assert {layer.name for layer in (tmp_path / "layers").iterdir()} == {"root-used", "root-new"}


def test_an_old_layer_that_a_build_reuses_is_not_removed(builder: Any, tmp_path: Path) -> None:
    """Another builder that ends meanwhile must not remove it before the image has links to it."""
    layer = tmp_path / "layers/root-reused"
    layer.mkdir(parents=True)
    (layer / "root.json").write_text("{}")
    os.utime(layer, (0, 0))

    def build(to: Path) -> None:
        raise AssertionError(to)

    assert builder.build_once(layer, "root.json", build) == layer
    builder.prune(tmp_path)
    assert (layer / "root.json").exists()
