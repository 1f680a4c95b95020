"""`calibrate`: sums against hooks on the whole model, the texts, and the command."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import write_tiny_model

from tritgguf.architectures.tensor_names import hf_tensor_name, quantized_tensor
from tritgguf.calibration.importance import measure_importance, summed_squares
from tritgguf.calibration.text import window_length, windows_of_text
from tritgguf.cli import app
from tritgguf.conversion.own_text import SavedText, calibration_windows, self_generated_windows
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.imatrix import read_importance
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source
from tritgguf.tokenization.tokenizer import Tokenizer

WINDOWS = np.random.default_rng(0).integers(3, 400, (5, 32)).tolist()
TEXT = "The quick brown fox jumps over the lazy dog. " * 200


@pytest.mark.parametrize("variant", ["llama", "qwen2", "llama-tied"])
def test_sums_are_those_of_the_whole_model(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With float32 products the sums are exact; with bfloat16 products they are within 5 %."""
    fast = summed_squares(open_source(str(write_tiny_model(tmp_path / "model", variant))), WINDOWS)[0]
    monkeypatch.setattr("tritgguf.calibration.importance.bfloat16_matmul", contextlib.nullcontext)
    source = open_source(str(write_tiny_model(tmp_path / "model", variant)))
    found, counts = summed_squares(source, WINDOWS)
    assert set(counts.values()) == {sum(map(len, WINDOWS))}
    model = ReferenceModel.open(source)
    names = [tensor.name for tensor in source.tensors if quantized_tensor(tensor.name)]
    head = "token_embd.weight" if variant == "llama-tied" else "output.weight"
    assert set(found) == {*names, head}
    names.append(head)
    expected: dict[str, np.ndarray] = {}
    for name in names:
        path = hf_tensor_name(source.metadata["general.architecture"].value, name).removesuffix(".weight")
        path = "lm_head" if name == head else path

        def hook(module: object, arguments: tuple[torch.Tensor], name: str = name) -> None:
            squares = arguments[0].double().square().sum((0, 1)).numpy()
            expected[name] = expected.get(name, 0) + squares

        model.module.get_submodule(path).register_forward_pre_hook(hook)
    for window in WINDOWS:
        model.logits(window)
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)
        np.testing.assert_allclose(fast[name], expected[name], rtol=0.05)


