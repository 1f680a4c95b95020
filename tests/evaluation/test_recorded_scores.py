"""`verify --write`: scores in a file, and where they are shown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Capture, fails

from tritgguf.cli import app
from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.evaluation.recorded_scores import ScoreRecorder, score_of
from tritgguf.evaluation.text_windows import shipped_text
from tritgguf.evaluation.verify import VerifyReport
from tritgguf.exporters.model_card import model_card
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.integrity import check
from tritgguf.formats.scores import read_score, text_fingerprint

SHIPPED = text_fingerprint(shipped_text())


@pytest.fixture
def file(tiny_trit_file: Callable[..., GgufFile], tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_trit_file().path, tmp_path / "model.gguf"))


def report_of(file: Path, source: str = "org/name", text: str = SHIPPED) -> VerifyReport:
    measures = (2.5e-4, 3.5e-4, 1.5e-3, 0.576, 4.2, 0.691, 12.25, 7.5, 3.0)
    return VerifyReport(source, file, 500, 1, *measures, text=text, revision="0123abcd")


def test_a_score_is_recorded_and_shown(file: Path, capsys: Capture) -> None:
    recorder = ScoreRecorder([file])
    recorder.record(file, score_of(report_of(file)))
    score = read_score(GgufFile(file).metadata)
    assert score == score_of(report_of(file))
    assert (score.kl_mean, score.perplexity, score.tokens, score.revision) == (0.576, 12.25, 500, "0123abcd")
    assert check(file).checksums > 0
    assert app.main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  source +org/name at 0123abcd$", out, re.MULTILINE)
    assert re.search(r"^  text +500 tokens of the text in the package$", out, re.MULTILINE)
    assert re.search(r"^  KL divergence, mean +0\.5760$", out, re.MULTILINE)
    assert re.search(r"^  perplexity of the source +7\.500$", out, re.MULTILINE)
    assert app.main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == vars(score)
    card = model_card(file, base_model=None, weight_bytes=1)
    assert "| KL divergence from the source | 0.5760 nats in the mean, 4.2000 at most for 99 % |" in card
    assert "| Perplexity | 12.250; of the source: 7.500 |" in card


def test_a_file_without_a_score_shows_none(file: Path, capsys: Capture) -> None:
    assert app.main(["inspect", str(file)]) == 0
    assert "recorded score" not in capsys.readouterr().out
    assert "KL divergence" not in model_card(file, base_model=None, weight_bytes=1)


def test_another_text_is_named_by_its_fingerprint(file: Path, capsys: Capture) -> None:
    ScoreRecorder([file]).record(file, score_of(report_of(file, text=text_fingerprint("mine"))))
    assert app.main(["inspect", str(file)]) == 0
    assert f"SHA-256 {text_fingerprint('mine')}" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["/home/somebody/models/Tiny-1B", "models/Tiny-1B"])
def test_folders_of_the_machine_are_not_recorded(
    file: Path, source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "Tiny-1B").mkdir(parents=True)
    assert score_of(report_of(file, source)).source == "Tiny-1B"


def test_a_file_that_changed_meanwhile_is_left_alone(file: Path) -> None:
    recorder = ScoreRecorder([file])
    with file.open("ab") as opened:
        opened.write(b"more")
    content = file.read_bytes()
    with pytest.raises(TritGgufError, match="was changed while it was measured"):
        recorder.record(file, score_of(report_of(file)))
    assert file.read_bytes() == content


def test_a_file_in_the_hub_s_cache_is_refused_before_anything_is_measured(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadRequestError, match="is in the hub's cache"):
        ScoreRecorder([file])


def test_the_command(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tiny_trit_file: Callable[..., GgufFile]
) -> None:
    monkeypatch.setattr("tritgguf.evaluation.verify.verify_files", lambda *_, **__: [report_of(file)])
    assert app.main(["verify", "org/name", str(file)]) == 0
    assert read_score(GgufFile(file).metadata) is None
    assert app.main(["verify", "org/name", str(file), "--write"]) == 0
    assert read_score(GgufFile(file).metadata) is not None
    capsys.readouterr()
    assert "no such file" in fails(capsys, "verify", "org/name", "missing.gguf", "--write").lower()


@pytest.mark.slow
def test_what_is_measured_is_recorded(tmp_path: Path, capsys: Capture) -> None:
    from tiny_models import write_tiny_model

    from tritgguf.conversion.convert import convert

    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source, file = write_tiny_model(tmp_path / "source"), tmp_path / "d2.gguf"
    convert(source, file, depth=2, recipe="published", encoder="v2")
    assert app.main(["verify", str(source), str(file), "--tokens", "64", "--write", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    score = read_score(GgufFile(file).metadata)
    assert score is not None
    measured = {name: vars(score)[name] for name in printed["quantization"]}
    assert measured == printed["quantization"]
    assert (score.tokens, score.text, score.source, score.revision) == (64, SHIPPED, "source", "")
    assert check(file).checksums > 0
