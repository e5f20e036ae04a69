"""The rules for this source tree: style, types, stubs that are current, and paths in the
documentation that exist. For the packages, not for tests and deploy: which module may import which,
and sizes."""

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
PACKAGES = ("hintfleet", "guest_agent", "host_agent", "orchestrator")
FOLDERS = (".ci", ".github", "deploy", "docs", "proto", "tests", *PACKAGES[1:])
SOURCES = {
    path: ast.parse(path.read_text())
    for package in ("proto/hintfleet", *PACKAGES[1:])
    for path in sorted((ROOT / package).rglob("*.py"))
    if "_pb2" not in path.name
}
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)

# A room is a folder, or a module at the root of a package. The table has all imports between the
# rooms of a package: each room, and the rooms that it imports. A room may import only rooms that
# are listed above it. A test fails if code and table differ, so that each new import is a
# decision. Other packages may import all of the contract, proto/hintfleet; that is not listed.
ARROWS = {
    "hintfleet": {
        "errors": "",
        "v1": "",
        "settings": "",
        "findings": "settings",
        "agent_config": "errors settings",
        "sketch": "",
        "units": "errors",
        "ranges": "errors",
        "leaks": "errors",
        "program": "errors",
        "logs": "program",
        "system": "errors",
        "net": "errors system",
    },
    "guest_agent": {
        "config": "",
        "hinting": "",
        "procfs": "",
        "memory": "procfs",
        "workload": "procfs memory",
        "tracking": "memory",
        "holding_back": "",
        "isolation": "procfs memory tracking",
        "resting": "isolation",
        "telemetry": "procfs isolation holding_back",
        "stream_end": "",
        "session": "isolation hinting holding_back resting stream_end telemetry",
        "agent": "procfs memory workload isolation session",
        "__main__": "config agent",
    },
    "host_agent": {
        "threads": "",
        "tasks": "",
        "waking": "",
        "cpu_meter": "",
        "budget": "",
        "memory": "waking",
        "door": "memory",
        "session": "tasks memory",
        "guests": "waking memory door",
        "guests.libvirt": "memory door guests",
        "guests.attached": "memory door guests guests.libvirt",
        "persistence": "memory session guests",
        "audits": "tasks cpu_meter memory session",
        "guest": "tasks threads cpu_meter memory session guests persistence audits",
        "resizing": "threads memory guests guest",
        "auditor": "waking cpu_meter guest",
        "pressure": "waking guest",
        "repeated_commands": "",
        "trials": "",
        "registry": "repeated_commands trials tasks threads cpu_meter session guests "
        "persistence guest resizing",
        "api": "guests tasks threads waking cpu_meter budget memory session guests.attached "
        "persistence guest resizing registry",
        "server": "budget session guests guests.libvirt guests.attached persistence auditor "
        "pressure registry api threads",
        "doctor": "memory guests.libvirt",
        "leaks": "budget guests.libvirt",
        "__main__": "threads api server doctor leaks",
    },
    "orchestrator": {
        "machine": "",
        "pki": "",
        "spec.catalogue": "",
        "spec": "spec.catalogue",
        "doctor": "spec",
        "trial": "machine spec",
        "cluster": "machine spec doctor trial",
        "results": "spec trial",
        "results.store": "spec trial cluster results",
        "experiment": "machine spec trial cluster results results.store",
        "service": "results results.store",
        "view": "pki spec trial cluster results results.store",
        "report": "trial results results.store view",
        "leaks": "machine results.store doctor",
        "commands": "pki spec spec.catalogue trial cluster results results.store experiment "
        "service view report doctor leaks",
        "cli": "commands",
        "__main__": "cli",
    },
}


