"""publish: folders with measured files and their cards; what is finished is not made again, what is foreign stays."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command_line import Capture, fails
from loopback_hub import loopback_hub, use_hub
from tiny_models import write_tiny_model

from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.calibration.end_to_end import training_bytes
from tritgguf.calibration.text import windows_of_text
from tritgguf.cli import app
from tritgguf.conversion.convert import ConvertProgress, convert
from tritgguf.conversion.depths import DepthChoice
from tritgguf.evaluation.verify import RunnerErrors, verify
from tritgguf.formats.description import describe
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.safetensors_reader import StoredTensor
from tritgguf.publishing.state import State, checksum
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))), reason="needs the extra `verify`"
)
PLAN = """
sources = ["Tiny"]
configurations = ["uniform-d2", "uniform-d3"]
[publish]
output = "out"
tokens = 60
exports = ["q8_0", "hf"]
"""
NAMES = ("Tiny-trit-uniform-d2", "Tiny-trit-uniform-d3")


def untouched(*arguments: Any, **options: Any) -> None:
    raise AssertionError("this must not be reached")


def write_plan(folder: Path, text: str = PLAN) -> str:
    file = folder / "plan.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def published(capsys: Capture, plan: str, *options: str) -> dict[str, Any]:
    code, captured = app.main(["publish", plan, "--json", *options]), capsys.readouterr()
    assert code == 0, captured.err
    report: dict[str, Any] = json.loads(captured.out)
    return report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan that was carried out once. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("publish")
    write_tiny_model(folder / "Tiny")
    assert app.main(["publish", write_plan(folder)]) == 0
    return folder


def test_every_folder_is_complete(whole: Path) -> None:
    for name in NAMES:
        files = {path.name for path in (whole / "out" / name).iterdir()}
        assert files == {f"{name}.gguf", f"{name}-q8_0.gguf", "hf", "README.md", "chart.svg"}
        assert (whole / "out" / name / "hf" / "model.safetensors").is_file()


def test_files_are_those_of_convert_with_scores_of_verify(whole: Path, tmp_path: Path) -> None:
    file = whole / "out" / NAMES[0] / f"{NAMES[0]}.gguf"
    convert(whole / "Tiny", tmp_path / "same.gguf", depth=2, encoder="v2", recipe="published")
    ours, theirs = GgufFile(file), GgufFile(tmp_path / "same.gguf")
    assert {key: value for key, value in ours.metadata.items() if not key.startswith("trit.score.")} == theirs.metadata
    report, score = verify(whole / "Tiny", tmp_path / "same.gguf", tokens=60), describe(file).score
    assert score is not None
    assert (score.kl_mean, score.perplexity, score.tokens) == (report.kl_mean, report.perplexity, 60)


def test_cards_show_what_was_measured(whole: Path) -> None:
    card = (whole / "out" / NAMES[1] / "README.md").read_text("utf-8")
    assert "library_name: gguf\n" in card
    for name, shown in zip(NAMES, ("uniform-d2", "**uniform-d3**"), strict=True):
        score = describe(whole / "out" / name / f"{name}.gguf").score
        assert score is not None
        row = rf"^\| {re.escape(shown)} \| [^|]+ \| [\d.]+ \| {score.kl_mean:.4f} \| {score.kl_p99:.4f} \| "
        assert re.search(row + rf"{score.top1_agreement:.1%} \| {score.perplexity:.3f} \| [\d.]+ \|$", card, re.M), card
    for file in (f"{NAMES[1]}.gguf", f"{NAMES[1]}-q8_0.gguf", "hf"):
        assert f"| `{file}` |" in card
    texts = [element.text for element in ElementTree.parse(whole / "out" / NAMES[1] / "chart.svg").iter()]
    assert {"uniform-d2", "uniform-d3"} <= set(texts)
    score_of_export = (whole / "out" / NAMES[1] / "hf" / "README.md").read_text("utf-8")
    assert "KL divergence from the source" in score_of_export


def test_what_is_finished_is_not_made_again(whole: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "out").glob("Tiny*/**/*")}
    for name in ("convert_together", "generation_speed", "export"):
        monkeypatch.setattr(f"tritgguf.publishing.tasks.{name}", untouched)
    monkeypatch.setattr("tritgguf.reference.model.ReferenceModel.open", untouched)
    report = published(capsys, str(whole / "plan.toml"))
    assert [row["configuration"] for row in report["files"]] == ["uniform-d2", "uniform-d3"]
    assert all(row["quality"]["tokens_per_second"] > 0 for row in report["files"])
    assert {path: path.stat().st_mtime_ns for path in (whole / "out").glob("Tiny*/**/*")} == before


def test_a_changed_configuration_is_made_again_and_others_are_not(tmp_path: Path, capsys: Capture) -> None:
    write_tiny_model(tmp_path / "Tiny")
    text = PLAN.replace('exports = ["q8_0", "hf"]', "bench = false")
    first = published(capsys, write_plan(tmp_path, text))
    kept, remade = (tmp_path / "out" / name / f"{name}.gguf" for name in NAMES)
    sums = checksum(kept), checksum(remade)
    changed = text.replace('"uniform-d3"', '{ name = "uniform-d3", encoder = "best" }')
    second = published(capsys, write_plan(tmp_path, changed))
    assert checksum(kept) == sums[0]
    assert checksum(remade) != sums[1]
    assert GgufFile(remade).metadata["trit.encoder"] == "best"
    assert second["files"][0] == first["files"][0]
    assert second["files"][1]["quality"]["kl_mean"] != first["files"][1]["quality"]["kl_mean"]


@pytest.mark.parametrize(
    "stage", ["convert_together", "quantization_costs", "generation_speed", "export", "replace_text"]
)
def test_an_interrupted_run_goes_on(
    stage: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    write_tiny_model(tmp_path / "Tiny")
    plan = write_plan(tmp_path)
    module = "cards" if stage == "replace_text" else "tasks"
    original = getattr(importlib.import_module(f"tritgguf.publishing.{module}"), stage)
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if stage == "convert_together":
            return original(*arguments, **{**options, "progress": interrupt_in_the_middle})
        if stage == "quantization_costs" or len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    def interrupt_in_the_middle(state: ConvertProgress) -> None:
        if state.bytes_done > state.bytes_total // 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(f"tritgguf.publishing.{module}.{stage}", interrupted)
        assert app.main(["publish", plan]) == 130
    first = tmp_path / "out" / NAMES[0] / f"{NAMES[0]}.gguf"
    before = first.stat().st_mtime_ns if first.exists() else 0
    assert stage != "convert_together" or first.with_name(f"{first.name}.part.journal").exists()
    capsys.readouterr()
    published(capsys, plan)
    assert stage in ("convert_together", "quantization_costs") or first.stat().st_mtime_ns == before
    for name in NAMES:
        for file in (f"{name}.gguf", f"{name}-q8_0.gguf", "hf/model.safetensors"):
            assert checksum(tmp_path / "out" / name / file) == checksum(whole / "out" / name / file)


def test_a_run_killed_while_a_score_is_written_goes_on(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "Tiny")
    plan = write_plan(tmp_path, PLAN.replace('exports = ["q8_0", "hf"]', "bench = false"))

    def record(recorder: Any, file: Path, score: Any) -> None:
        original(recorder, file, score)
        raise KeyboardInterrupt

    from tritgguf.evaluation.recorded_scores import ScoreRecorder

    original = ScoreRecorder.record
    with monkeypatch.context() as patches:
        patches.setattr("tritgguf.publishing.stages.ScoreRecorder.record", record)
        assert app.main(["publish", plan]) == 130
    capsys.readouterr()
    monkeypatch.setattr("tritgguf.publishing.tasks.convert_together", untouched)
    assert len(published(capsys, plan)["files"]) == 2


@pytest.mark.parametrize("stage", ["convert", "export"])
def test_a_run_killed_before_it_notes_a_finished_file_goes_on(
    stage: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    write_tiny_model(tmp_path / "Tiny")
    plan = write_plan(tmp_path)
    finish = State.finish

    def killed(state: State, of: str, path: Path, settings: Any, result: Any) -> None:
        if of == stage:
            raise KeyboardInterrupt
        finish(state, of, path, settings, result)

    with monkeypatch.context() as patches:
        patches.setattr(State, "finish", killed)
        assert app.main(["publish", plan]) == 130
    capsys.readouterr()
    function = {"convert": "convert_together", "export": "export"}[stage]
    monkeypatch.setattr(f"tritgguf.publishing.tasks.{function}", untouched)
    published(capsys, plan)
    for name in NAMES:
        for file in (f"{name}.gguf", f"{name}-q8_0.gguf", "hf/model.safetensors", "chart.svg"):
            assert checksum(tmp_path / "out" / name / file) == checksum(whole / "out" / name / file)


def test_warnings_come_again(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "Tiny", "unaligned")
    plan = write_plan(tmp_path, PLAN.replace('["q8_0", "hf"]', "[]\nbench = false"))
    with monkeypatch.context() as patches:
        patches.setattr("tritgguf.publishing.tasks.runner_errors", lambda *arguments: RunnerErrors(0.5, 0.5, 0.1))
        warnings = published(capsys, plan)["warnings"]
    unaligned = [warning for warning in warnings if "kept in F16, because their row length is not" in warning]
    assert [warning.split(":")[0] for warning in unaligned] == list(NAMES)
    assert "blk.0.attn_q.weight" in unaligned[0]
    (wrong,) = (warning for warning in warnings if "logits differ from those of transformers by 5e-01" in warning)
    assert wrong.startswith(str(tmp_path / "out" / NAMES[0] / f"{NAMES[0]}.gguf"))
    monkeypatch.setattr("tritgguf.publishing.tasks.convert_together", untouched)
    assert published(capsys, plan)["warnings"] == warnings


def test_foreign_files_are_never_replaced(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "Tiny")
    plan = write_plan(tmp_path, PLAN.replace('["q8_0", "hf"]', "[]\nbench = false"))
    foreign = tmp_path / "out" / NAMES[1] / f"{NAMES[1]}.gguf"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with monkeypatch.context() as patches:
        patches.setattr("tritgguf.publishing.tasks.convert_together", untouched)
        assert f"{foreign}: exists, and `publish` has not made it" in fails(capsys, "publish", plan)
    assert foreign.read_text() == "mine"
    foreign.unlink()
    (foreign.parent / "README.md").write_text("my own card")
    report = published(capsys, plan)
    assert any("README.md: was changed or is not of" in warning for warning in report["warnings"])
    assert (foreign.parent / "README.md").read_text() == "my own card"


def calls_of(monkeypatch: pytest.MonkeyPatch, module: Any, function: str) -> list[Any]:
    """Return the arguments of each call of a module's function from now on, as a list that grows."""
    calls: list[Any] = []
    original = getattr(module, function)

    def count(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(module, function, count)
    return calls


def test_sensitivities_and_texts_are_made_once(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tritgguf.calibration import sensitivity

    write_tiny_model(tmp_path / "Tiny")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    names = '["d3scale-sens002", "d3scale-sens003", { name = "odd", depth = 3, encoder = "v2", sensitivity = 0.01 }]'
    text = PLAN.replace('["uniform-d2", "uniform-d3"]', names).replace('["q8_0", "hf"]', "[]\nbench = false")
    plan = write_plan(tmp_path, text + '[calibration]\ntext = "text.txt"\n')
    measured = calls_of(monkeypatch, sensitivity, "measure_sensitivities")
    report = published(capsys, plan)
    assert len(measured) == 1
    odd = tmp_path / "out" / "Tiny-trit-odd" / "Tiny-trit-odd.gguf"
    assert GgufFile(odd).metadata["trit.depths"] == "depth 3, 2 below sensitivity 0.01"
    sizes = [row["quality"]["file_bytes"] for row in report["files"]]
    assert sizes[0] >= sizes[1] >= sizes[2]
    before = odd.read_bytes()
    shutil.rmtree(odd.parent)
    published(capsys, plan)
    assert len(measured) == 1, "they are kept for a run that goes on"
    assert odd.read_bytes() == before
    (tmp_path / "text.txt").write_text("A lazy dog sleeps under the quick brown fox. " * 200, encoding="utf-8")
    published(capsys, plan)
    assert len(measured) == 2, "another text"


def test_costs_of_targets_are_measured_once(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from tritgguf.calibration import divergence_costs

    source = write_tiny_model(tmp_path / "Tiny")
    words = "The quick brown fox jumps over the lazy dog. " * 200
    (tmp_path / "text.txt").write_text(words, encoding="utf-8")
    targets = {"small": (2.6, "v2"), "large": (4.2, "v2"), "close": (2.6, "calibrated")}
    entries = [f'{{ name = "{k}", target_bpw = {bpw}, encoder = "{of}" }}' for k, (bpw, of) in targets.items()]
    text = PLAN.replace('"uniform-d2", "uniform-d3"', ", ".join(entries)).replace('["q8_0", "hf"]', "[]\nbench = false")
    plan = write_plan(tmp_path, text + '[calibration]\ntext = "text.txt"\ntokens = 1024\n')
    measured = calls_of(monkeypatch, divergence_costs, "measure_divergence_costs")
    published(capsys, plan)
    assert len(measured) == 1
    for name, (bpw, encoder) in targets.items():
        alone = tmp_path / f"{name}.gguf"
        windows = windows_of_text(open_source(source), words, 1024)
        convert(source, alone, encoder=encoder, windows=windows, choice=DepthChoice(target_bpw=bpw))
        assert depths_of(tmp_path / "out" / f"Tiny-trit-{name}" / f"Tiny-trit-{name}.gguf") == depths_of(alone)


def depths_of(file: Path) -> dict[str, int]:
    return {name: info.type_id for name, info in GgufFile(file).tensors.items()}


def test_weights_are_read_once_for_all_configurations(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    read_into = StoredTensor._read_into

    def count(tensor: StoredTensor, buffer: Any, start: int) -> None:
        read[tensor.name] += buffer.nbytes
        read_into(tensor, buffer, start)

    monkeypatch.setattr(StoredTensor, "_read_into", count)
    opened: list[Any] = []
    open_reference = ReferenceModel.open

    def open_and_count(*arguments: Any, **options: Any) -> ReferenceModel:
        opened.append(arguments)
        return open_reference(*arguments, **options)

    monkeypatch.setattr(ReferenceModel, "open", open_and_count)
    folder = write_tiny_model(tmp_path / "Tiny")
    names = json.dumps([f"uniform-d{depth}" for depth in (1, 2, 3, 4)])
    text = PLAN.replace('["uniform-d2", "uniform-d3"]', names).replace('["q8_0", "hf"]', "[]\nbench = false")
    assert len(published(capsys, write_plan(tmp_path, text))["files"]) == 4
    assert sum(read.values()) == sum(tensor.stored_bytes for tensor in open_source(folder).tensors)
    assert len(opened) == 1, "and once more by transformers"


def test_a_dry_run_writes_nothing(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    plan = write_plan(whole, PLAN)
    other = tmp_path / "plan.toml"
    other.write_text(PLAN.replace('"Tiny"', json.dumps(str(whole / "Tiny"))), encoding="utf-8")
    needs = published(capsys, str(other), "--dry-run")
    assert not (tmp_path / "out").exists()
    for row, name in zip(needs["files"], NAMES, strict=True):
        recorded = (whole / "out" / name / f"{name}.gguf").stat().st_size - row["file_bytes"]
        assert 0 < recorded < 1024  # the score
    assert needs["disk_bytes"] == sum(row["file_bytes"] + row["export_bytes"] for row in needs["files"])
    other.write_text(PLAN.replace('"Tiny"', '"org/not-here"'), encoding="utf-8")
    assert published(capsys, str(other), "--dry-run")["not_fetched"] == ["org/not-here"]
    assert app.main(["publish", plan, "--dry-run"]) == 0
    assert re.search(r"^  Tiny +uniform-d2 +[\d.]+ kB", capsys.readouterr().out, re.M)


def test_a_dry_run_counts_the_memory_of_training(tmp_path: Path, capsys: Capture) -> None:
    source = open_source(write_tiny_model(tmp_path / "Tiny"))
    trained = PLAN.replace('"uniform-d3"', '{ name = "trained", depth = 2, tune = "end-to-end" }')
    needs = published(capsys, write_plan(tmp_path, trained), "--dry-run")
    in_blocks = [tensor for tensor in source.tensors if quantized_tensor(tensor.name)]
    assert needs["memory_bytes"] == training_bytes(sum(math.prod(tensor.shape) for tensor in in_blocks))
    assert published(capsys, write_plan(tmp_path), "--dry-run")["memory_bytes"] < needs["memory_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("output_depth = 3, embedding_depth = 4", "give only one of --output-depth and --embedding-depth"),
        ("keep = 'blk.7.*=3'", r"--keep blk\.7\.\*=3: no matrix has such a name"),
    ],
)
def test_options_that_a_source_makes_impossible(
    options: str, message: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "Tiny", "llama-tied")
    plan = write_plan(tmp_path, PLAN.replace('"uniform-d3"', f'{{ name = "x", depth = 2, {options} }}'))
    monkeypatch.setattr("tritgguf.publishing.tasks.convert_together", untouched)
    assert re.search(rf"plan\.toml: x of Tiny: .*{message}", fails(capsys, "publish", plan))
    assert not (tmp_path / "out").exists()


def test_folders_are_uploaded(whole: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = str(whole / "plan.toml")
    with loopback_hub() as hub:
        use_hub(monkeypatch, hub, tmp_path)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        report = published(capsys, plan, "--upload", "org")
        assert [upload["repository"] for upload in report["uploads"]] == [f"org/{name}" for name in NAMES]
        for name in NAMES:
            there = hub.models[f"org/{name}"]
            assert there[f"{name}.gguf"] == (whole / "out" / name / f"{name}.gguf").read_bytes()
            assert {"README.md", "chart.svg", "hf/model.safetensors", f"{name}-q8_0.gguf"} <= there.keys()
        hub.refuse = lambda path: (403, {})
        assert app.main(["publish", plan, "--upload", "org"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    for name, error in zip(NAMES, errors, strict=True):
        assert re.match(rf"error: org/{name}: the upload failed: .*HTTP 403", error)
    assert "is no name of an organization" in fails(capsys, "publish", plan, "--upload", "a/b")
