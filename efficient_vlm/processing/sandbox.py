"""The jinja2 environment for chat templates of strangers.

To jinja2's immutable sandbox (no private attributes, no changes to what is passed in, short ranges)
it adds a budget of steps, which every pass of a loop, every item of a filter and every call takes
from, and a limit on the length of what is repeated, padded, joined, replaced or added.
"""

import functools
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import ext, nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from efficient_vlm.errors import UserError
from efficient_vlm.processing.messages import GENERATION_MARKS

# Filters whose result can be as long as a number in the template says.
_PADDING_FILTERS = ("batch", "center", "format", "indent", "slice")
# Filters that go through the items of their first argument.
_ITERATING_FILTERS = (
    *("first", "groupby", "join", "last", "list", "map", "max", "min", "reject", "rejectattr"),
    *("reverse", "select", "selectattr", "sort", "sum", "unique"),
)
_MAX_BITS = 10_000  # Of a whole number.


def wide(digits: int) -> re.Pattern:
    """Finds a width of so many digits, or one taken from an argument, in either kind of format
    string."""
    number = f"[0-9]{{{digits}}}"
    return re.compile(rf"%[^a-zA-Z%]*({number}|\*)|\{{[^{{}}]*:[^{{}}]*({number}|\{{)")


_WIDE = wide(7)