def imported_modules(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removeprefix("proto.").removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imports_of_ours(module: str) -> set[str]:
    """Return the modules of SOURCES that `module` imports, also in functions or only for types."""
    names = set()
    for node in ast.walk(SOURCES[MODULES[module]]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= members & MODULES.keys() or {f"{node.module}"}
    return (names & MODULES.keys()) - {module}


def room(module: str) -> str:
    folder = module.rpartition(".")[0]
    is_folder = MODULES[module].name == "__init__.py"
    return module if is_folder or folder in PACKAGES else folder


def arrows_between_files() -> dict[str, set[str]]:
    return {module: imports_of_ours(module) for module in MODULES}


def arrows_between_rooms() -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module, imported in arrows_between_files().items():
        arrows[room(module)] |= {room(other) for other in imported} - {room(module)}
    return arrows


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


@pytest.mark.parametrize("arrows", [arrows_between_files, arrows_between_rooms])
def test_no_circles(arrows: Callable[[], dict[str, set[str]]]) -> None:
    """:raises CycleError: there is a circle; the error names it."""
    TopologicalSorter(arrows()).prepare()


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_between_rooms_are_those_of_the_table(package: str) -> None:
    prefix = f"{package}."
    found = {
        name.removeprefix(prefix): {
            other.removeprefix(prefix) for other in imported if other.startswith(prefix)
        }
        for name, imported in arrows_between_rooms().items()
        if name.startswith(prefix)
    }
    table = {name: set(imported.split()) for name, imported in ARROWS[package].items()}
    differ = [
        f"{name}: {' '.join(sorted(found[name]))}"
        for name in found
        if found[name] != table.get(name)
    ]
    assert not differ, "\n".join(["rows as they are:", *differ])
    assert found.keys() == table.keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_of_the_table_imports_what_stands_above_it(package: str) -> None:
    above: set[str] = set()
    for name, imported in ARROWS[package].items():
        below = set(imported.split()) - above
        assert not below, f"{name} imports what stands below it"
        above.add(name)


def test_the_folders_arrows_are_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `(?:proto/)?(\w+)/([\w/]+)` \| [^|]+ \|(.*)\|$", text, re.MULTILINE)
    told = {
        (package, folder.replace("/", ".")): set(re.findall(r"`(.+?)`", imported.replace("/", ".")))
        for package, folder, imported in rows
    }
    folders = {
        (package, name)
        for package in PACKAGES
        for name in ARROWS[package]
        if MODULES[f"{package}.{name}"].name == "__init__.py"
    }
    assert told == {
        (package, name): {
            other for other in ARROWS[package][name].split() if (package, other) in folders
        }
        for package, name in folders
    }


def test_no_folder_of_more_than_15_modules() -> None:
    folders = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    over = [
        f"{folder.relative_to(ROOT)}: {count}" for folder, count in folders.items() if count > 15
    ]
    assert not over, "\n".join(over)


def too_long(path: Path, tree: ast.Module) -> Iterator[str]:
    where = path.relative_to(ROOT)
    if (lines := len(path.read_text().splitlines())) > 400:
        yield f"{where}: {lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 60:
            yield f"{where}: {node.name}: {lines} lines"
        elif isinstance(node, ast.ClassDef):
            methods = sum(isinstance(child, FUNCTION) for child in node.body)
            if methods > 25:
                yield f"{where}: {node.name}: {methods} methods"


def test_no_file_over_400_lines_no_function_over_60_no_class_of_more_than_25_methods() -> None:
    over = [what for path, tree in SOURCES.items() for what in too_long(path, tree)]
    assert not over, "\n".join(over)


def test_one_module_opens_channels() -> None:
    openers = {"insecure_channel", "secure_channel"}
    users = [
        path.name
        for path, tree in SOURCES.items()
        if any(isinstance(node, ast.Attribute) and node.attr in openers for node in ast.walk(tree))
    ]
    assert users == ["channels.py"], "the one that no proxy gets in the way of"


@pytest.mark.parametrize(
    ("library", "users"),
    [
        ("libvirt", {"api.py"}),
        ("ray", {"ray_actors.py", "ray_connection.py"}),
        ("cryptography", {"pki.py"}),
    ],
)
def test_few_modules_import(library: str, users: set[str]) -> None:
    found = [path.name for path, tree in SOURCES.items() if library in imported_modules(tree)]
    assert sorted(found) == sorted(users)


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


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_what_a_page_names_is_there(page: Path) -> None:
    named = set(re.findall(r"`([\w/.-]+)`", (ROOT / page).read_text()))
    paths = {name for name in named if name.partition("/")[0] in FOLDERS}
    missing = {path for path in paths if not (ROOT / path).exists()}
    missing |= {name for name in named if re.fullmatch(r"\w+\.py", name) and not find(name)}
    tests = {name for name in named if name.startswith("test_")}
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing |= {name for name in tests if f"def {name}(" not in text and not find(name)}
    assert not missing, f"{page} names what is not there"


def find(name: str) -> bool:
    return (ROOT / name).exists() or any(any((ROOT / folder).rglob(name)) for folder in FOLDERS)


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