def test_the_file_is_an_importance_matrix(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    steps: list[tuple[int, int]] = []
    report = measure_importance(
        source, tmp_path / "out.gguf", WINDOWS, text="mine", progress=lambda *step: steps.append(step)
    )
    assert (report.tokens, report.matrices) == (160, 15)
    assert steps == [(1, 2), (2, 2)]
    sums, _ = summed_squares(open_source(str(source)), WINDOWS)
    found = read_importance(tmp_path / "out.gguf", {name: len(total) for name, total in sums.items()})
    for name, total in sums.items():
        np.testing.assert_allclose(found[name], total / 160, rtol=1e-5)


def test_windows_of_a_text(tmp_path: Path) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    length = window_length(source)
    assert length == 256, "the tiny model's context"
    windows = windows_of_text(source, TEXT, 4 * length)
    assert [len(window) for window in windows] == [length] * 4
    tokenizer = Tokenizer({key: value.value for key, value in source.metadata.items()})
    assert tokenizer.decode(windows[0])[:9] == TEXT[:9]
    assert len(windows_of_text(source, TEXT, 10**9)) <= len(TEXT) // length + 1
    with pytest.raises(TritGgufError, match="it needs at least 256"):
        windows_of_text(source, "too short", 1000)


def test_short_windows(tmp_path: Path) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    assert [len(window) for window in windows_of_text(source, TEXT, 90, 30)] == [30] * 3
    assert [len(window) for window in self_generated_windows(source, 60, window=20)] == [20] * 3


def test_every_window_starts_with_bos_if_the_model_uses_it(tmp_path: Path) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model", "llama-sentencepiece")))
    windows = windows_of_text(source, TEXT, 1000)
    assert len(windows) > 1
    assert {window[0] for window in windows} == {1}
    assert {len(window) for window in windows} == {window_length(source)}


def test_self_generated_windows(tmp_path: Path) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    steps: list[tuple[int, int]] = []
    length = window_length(source)
    windows = self_generated_windows(source, 2 * length, seed=3, progress=lambda *step: steps.append(step))
    assert [len(window) for window in windows] == [length] * 2
    assert steps[-1] == (2 * length, 2 * length)
    assert windows == self_generated_windows(source, 2 * length, seed=3)
    assert windows != self_generated_windows(source, 2 * length, seed=4)
    assert windows[0] != windows[1]


def test_interrupted_generation_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    length = window_length(source)
    whole = self_generated_windows(source, 3 * length, seed=5)
    # A window does not depend on how many are generated in parallel.
    monkeypatch.setattr("tritgguf.conversion.own_text._MAX_PARALLEL_TEXTS", 2)
    out, log = tmp_path / "out.gguf", tmp_path / "out.gguf.part.text"

    def generate(tokens: int, *, resume: bool, stop: int | None = None, seed: int = 5) -> tuple[list[list[int]], int]:
        """Generate windows, interrupted after `stop` tokens; return them and the number of progress calls."""
        steps: list[int] = []

        def progress(done: int, total: int) -> None:
            steps.append(done)
            if stop is not None and done >= stop:
                raise KeyboardInterrupt

        with SavedText(out, resume=resume) as saved:
            return self_generated_windows(source, tokens, seed=seed, saved=saved, progress=progress), len(steps)

    with pytest.raises(KeyboardInterrupt):
        generate(3 * length, resume=False, stop=2 * length + 1)
    interrupted = log.read_bytes()
    assert interrupted.count(b"\n") == 3  # the job and two windows
    for other in ({"tokens": 3 * length, "seed": 6}, {"tokens": 2 * length, "seed": 5}):
        log.write_bytes(interrupted)
        with pytest.raises(TritGgufError, match=r"out\.gguf\.part\.text: the journal is of another conversion"):
            generate(**other, resume=True)
    for damaged in (b"[1, 2]\n", b'"text"\n', json.dumps([1 << 40] * length).encode() + b"\n", b"[\n"):
        log.write_bytes(interrupted + damaged)
        with pytest.raises(TritGgufError, match=r"text: the journal is damaged; start over without --resume"):
            generate(3 * length, resume=True)
    log.write_bytes(interrupted + b"[1, 2")  # a torn line
    Path(f"{out}.part").touch()  # an unfinished file keeps the saved text
    windows, steps = generate(3 * length, resume=True)
    assert windows == whole and 0 < steps <= length
    assert log.exists()
    Path(f"{out}.part").unlink()
    assert generate(3 * length, resume=True) == (whole, 0)
    assert not log.exists()


def test_text_files(tmp_path: Path) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    with pytest.raises(TritGgufError, match=r"absent.txt: .*; give a text file"):
        calibration_windows(source, tmp_path / "absent.txt", 512)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(TritGgufError, match=r"short.txt: the calibration text has \d+ tokens; .* 256, better 512$"):
        calibration_windows(source, tmp_path / "short.txt", 512)
    with pytest.raises(TritGgufError, match=r"it needs at least 256$"):
        calibration_windows(source, tmp_path / "short.txt", 128)
    (tmp_path / "binary.txt").write_bytes(TEXT.encode() + b"\xff")
    with pytest.raises(TritGgufError, match=r"binary.txt: is not UTF-8 text: byte 0xFF at offset"):
        calibration_windows(source, tmp_path / "binary.txt", 512)
    (tmp_path / "long.txt").write_bytes(b"\xff\xfe" + TEXT.encode("utf-16-le"))
    windows, origin = calibration_windows(source, tmp_path / "long.txt", 512)
    assert (len(windows), origin) == (2, "long.txt")


def test_the_command_and_convert_with_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_tiny_model(tmp_path / "model"))
    (tmp_path / "text.txt").write_text(TEXT)
    imatrix, out = str(tmp_path / "imatrix.gguf"), str(tmp_path / "out.gguf")
    arguments = ["calibrate", source, "-o", imatrix, "--text", str(tmp_path / "text.txt"), "--tokens", "512", "--json"]
    assert app.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tokens"], report["text"]) == (512, "text.txt")
    assert app.main(arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert app.main([*arguments[:-2], "700", "--overwrite"]) == 0
    assert "note: 512 tokens are used instead of 700, which is 2 windows of 256" in capsys.readouterr().err
    assert app.main(["convert", source, out, "--imatrix", imatrix]) == 0
    assert GgufFile(out).metadata["trit.encoder"] == "imatrix"


def test_convert_calibrated_on_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_tiny_model(tmp_path / "model"))
    (tmp_path / "text.txt").write_text(TEXT)
    out = str(tmp_path / "out.gguf")
    text = ["--text", str(tmp_path / "text.txt"), "--tokens", "512"]
    assert app.main(["convert", source, out, "--encoder", "calibrated", *text]) == 0
    assert GgufFile(out).metadata["trit.encoder"] == "calibrated"
    assert app.main(["convert", source, out, "--overwrite", "--self", *text]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_convert_calibrated_on_self_generated_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(write_tiny_model(tmp_path / "model")), str(tmp_path / "out.gguf")
    arguments = ["convert", source, out, "--encoder", "calibrated", "--self", "--tokens", "64"]
    assert app.main(arguments) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "out.gguf"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tritgguf.conversion.own_text.self_generated_windows", None)  # it must not be called
        assert app.main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


def test_length_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model")))
    monkeypatch.setattr("tritgguf.conversion.own_text.DEFAULT_TOKENS", 1024)
    monkeypatch.setattr("tritgguf.conversion.own_text.DEFAULT_GENERATED_TOKENS", 512)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400, "utf-8")
    taken = [
        sum(map(len, calibration_windows(source, text, tokens)[0]))
        for text, tokens in ((tmp_path / "text.txt", None), (tmp_path / "text.txt", 256), (None, None), (None, 256))
    ]
    assert taken == [1024, 256, 512, 256]


