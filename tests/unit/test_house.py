"""The rules of the house: style, types, who may import whom, stubs that are current."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("hintfleet", "guest_agent", "host_agent", "orchestrator")
SOURCES = {
    path: ast.parse(path.read_text())
    for package in ("proto/hintfleet", *PACKAGES[1:])
    for path in sorted((ROOT / package).rglob("*.py"))
    if "_pb2" not in path.name
}


def imported_modules(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def tool(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_format() -> None:
    tool("ruff", "format", "--check", ".")


def test_ruff_check() -> None:
    tool("ruff", "check", ".")


def test_mypy_strict() -> None:
    tool("mypy")


@pytest.mark.parametrize("package", PACKAGES)
def test_parts_meet_only_in_the_contract(package: str) -> None:
    others = set(PACKAGES) - {package, "hintfleet"}
    for path, tree in SOURCES.items():
        if package in path.relative_to(ROOT).parts:
            assert not imported_modules(tree) & others, path


def test_one_module_opens_channels() -> None:
    openers = {"insecure_channel", "secure_channel"}
    users = [
        path.name
        for path, tree in SOURCES.items()
        if any(isinstance(node, ast.Attribute) and node.attr in openers for node in ast.walk(tree))
    ]
    assert users == ["channels.py"], "the one that no proxy gets in the way of"


@pytest.mark.parametrize("library", ["libvirt", "ray", "cryptography"])
def test_one_module_imports(library: str) -> None:
    users = [path for path, tree in SOURCES.items() if library in imported_modules(tree)]
    assert len(users) == 1, users


def test_a_guest_needs_only_grpc_and_protobuf() -> None:
    allowed = {"grpc", "google", "hintfleet", "guest_agent"} | sys.stdlib_module_names
    for path, tree in SOURCES.items():
        if {"guest_agent", "hintfleet"} & set(path.relative_to(ROOT).parts):
            assert imported_modules(tree) <= allowed, path


def test_generated_stubs_are_current(tmp_path: Path) -> None:
    protos = sorted((ROOT / "proto/hintfleet/v1").glob("*.proto"))
    makefile = (ROOT / "Makefile").read_text()
    flags = re.findall(r"--\w+_out=(?:quiet:)?(?=proto)", makefile)
    assert len(flags) == 4, "the proto target has changed; change this test with it"
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"]
        + [f"{flag}{tmp_path}" for flag in flags]
        + [str(path) for path in protos],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    generated = sorted((tmp_path / "hintfleet/v1").iterdir())
    assert len(generated) == 4 * len(protos)
    for path in generated:
        assert path.read_text() == (ROOT / "proto/hintfleet/v1" / path.name).read_text(), (
            f"{path.name}: run `make proto`"
        )


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "README.md", "docs/safety.md"])
def test_what_a_page_names_is_there(page: str) -> None:
    named = set(re.findall(r"`([\w/.-]+)`", (ROOT / page).read_text()))
    paths = {name for name in named if re.match(r"(tests|deploy|docs|\w+_agent|proto)/", name)}
    missing = {path for path in paths if not (ROOT / path).exists()}
    tests = {name for name in named if name.startswith("test_")}
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing |= {name for name in tests if f"def {name}(" not in text and not find(name)}
    assert not missing, f"{page} names what is not there"


def find(name: str) -> list[Path]:
    return list((ROOT / "tests").rglob(name))


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_no_file_names_a_registry_or_a_folder_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    pattern = re.compile(r"//(?:pypi|files\.pythonhosted|deb\.debian|registry\.npmjs)|/home/\w+/")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png"} and path != Path(__file__):
            assert not pattern.search(path.read_text(errors="replace")), name
