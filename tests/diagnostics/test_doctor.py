"""doctor: what it says about pretended machines; the bandwidth itself nobody checks here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from cpu_kernels.compilation import kernel_cache
from cpu_kernels.simd import instruction_set, self_test, variants
from cpu_kernels.threads.bandwidth import read_bandwidth
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.cli import app
from tritgguf.diagnostics import doctor
from tritgguf.diagnostics.doctor import Diagnosis

AVX2 = ("avx2", "fma", "f16c")


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def measure(thread_pool: ThreadPool, repetitions: int, buffer_bytes: int) -> float:
        return read_bandwidth(thread_pool, repetitions, min(buffer_bytes, 1 << 20))

    monkeypatch.setattr(doctor, "read_bandwidth", measure)
    monkeypatch.delenv(instruction_set.ENVIRONMENT_VARIABLE, raising=False)
    forget_the_processor()
    yield
    forget_the_processor()


def forget_the_processor() -> None:
    instruction_set.supported.cache_clear()
    instruction_set._works.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, *features: str, failures: dict[int, str] | None = None) -> Diagnosis:
    """Look at a machine with these features, on which everything works that is not in `failures`."""
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: dict.fromkeys(features, True))
    monkeypatch.setattr(self_test, "failure", (failures or {}).get)
    forget_the_processor()
    return doctor.doctor()


def test_this_machine() -> None:
    found = doctor.doctor()
    assert found.instruction_set == variants.name_of(instruction_set.choose())
    assert 1 <= found.physical_cores <= found.logical_cores
    assert found.read_bandwidth > 0
    assert found.cache_folder == kernel_cache.folder()
    assert found.versions["numpy"] == version("numpy")
    if sys.platform == "linux":
        assert found.memory_total is not None
        assert found.memory_available is not None
        assert 0 < found.memory_available <= found.memory_total


def test_each_better_instruction_set_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {variants.AVX2_VNNI: "computes wrong integers here"}
    found = pretend(monkeypatch, *AVX2, "avxvnni", failures=failures)
    assert found.instruction_set == "avx2"
    assert found.features == [*AVX2, "avxvnni"]
    assert list(found.better_instruction_sets) == ["avx512", "avx512-novnni", "avx2-vnni"]
    assert found.better_instruction_sets["avx2-vnni"] == "computes wrong integers here"
    assert found.better_instruction_sets["avx512-novnni"] == (
        "needs avx512f, avx512bw, avx512vl, avx512dq, which this processor lacks"
    )
    assert found.advice[0].startswith("a better instruction set than avx2: avx512 needs")


def test_a_forced_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITGGUF_ISA", "portable")
    found = pretend(monkeypatch, *AVX2)
    assert found.instruction_set == "portable"
    assert found.better_instruction_sets["avx2"] == "works here, but TRITGGUF_ISA asks for another one"
    assert found.advice[0] == "unset TRITGGUF_ISA: a better instruction set than portable works here"


def test_a_forced_instruction_set_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITGGUF_ISA", "mmx")
    found = pretend(monkeypatch, *AVX2)
    assert found.instruction_set is None
    assert found.instruction_set_problem == ("TRITGGUF_ISA=mmx is not available here; choose from portable, avx2")
    assert found.advice[0].startswith("unset TRITGGUF_ISA")


@pytest.mark.parametrize(("load", "is_much"), [(0.9, False), (1.1, True)])
def test_other_programs(monkeypatch: pytest.MonkeyPatch, load: float, is_much: bool) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    found = doctor.doctor()
    assert found.load == load
    assert any(f"{load} threads wanted the 2 cores" in line for line in found.advice) == is_much


def test_the_best_machine_has_no_better_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(doctor, "physical_cores", lambda: 16)
    monkeypatch.setattr(doctor, "machine_memory_bytes", lambda: (64 << 30, 32 << 30))
    found = pretend(monkeypatch, *AVX2, "avxvnni", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
    assert found.better_instruction_sets == {}
    assert [line for line in found.advice if not line.startswith("smaller files")] == []


@pytest.mark.parametrize("is_there", [False, True])
def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    folder = tmp_path / "cache"
    if is_there:
        folder.mkdir()
        (folder / "one.kernel").write_bytes(bytes(10))
        (folder / "another.kernel").write_bytes(bytes(300))
        (folder / "module.pyc").write_bytes(bytes(5000))
    monkeypatch.setattr(kernel_cache, "folder", lambda: folder)
    found = doctor.doctor()
    assert found.cache_is_writable == is_there
    assert found.cache_bytes == (310 if is_there else 0)
    assert any("NUMBA_CACHE_DIR" in line for line in found.advice) != is_there


def test_no_cache_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "folder", lambda: None)
    found = doctor.doctor()
    assert found.cache_folder is None
    assert not found.cache_is_writable
    assert ("cache of kernels", "no folder can be written") in found.tables()[0][2]


def test_few_cores_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "physical_cores", lambda: 1)
    monkeypatch.setattr(doctor, "machine_memory_bytes", lambda: (4 << 30, 1_500_000_000))
    advice = doctor.doctor().advice
    assert "more cores than 1: prompts are read faster with each of them" in advice
    assert any("files of more than 1.5 GB" in line for line in advice)


def test_a_system_that_tells_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "machine_memory_bytes", lambda: None)
    found = doctor.doctor()
    assert found.memory_total is None
    assert ("memory", "unknown") in found.tables()[0][2]


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["numba"] == version("numba")
    assert isinstance(found["advice"], list)
    assert app.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert found["processor"] in printed
    assert len(printed.splitlines()) <= 24
