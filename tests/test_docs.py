"""The documentation: it describes every message as it is, and builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import msgspec.inspect as types
import pytest

import roundtable
from roundtable.common.config.settings import Settings
from roundtable.common.protocol.envelope import Envelope, Message

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: Described on other pages: `launch.py local --help-all` has a line for each setting.
ELSEWHERE = {Settings}


def written(type_: types.Type) -> str:
    """A type as docs/protocol.md writes it."""
    match type_:
        case types.Metadata():
            return written(type_.type)
        case types.ListType():
            return f"[{written(type_.item_type)}]"
        case types.DictType():
            if isinstance(type_.value_type, types.UnionType):
                return "Hypers"
            return f"{{{written(type_.key_type)}: {written(type_.value_type)}}}"
        case types.TupleType():
            return f"({', '.join(map(written, type_.item_types))})"
        case types.UnionType():
            return " | ".join(map(written, type_.types))
        case types.LiteralType():
            return " | ".join(f'"{value}"' for value in type_.values) if len(type_.values) < 8 else "Kind"
        case types.EnumType():
            return " | ".join(f'"{one.value}"' for one in type_.cls)
        case types.StructType():
            return type_.cls.__name__
        case types.RawType():
            return "message"
        case types.NoneType():
            return "nil"
    names = {types.IntType: "int", types.FloatType: "float", types.BoolType: "bool", types.StrType: "str", types.BytesType: "bin"}
    return names[type(type_)]


def lines(cls: type[msgspec.Struct]) -> list[str]:
    """The fields of a struct as docs/protocol.md has them."""
    info = types.type_info(cls)
    assert isinstance(info, types.StructType)
    out = []
    for field in info.fields:
        text = f"{field.encode_name}: {written(field.type)}"
        if not field.required:
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            text += f" = {shown(default)}"
        out.append(text)
    return out


def shown(default: Any) -> str:
    """A default as docs/protocol.md writes it."""
    if isinstance(default, msgspec.Struct):
        return f"{type(default).__name__}()"
    if isinstance(default, bytes):
        return '""'
    return msgspec.json.encode(default).decode().replace("null", "nil")


def structs() -> dict[str, type[msgspec.Struct]]:
    """Every message, the envelope, and all structs in their fields, by name."""
    found: dict[str, type[msgspec.Struct]] = {}

    def walk(type_: types.Type) -> None:
        match type_:
            case types.StructType() if type_.cls.__name__ not in found and type_.cls not in ELSEWHERE:
                found[type_.cls.__name__] = type_.cls
                for field in type_.fields:
                    walk(field.type)
            case types.Metadata():
                walk(type_.type)
            case types.ListType():
                walk(type_.item_type)
            case types.DictType():
                walk(type_.value_type)
            case types.TupleType():
                for item in type_.item_types:
                    walk(item)
            case types.UnionType():
                for one in type_.types:
                    walk(one)

    for cls in (Envelope, *get_args(Message)):
        walk(types.type_info(cls))
    return found


def sections() -> dict[str, list[str]]:
    """The fields that docs/protocol.md lists under each heading that is the name of a struct."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in (DOCS / "protocol.md").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"#### `(\w+)`", line):
            name = heading[1]
            assert name not in found, f"{name} is described twice"
            found[name] = []
        elif line.startswith("#"):
            name = ""
        elif name and (field := re.match(r"- `([^`]+)`: \S", line)):
            found[name].append(field[1])
    return found


def test_the_protocol_page_describes_every_message_and_no_other() -> None:
    assert sections().keys() == structs().keys()


@pytest.mark.parametrize("name", sorted(structs()))
def test_the_protocol_page_has_the_fields_of(name: str) -> None:
    assert sections()[name] == lines(structs()[name])


@pytest.mark.usefixtures("links")
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    api = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    assert [name for name in roundtable.__all__ if f'id="roundtable.{name}"' not in api] == []


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


#: Decisions tell of their time, and may name files that have gone.
PAGES = [ROOT / "README.md", *(page for page in sorted(DOCS.rglob("*.md")) if page.parent.name != "decisions")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:common|ps|worker|cluster|explore|tests|benchmarks|examples)/[\w./-]*)", page.read_text("utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_invariant_is_cited_by_a_test_that_holds_it() -> None:
    listed = [int(n) for page in ("consistency", "fault-tolerance") for n in re.findall(r"^\| I(\d+) \|", text(page), re.M)]
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    cited = {int(n) for line in re.findall(r"^# ((?:I\d+(?:, )?)+)$", tests, re.M) for n in re.findall(r"\d+", line)}
    assert listed == list(range(1, len(listed) + 1))
    assert cited == set(listed)


def text(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")