@pytest.mark.parametrize(
    ("arguments", "encoder"),
    [
        (["--tune"], "tuned"),
        (["--tune", "blocks"], "tuned"),
        (["--tune", "end-to-end"], "tuned-end-to-end"),
        (["--tune=both"], "tuned-both"),
        (["--tune", "end-to-end", "--encoder", "recover+calibrated"], "recover+tuned-end-to-end"),
        (["--tune", "--encoder", "calibrated"], "tuned"),
        (["--encoder", "tuned"], "tuned"),
        (["--tune", "--encoder", "recover+calibrated"], "recover+tuned"),
        (["--encoder", "calibrated"], "calibrated"),
    ],
)
def test_the_option_tune_names_an_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], encoder: str
) -> None:
    source, text = write_tiny_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100, "utf-8")
    seen: list[tuple[str, int]] = []

    def convert(source: str, output: Path, **options: Any) -> None:
        seen.append((options["encoder"].name, len(options["windows"])))
        raise TritGgufError("enough")

    monkeypatch.setattr(importlib.import_module("tritgguf.conversion.convert"), "convert", convert)
    assert app.main(["convert", str(source), str(tmp_path / "out.gguf"), "--text", str(text), *arguments]) == 1
    assert seen[0][0] == encoder
    assert seen[0][1] > 1


def test_what_cannot_be_tuned_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny_model(tmp_path / "model")
    assert app.main(["convert", str(source), str(tmp_path / "out.gguf"), "--tune=all"]) == 1
    assert "--tune all does not exist; choose from blocks, end-to-end, both" in capsys.readouterr().err
    assert app.main(["convert", str(source), str(tmp_path / "out.gguf"), "--tune", "end-to_end"]) == 2
    assert "--tune end-to_end does not exist; choose from blocks, end-to-end, both" in capsys.readouterr().err
    assert app.main(["convert", "--tune", str(source)]) == 2
    assert "OUT.gguf" in capsys.readouterr().err, "what follows is the source, and the output is missing"


def test_tuning_needs_an_encoder_with_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny_model(tmp_path / "model")
    assert app.main(["convert", str(source), str(tmp_path / "out.gguf"), "--tune", "--encoder", "v2"]) == 1
    assert "--tune trains on a text, which the encoder v2 does not take" in " ".join(capsys.readouterr().err.split())