class _Generation(ext.Extension):
    """{% generation %} marks what an assistant wrote, for training; the text stays as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.Name(name, "load", lineno=line)], lineno=line)
            for name in GENERATION_MARKS
        )
        return nodes.Scope([begin, *body, end], lineno=line)


class _PublicNamespace(Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace: {name!r} is private")
        super().__setitem__(name, value)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and runs one template.

    Args:
      max_steps: passes of loops and calls of one rendering.
      max_length: characters or items of a repeated or padded value.
    """

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, max_steps: int, max_length: int):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
        )
        self._max_steps, self._max_length = max_steps, max_length
        self._running = threading.local()
        for name in _PADDING_FILTERS:
            self.filters[name] = self._bounded(self.filters[name])
        for name in _ITERATING_FILTERS:
            self.filters[name] = self._iterating(name, self.filters[name])
        replace = self.filters["replace"]
        self.filters |= {
            "counted": self._counted,
            "concatenated": self._concatenated,
            "replace": functools.wraps(replace)(self._replacing(replace)),
        }
        self.globals["raise_exception"] = _raise
        self.globals["namespace"] = _PublicNamespace
        del self.globals["lipsum"]  # Minutes of filler text in a single call.
        for name in ("wordwrap", "urlize"):  # Minutes for one long text, and in no chat template.
            del self.filters[name]

    def begin(self) -> None:
        """Gives a rendering of this thread its full budget."""
        self._running.steps = 0

    def compiled(self, source: str) -> jinja2.Template:
        """A template whose loops are counted.

        Raises:
          jinja2.TemplateSyntaxError: the source is not a template.
        """
        tree = self.parse(source)
        return self.from_string(_Rewritten().visit(tree).set_environment(self))

    def call(self, context: Any, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template goes through here, those of macros included."""
        self._step()
        self._check_numbers(*args, *kwargs.values())
        text, method = getattr(target, "__self__", None), getattr(target, "__name__", "")
        if isinstance(text, str) and method == "join" and args:
            args = (self._joinable(text, args[0]), *args[1:])
        elif isinstance(text, str) and method in ("translate", "expandtabs", "encode"):
            self._refuse(f"a call of {method}")
        elif isinstance(text, str) and method == "replace":
            self._check_replacement(text, *args)
        elif isinstance(target, LoopContext) and args:  # A recursive loop is called with values.
            args = (self._counted(args[0]), *args[1:])
        return super().call(context, target, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        """Every look-up of an attribute goes through here, for `format` of a text."""
        if getattr(value, "__name__", "") in ("format", "format_map"):
            self._check_format(getattr(value, "__self__", None))
        return super().wrap_str_format(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products, powers and old-style formatting: refused where the result would be huge."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                repeats = isinstance(value, str | bytes | list | tuple) and isinstance(times, int)
                if repeats and len(value) * times > self._max_length:
                    self._refuse(f"{len(value)} items repeated {times:.3g} times")
            if isinstance(left, int) and isinstance(right, int):
                self._check_bits(left.bit_length() + right.bit_length())
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * max(right, 0))
        if operator == "+" and isinstance(left, str | list | tuple):
            self._check_length(len(left) + len(right if isinstance(right, type(left)) else ()))
        if operator == "%":
            self._check_format(left)
        return super().call_binop(context, operator, left, right)

    def _concatenated(self, values: list[Any]) -> str:
        """`a ~ b`."""
        return "".join(self._joinable("", [str(value) for value in values]))

    def _joinable(self, separator: str, values: Iterable[Any]) -> list[Any]:
        """The values, if joining them gives a text of a length that is allowed."""
        values = list(self._counted(values))
        lengths = sum(len(value) for value in values if isinstance(value, str))
        self._check_length(lengths + len(separator) * len(values))
        return values

    def _iterating(self, name: str, filter_function: Any) -> Any:
        """A filter that takes a step for each item it is given."""
        first = int(hasattr(filter_function, "jinja_pass_arg"))

        @functools.wraps(filter_function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            args = list(args)
            if name == "join":
                separator = kwargs.get("d", args[first + 1] if len(args) > first + 1 else "")
                args[first] = self._joinable(str(separator), args[first])
            elif not isinstance(args[first], str | dict):
                # What is asked for its length, or from behind, must stay a list.
                items = self._counted(args[first])
                args[first] = list(items) if isinstance(args[first], list | tuple) else items
            start = kwargs.get("start", args[first + 2] if len(args) > first + 2 else 0)
            if name == "sum" and not isinstance(start, int | float):
                self._refuse("a sum of texts or lists")
            return filter_function(*args, **kwargs)

        return checked

    def _replacing(self, filter_function: Any) -> Any:
        def checked(eval_ctx: Any, s: str, old: str, new: str, count: int | None = None) -> Any:
            self._check_replacement(s, old, new)
            return filter_function(eval_ctx, s, old, new, count)

        return checked

    def _check_replacement(self, text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
        text, old, new = map(str, (text, old, new))
        self._check_length(len(text) + text.count(old) * max(len(new) - len(old), 0))

    def _check_length(self, length: int) -> None:
        if length > self._max_length:
            self._refuse(f"a value of length {length:.3g}")

    def _check_bits(self, bits: int) -> None:
        if bits > _MAX_BITS:
            self._refuse(f"a number of {bits:.3g} bits")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def _bounded(self, filter_function: Any) -> Any:
        """A padding filter that refuses large numbers and large widths in format strings."""

        @functools.wraps(filter_function)  # Keeps jinja2's marks of what it wants to be passed.
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check_numbers(*args, *kwargs.values())
            self._check_format(*args)
            return filter_function(*args, **kwargs)

        return checked

    def _check_numbers(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, int) and abs(value) > self._max_length:
                self._refuse(f"a call with the number {value:.3g}")

    def _check_format(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, str) and _WIDE.search(value):
                self._refuse(f"a field width in {value[:40]!r}")

    def _step(self) -> None:
        self._running.steps += 1
        if self._running.steps > self._max_steps:
            self._refuse(f"more than {self._max_steps:,} steps")

    def _refuse(self, what: str) -> None:
        raise UserError(
            f"chat template: {what}",
            allowed=f"{self._max_steps:,} steps, values up to {self._max_length:,} long",
            fix="this template may be hostile: take it from the model's publisher",
        )


class _Rewritten(NodeTransformer):
    """A template whose loops are counted and whose concatenations are bounded."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "concatenated")


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _raise(message: str) -> None:
    """`raise_exception` of templates: how they refuse a conversation."""
    raise jinja2.TemplateError(str(message))
