"""What of the iOS app can be checked without Xcode: its tables agree with its sources and with each other."""

from __future__ import annotations

import json
import plistlib
import re
from pathlib import Path

import pytest

IOS = Path(__file__).parent.parent / "ios_demo"
TABLES = sorted(IOS.glob("*/Resources/*.lproj/Localizable.strings")) + sorted(
    IOS.glob("EdgeStreamKit/Sources/*/Resources/*.lproj/Localizable.strings")
)
LINE = re.compile(r'"((?:[^"\\]|\\.)*)" = "((?:[^"\\]|\\.)*)";')
PLACEHOLDER = re.compile(r"%(?:\d+\$)?(?:lld|@)")


def table(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), path
    found = {m[1]: m[2] for m in matches if m}
    assert len(found) == len(lines), f"a key twice in {path}"
    return found


def test_every_language_has_every_text() -> None:
    assert len(TABLES) == 4
    for folder in {path.parent.parent for path in TABLES}:
        english, german = table(folder / "en.lproj/Localizable.strings"), table(folder / "de.lproj/Localizable.strings")
        assert english.keys() == german.keys()
        for key in english:
            for text in (english[key], german[key]):
                assert text and len(PLACEHOLDER.findall(text)) == len(PLACEHOLDER.findall(key)), key


@pytest.mark.parametrize(
    ("sources", "resources", "use"),
    [
        ("EdgeStreamKit/Sources/ChatUI", "EdgeStreamKit/Sources/ChatUI/Resources", r'localized\("((?:[^"\\]|\\.)*)"\)'),
        ("App/Sources", "App/Resources", r'ContentUnavailableView\(\s*"([^"]*)"'),
    ],
)
def test_every_text_is_in_the_table_and_used(sources: str, resources: str, use: str) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((IOS / sources).glob("*.swift")))
    # an interpolation becomes %lld or %@; none of ours has parentheses more than one deep
    used = {re.sub(r"\\\((?:[^()]|\([^()]*\))*\)", "%", key) for key in re.findall(use, code)}
    assert used == {PLACEHOLDER.sub("%", key) for key in table(IOS / resources / "en.lproj/Localizable.strings")}


def test_project_and_property_lists_agree() -> None:
    yaml = pytest.importorskip("yaml")
    target = yaml.safe_load((IOS / "App/project.yml").read_text())["targets"]["EndlessChat"]
    for part in ("info", "entitlements"):
        written = plistlib.loads((IOS / "App" / target[part]["path"]).read_bytes())
        assert target[part]["properties"].items() <= written.items()
    assert target["entitlements"]["properties"]["com.apple.developer.kernel.increased-memory-limit"] is True
    for path in IOS.glob("App/Resources/**/*.json"):
        json.loads(path.read_text())
