"""The wheel and the source distribution, and README's lines in an environment that has nothing but the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from cpu_kernels import precompile

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PACKAGES = ("tritgguf", "cpu_kernels")
PROJECT_FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"

pytestmark = pytest.mark.slow


def environment(**changes: str) -> dict[str, str]:
    """Return this process's variables without those that lead to a checkout or to another cache."""
    others = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "NUMBA_CACHE_DIR")
    return {name: value for name, value in os.environ.items() if name not in others} | changes


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed; return what it prints."""
    variables = environment(**{precompile.LAZY_VARIABLE: "1"})  # all kernels would take half a minute
    done = subprocess.run(
        command, cwd=cwd, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(kind: str, project: Path, output: Path) -> tuple[Path, str]:
    """Build a `wheel` or `sdist` as pip and build do; return the file and what setuptools prints."""
    output.mkdir()
    printed = run(sys.executable, "-W", "default", "-c", BUILD, kind, output, cwd=project)
    [built] = output.iterdir()
    return built, printed


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def compiled_files(module: str) -> dict[Path, int]:
    """Return the compiled kernels beside a module and below, with the times at which they were written."""
    return {path: path.stat().st_mtime_ns for path in Path(module).parent.rglob("*.kernel")}


def encodes(kernel: Path) -> bool:
    """Return whether a compiled kernel is one of those that only `convert` needs."""
    return kernel.name.split(".")[0] in {path.stem for path in (ROOT / "cpu_kernels" / "encoding").glob("*.py")}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the distributions are built from: building writes to its folder."""
    folder = tmp_path_factory.mktemp("project")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(project: Path) -> tuple[Path, str]:
    return build("sdist", project, project.parent / "sdist")


@pytest.fixture(scope="module")
def wheel(project: Path) -> tuple[Path, str]:
    return build("wheel", project, project.parent / "wheel")


@pytest.fixture(scope="module")
def scripts(wheel: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment that has the wheel, and shares what it needs with this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=os.name != "nt")
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # Python does not look for .pth files in folders that come from one, so nothing leads to the checkout.
    shared = [path for path in sys.path if Path(path).name == "site-packages"]
    Path(paths["purelib"], "shared.pth").write_text("\n".join(shared), "utf-8")
    options = ["--disable-pip-version-check", "--no-deps", "--no-index", "--ignore-installed"]
    run(Path(paths["scripts"], "python"), "-m", "pip", "install", *options, wheel[0], cwd=folder)
    # Compiling takes most of a minute: what is here already comes along, except the kernels that `convert` needs.
    kernels = Path(paths["purelib"], "cpu_kernels")
    for cached in (ROOT / "cpu_kernels").rglob("*.kernel"):
        place = kernels / cached.relative_to(ROOT / "cpu_kernels")
        if not encodes(cached):
            place.parent.mkdir(exist_ok=True)
            shutil.copy(cached, place)
    return Path(paths["scripts"])


def test_the_build_has_no_warning(sdist: tuple[Path, str], wheel: tuple[Path, str]) -> None:
    for _, printed in (sdist, wheel):
        assert "running egg_info" in printed
        assert not re.findall(r".*warning(?::|\b(?!s?\.)).*", printed, re.IGNORECASE)


def test_the_wheel_has_every_file_of_the_packages(project: Path, wheel: tuple[Path, str]) -> None:
    packed = contents(wheel[0])
    described = {name for name in packed if ".dist-info/" in name}
    files = [path for name in PACKAGES for path in (project / name).rglob("*") if path.is_file()]
    expected = {path.relative_to(project).as_posix(): path.read_bytes() for path in files}
    assert {name: packed[name] for name in packed.keys() - described} == expected
    for name in ("tritgguf/py.typed", "tritgguf/serving/page/static/index.html", "cpu_kernels/precompile.py"):
        assert name in expected


def test_the_licences_are_named_and_enclosed(wheel: tuple[Path, str]) -> None:
    packed = contents(wheel[0])
    [metadata] = [message_from_bytes(text) for name, text in packed.items() if name.endswith(".dist-info/METADATA")]
    assert metadata["License-Expression"] == "Apache-2.0 AND MIT AND BSD-3-Clause"
    vendor = "tritgguf/serving/page/static/vendor"
    enclosed = metadata.get_all("License-File")
    assert enclosed is not None
    licences = [f"{vendor}/{name}" for name in ("dompurify/LICENSE", "dompurify/LICENSE-MPL", "marked/LICENSE")]
    assert sorted(enclosed) == ["LICENSE", *licences]
    for name in enclosed:
        [text] = [text for path, text in packed.items() if path.endswith(f".dist-info/licenses/{name}")]
        assert text == (ROOT / name).read_bytes()


def test_the_source_distribution_builds_the_same_wheel(
    sdist: tuple[Path, str], wheel: tuple[Path, str], tmp_path: Path
) -> None:
    with tarfile.open(sdist[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    assert not (unpacked / "tests").exists()  # without their helpers and models they could not run
    again, _ = build("wheel", unpacked, tmp_path / "wheel")
    assert again.name == wheel[0].name
    assert contents(again) == contents(wheel[0])


def test_the_lines_of_the_readme_run_from_the_wheel(scripts: Path, tmp_path: Path) -> None:
    lines = re.findall(r"^    tritgguf (.+)$", README, re.MULTILINE)
    [program] = re.findall(r"^```python\n(.+?)^```$", README, re.MULTILINE | re.DOTALL)
    convert, generate = lines
    write_tiny_model(tmp_path / convert.split()[1])  # takes the place of the model on the hub
    for line in (convert, generate):
        run(scripts / "tritgguf", *re.findall(r'"[^"]+"|\S+', line), cwd=tmp_path)
    where = "\nimport cpu_kernels\nprint(tritgguf.__file__, cpu_kernels.__file__, sep='\\n')"
    *_, package, kernels = run(scripts / "python", "-c", program + where, cwd=tmp_path).splitlines()
    for path in (package, kernels):
        assert Path(path).is_relative_to(scripts.parent)
    assert "--port" in run(scripts / "tritgguf", "serve", "--help", cwd=tmp_path)

    compiled = compiled_files(kernels)
    assert any(encodes(path) for path in compiled)
    run(scripts / "python", "-c", program, cwd=tmp_path)
    assert compiled_files(kernels) == compiled
