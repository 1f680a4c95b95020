"""The page's files: what its Content-Security-Policy asks of them, and their modules that need no browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "tritgguf" / "serving" / "page" / "static"
VENDOR = STATIC / "vendor"
INDEX = (STATIC / "index.html").read_text("utf-8")
OWN_FILES = sorted(path for path in STATIC.rglob("*") if path.is_file() and VENDOR not in path.parents)
SCRIPTS = [path for path in OWN_FILES if path.suffix == ".js"]


def test_index_has_no_inline_script_or_style() -> None:
    assert not re.search(r"<script(?![^>]*\bsrc=)", INDEX)
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", INDEX)


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.name)
def test_nothing_comes_from_other_hosts(path: Path) -> None:
    addresses = set(re.findall(r"""(?:https?:)?//[\w.-]+\.\w+""", path.read_text("utf-8")))
    assert addresses <= {"http://www.w3.org"}  # the name of SVG's elements, which nothing is loaded from


def test_every_file_that_is_loaded_exists() -> None:
    for name in re.findall(r'(?:src|href)="([^"#]+)"', INDEX):
        assert (STATIC / name).is_file(), name
    imported = [(path, name) for path in SCRIPTS for name in re.findall(r'from "([^"]+)"', path.read_text("utf-8"))]
    assert imported
    for path, name in imported:
        assert (path.parent / name).is_file(), f"{path.name} imports {name}"


def test_every_element_that_a_script_looks_up_exists() -> None:
    identifiers = set(re.findall(r'id="([^"]+)"', INDEX))
    for path in SCRIPTS:
        for name in re.findall(r'(?:byId|getElementById)\("([^"]+)"\)', path.read_text("utf-8")):
            assert name in identifiers, f"{path.name} looks up #{name}"
        for name in re.findall(r'\b(?:icon|iconButton)\("([^"]+)"', path.read_text("utf-8")):
            assert f"icon-{name}" in identifiers, f"{path.name} shows the icon {name}"


def test_vendored_packages_have_their_licences() -> None:
    described = (VENDOR / "README.md").read_text("utf-8")
    packages = [path for path in VENDOR.iterdir() if path.is_dir()]
    assert packages
    for package in packages:
        assert list(package.glob("LICENSE*")), package.name
        version = re.search(rf"\| {package.name} ([\d.]+) \|", described)
        assert version, f"vendor/README.md has no version of {package.name}"
        code = "".join(path.read_text("utf-8")[:400] for path in package.glob("*.*js"))
        assert version[1] in code, f"vendor/README.md has another version of {package.name} than its file"


def test_no_file_is_too_long() -> None:
    lengths = {path.name: len(path.read_text("utf-8").splitlines()) for path in OWN_FILES}
    assert max(lengths.values()) <= 400, lengths


def test_modules_in_node() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the page's modules are tested in the browser only")
    tests = sorted(map(str, (Path(__file__).parent / "page").glob("*.test.mjs")))
    ran = subprocess.run([node, "--test", *tests], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
