"""Chat templates that never terminate, exhaust memory, or access the interpreter."""

from __future__ import annotations

from pathlib import Path

from attack import Attack
from tiny_models import edit_json, write_tiny_model

from tritgguf.conversion.convert import convert


def _template(name: str, template: str, *message_parts: str) -> Attack:
    """Return an attack on `run` with a file that contains a template."""

    def build(folder: Path) -> list[str]:
        source = write_tiny_model(folder / "model")
        edit_json(source / "tokenizer_config.json", chat_template=template)
        convert(source, folder / "evil.gguf", depth=1)
        return ["run", str(folder / "evil.gguf"), "-p", "hello", "-n", "1"]

    return Attack(name, build, ("evil.gguf", "chat template", *message_parts, "--raw"))


_GROW = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
# One comparison of lists nested sixty deep: it compares 2**60 pairs, and no signal interrupts it.
_PAIRS = (
    "{% set n = namespace(a=[0], b=[0]) %}"
    "{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}"
)

ATTACKS = [
    _template("nested loops", 3 * "{% for a in range(9999) %}" + 3 * "{% endfor %}", "seconds"),
    _template("a comparison that never ends", _PAIRS, "seconds"),
    _template("a macro that calls itself", "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    _template("a string of 10**9 characters", "{{ 'a' * 1000000000 }}", "memory"),
    _template("a string that doubles sixty times", _GROW, "memory"),
    _template("a format width of 10**9", "{{ '%1000000000d' % 1 }}", "memory"),
    _template("a number of 34 million digits", "{{ 7 ** (7 ** 9) }}", "too large"),
    _template("a range beyond the sandbox's limit", "{% for a in range(10**9) %}{% endfor %}", "ange"),
    _template("the classes of the interpreter", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    _template("the globals of a function", "{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe"),
    _template("a change of its input", "{{ messages.append(1) }}", "unsafe"),
    _template("an invalid template", "{% for", "end of template"),
]
