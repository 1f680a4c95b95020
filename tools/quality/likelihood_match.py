"""Are lm-eval's log-likelihoods the same in this process, from the server, and from transformers?

    python -m tools.quality.likelihood_match models/SmolLM2-135M-Instruct smollm2-d2.gguf

The pairs are those of `tritgguf_facts` and `tritgguf_cloze`. transformers has the file's dequantized weights in
float32. Server and process share a model with exact activations; a second one has 16 bits, a third one 8. The last line
compares the perplexity of `loglikelihood_rolling` with that of `verify` on the text that `verify` ships.
"""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from tools import tool_command
from tritgguf.cli import terminal
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.lm_eval.registration import TASKS_FOLDER, require_lm_eval

_CONTEXT = 1024
_WINDOW = 512


class _Request(NamedTuple):
    args: tuple[Any, ...]


def pairs(questions: int) -> list[_Request]:
    """Return contexts and continuations of the first questions of both tasks."""
    facts, cloze = (
        [json.loads(line) for line in (TASKS_FOLDER / name).read_text("utf-8").splitlines()[:questions]]
        for name in ("facts.jsonl", "cloze.jsonl")
    )
    found = [
        _Request((f"Question: {row['question']}\nAnswer:", f" {choice}")) for row in facts for choice in row["choices"]
    ]
    return found + [_Request((row["text"], f" {row['target']}")) for row in cloze]


def of_transformers(source: str, file: Path, requests: list[_Request]) -> list[tuple[float, bool]]:
    """Return log-likelihoods by transformers, with the file's weights."""
    from lm_eval.models.huggingface import HFLM

    from tritgguf.formats.gguf_file import open_trit_file
    from tritgguf.reference.model import ReferenceModel
    from tritgguf.sources.open import open_source

    reference = ReferenceModel.open(open_source(source))
    reference.load_file(open_trit_file(file))
    lm = HFLM(pretrained=reference.module, tokenizer=source, device="cpu", batch_size=16)
    found: list[tuple[float, bool]] = lm.loglikelihood(requests, disable_tqdm=True)
    return found


def of_the_server(model: LoadedModel, requests: list[_Request]) -> list[tuple[float, bool]]:
    """Return log-likelihoods by lm-eval's client of a server that this process runs."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from tritgguf.serving.address import listening_socket, url_of
    from tritgguf.serving.server import Server
    from tritgguf.serving.settings import ServerSettings

    bound, started = listening_socket("127.0.0.1", 0), threading.Event()
    server = Server(model, ServerSettings(port=0, alias="model"), started.set)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    started.wait()
    url = f"{url_of(bound)}/v1/completions"
    client = LocalCompletionsAPI(
        model="model", base_url=url, tokenizer_backend="remote", num_concurrent=4, max_length=_CONTEXT
    )
    found: list[tuple[float, bool]] = client.loglikelihood(requests)
    server.should_exit = True
    thread.join()
    return found


def perplexities(source: str, file: Path) -> tuple[float, float]:
    """Return the perplexity of the first window of verify's text, by `verify` and by `loglikelihood_rolling`.

    Where the model uses no BOS token, verify's window begins with a token of the text; it takes the place of BOS.
    """
    from tritgguf.evaluation.text_windows import shipped_text
    from tritgguf.evaluation.verify import verify
    from tritgguf.lm_eval.model import TritGgufLM

    lm = TritGgufLM(file, max_length=_WINDOW, cache_type="f32")
    tokenizer = lm.model.tokenizer
    prefix = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    first, *others = [*prefix, *lm.tok_encode(shipped_text(), add_special_tokens=False)][:_WINDOW]
    text = tokenizer.decode(others)
    if lm.tok_encode(text, add_special_tokens=False) != others:
        raise AssertionError("the text of the window has other tokens")
    lm = TritGgufLM(lm.model, prefix_token_id=first)
    [log_likelihood] = lm.loglikelihood_rolling([_Request((text,))], disable_tqdm=True)
    return verify(source, file, tokens=_WINDOW).perplexity, math.exp(-log_likelihood / len(others))


def _row(name: str, found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> tuple[str, ...]:
    differences = [abs(a - b) / abs(b) for (a, _), (b, _) in zip(found, expected, strict=True)]
    same = sum(bool(a) == bool(b) for (_, a), (_, b) in zip(found, expected, strict=True))
    mean = sum(differences) / len(differences)
    return name, f"{max(differences):.1e}", f"{mean:.1e}", f"{same} of {len(found)}"


def main(
    source: Annotated[str, typer.Argument(help="The Hugging Face folder from which the file was converted.")],
    file: Annotated[Path, typer.Argument(help="A trit file.")],
    questions: Annotated[int, typer.Option(help="Questions of each task.", min=1)] = 40,
) -> None:
    """Compare lm-eval's log-likelihoods, relative to those of transformers."""
    require_lm_eval()
    os.environ.setdefault("TQDM_DISABLE", "1")
    from tritgguf.lm_eval.model import TritGgufLM

    requests = pairs(questions)
    expected = of_transformers(source, file, requests)
    exact = load(file, context=_CONTEXT, exact=True)
    rows = [
        _row("in this process, exact", TritGgufLM(exact).loglikelihood(requests, disable_tqdm=True), expected),
        _row("from the server, exact", of_the_server(exact, requests), expected),
    ]
    for bits in (16, 8):
        lm = TritGgufLM(file, max_length=_CONTEXT, prefill_bits=bits)
        rows.append(_row(f"in this process, {bits} bits", lm.loglikelihood(requests, disable_tqdm=True), expected))
    terminal.print_table(
        f"{file.name}: {len(requests)} log-likelihoods against transformers on the dequantized weights",
        ("", ">largest difference", ">mean", ">same is_greedy"),
        rows,
    )
    of_verify, of_rolling = perplexities(source, file)
    print(f"perplexity: verify {of_verify:.6f}, rolling {of_rolling:.6f}, {abs(of_rolling / of_verify - 1):.1e} apart")


if __name__ == "__main__":
    tool_command.run(main)
