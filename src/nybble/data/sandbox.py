"""Chat templates rendered within limits: one comes with a model from anywhere, and could loop or build text without end.

The environment is Transformers' own, sandbox and all, so a template renders as it does there. Beyond that each loop, call, filter
and operator is metered before it runs: what it will make is estimated from its operands, and refused where that is too much. The
estimates are upper bounds, roughly; a template that honest people write stays below them by a factor of a thousand.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.environment import Template
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

from nybble.errors import DataError

SOURCE = 200_000  # characters of a template; the longest that models come with have 20,000
SECONDS = 5.0  # of processor time for one rendering; a usual one takes less than 0.001
VALUE = 4_000_000  # characters of one value, and eight for each that the messages have
COPIES = 64  # of such a value, made one after another
NODE = 16  # what an item of a list counts beside its text
DIGITS = 4300  # of a number; Python writes none longer
ESTIMATED = frozenset({"indent", "tojson", "sum"})  # filters that may make much of a text alone
FREE = frozenset({"length", "count", "default", "d", "first", "last"})  # filters that make nothing
TESTS = ("in", "eq", "ne", "lt", "le", "gt", "ge", "==", "!=", "<", "<=", ">", ">=", "equalto", "lessthan", "greaterthan")
COUNTED, JOINED, MADE, STEPPED, COMPARED = "counted items", "joined text", "made value", "one step", "compared values"  # no template can write these names
WIDTH = re.compile(r"%[^%A-Za-z]*|\{[^{}]*")  # where a format says how wide a value becomes
WIDTH_GIVEN = re.compile(r"\*|\{[^{}]*\{")  # where it leaves that to the values


class TemplateLimitError(DataError):
    """A template that runs too long or builds too much, whatever the row: no row can be rendered with it."""


class Meter:
    """What one rendering has used up.

    Args:
        given: characters that its messages have.
    """

    def __init__(self, given: int) -> None:
        self.largest = VALUE + 8 * given
        self.left = COPIES * self.largest
        self._wall = time.monotonic() + SECONDS
        self._processor = time.thread_time() + SECONDS

    def step(self, written: int = 0) -> None:
        """Before each turn of a loop, each call and each operator that walks over values.

        Args:
            written: characters of the template's own that this puts out.

        Raises:
            TemplateLimitError: the time is up, or all that may be written is.
        """
        self.left -= written
        now = time.monotonic()
        if now > self._wall:
            remaining = self._processor - time.thread_time()
            if remaining <= 0:
                raise TemplateLimitError(f"it is still at work after {SECONDS:.0f} seconds")
            self._wall = now + remaining  # a machine that was busy or asleep is no fault of the template
        if self.left < 0:
            raise TemplateLimitError(f"it writes more than {COPIES * self.largest:,} characters")

    def make(self, size: float, new: float | None = None) -> None:
        """Before, or after, a value of so many characters is made.

        Args:
            size: written out.
            new: what it takes beside the values that it holds; None: all of it.

        Raises:
            TemplateLimitError: it is too large, or so are all of them together.
        """
        if size > self.largest:
            raise TemplateLimitError(f"it builds a value of more than {self.largest:,} characters")
        self.left -= int(size if new is None else new)
        if self.left < 0:
            self.step()

    def number(self, bits: int) -> None:
        """Before a whole number of so many bits is made.

        Raises:
            TemplateLimitError: it is too long.
        """
        if bits * 0.30103 > DIGITS:
            raise TemplateLimitError(f"it computes a number of more than {DIGITS:,} digits")

    def size(self, value: Any) -> int:
        """Characters of a value written out, roughly; counted no further than needed to know that it is too large."""
        if type(value) is str:  # nearly always, and this is called for all that a template writes
            return len(value)
        total, waiting = 0, [value]
        while waiting and total <= self.largest:
            item = waiting.pop()
            total += NODE
            if isinstance(item, Namespace):
                item = object.__getattribute__(item, "_Namespace__attrs")
            if isinstance(item, str | bytes):
                total += len(item)
            elif isinstance(item, Mapping):
                total += 2 * NODE * len(item)
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                total += NODE * len(item)
                waiting += item
            elif isinstance(item, int):
                total += item.bit_length() // 3
        return total


class Sandbox(ImmutableSandboxedEnvironment):
    """Transformers' environment for chat templates, metered."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        own = _compile_jinja_template("").environment
        super().__init__(
            trim_blocks=own.trim_blocks,
            lstrip_blocks=own.lstrip_blocks,
            extensions=[type(extension) for extension in own.extensions.values()],
        )
        self.code_generator_class = _Generator
        self.globals = {name: value for name, value in own.globals.items() if name != "lipsum"}  # random words, any number
        self.filters = {
            name: value if name in FREE else self._metered(name, value) for name, value in own.filters.items()
        }
        self.filters |= {COUNTED: _counted, JOINED: self._joined, MADE: self._weighed, STEPPED: _stepped}
        self.filters[COMPARED] = self._compared
        self.tests |= {name: self._tested(self.tests[name]) for name in TESTS}
        self.finalize = self._written
        self._local = threading.local()

    @property
    def meter(self) -> Meter:
        """Of the rendering that this thread is at."""
        meter: Meter = self._local.meter
        return meter

    def compiled(self, source: str) -> Template:
        """A template ready to render.

        Raises:
            TemplateLimitError: it is too long.
        """
        if len(source) > SOURCE:
            raise TemplateLimitError(f"it has {len(source):,} characters, and a template may have {SOURCE:,}")
        self._local.meter = Meter(0)
        return self.from_string(source)

    def rendered(self, template: Template, given: int, variables: Mapping[str, Any]) -> str:
        """What a template makes of variables, of which the messages have `given` characters.

        Raises:
            TemplateLimitError: it takes too long or builds too much.
        """
        self._local.meter = Meter(given)
        return template.render(variables)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A function, method or macro of the template."""
        meter: Meter = self._local.meter
        meter.step()
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps str.format
        if isinstance(owner, str | bytes | int):
            args = _expected(meter, obj.__name__, owner, args, kwargs)
        return self._weighed(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator between two values."""
        meter: Meter = self._local.meter
        if type(left) is type(right) is str and operator == "+":
            meter.make(len(left) + len(right))
            return left + right
        meter.step()
        if isinstance(left, int) and isinstance(right, int):
            own, other = left.bit_length(), right.bit_length()
            meter.number(own * max(right, 0) if operator == "**" else own + other)
        elif operator == "*" and isinstance(left, int) ^ isinstance(right, int):
            times, value = (left, right) if isinstance(left, int) else (right, left)
            meter.make(meter.size(value) * max(times, 0))
        elif operator == "+":
            lists = isinstance(left, list | tuple) and isinstance(right, list | tuple)
            meter.make(meter.size(left) + meter.size(right), NODE * (len(left) + len(right)) if lists else None)
        elif operator == "%" and isinstance(left, str | bytes):
            meter.make(_formatted(meter, left, right))
        return super().call_binop(context, operator, left, right)

    def _written(self, value: Any) -> Any:
        """What a template puts out, before it is text."""
        meter: Meter = self._local.meter
        meter.make(len(value) if type(value) is str else meter.size(value))
        return value

    def _joined(self, parts: Sequence[Any]) -> str:
        meter: Meter = self._local.meter
        meter.make(sum(map(meter.size, parts)))
        return "".join(map(str, parts))

    def _compared(self, value: Any) -> Any:
        """Of a comparison, which may have walked over much."""
        self._local.meter.step()
        return value

    def _weighed(self, result: Any) -> Any:
        meter: Meter = self._local.meter
        if isinstance(result, int):
            meter.number(result.bit_length())
        elif isinstance(result, str | bytes):
            meter.make(len(result))
        elif isinstance(result, Collection | Namespace):
            meter.make(meter.size(result), NODE * len(result) if isinstance(result, Collection) else None)
        return result

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = int(hasattr(function, "jinja_pass_arg"))  # its first argument is then Jinja's, not the template's

        @functools.wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            meter: Meter = self._local.meter
            meter.step()
            value, rest = args[skipped], args[skipped + 1 :]
            if type(value) is str and not rest and not kwargs and name not in ESTIMATED:
                return self._weighed(function(*args))
            if name in {"join", "sum"} and isinstance(value, Iterator):
                value = list(value)
            rest = _expected(meter, name, value, rest, kwargs)
            return self._weighed(function(*args[:skipped], value, *rest, **kwargs))

        return filtered

    def _tested(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def tested(*args: Any) -> Any:
            self._local.meter.step()
            return function(*args)

        return tested


class _Generator(CodeGenerator):
    """Jinja's, from templates with steps in them."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:  # noqa: N802 - Jinja's name
        stepped = _Stepped().visit(node)
        stepped.set_environment(self.environment)
        super().visit_Template(stepped, frame)


class _Stepped(NodeTransformer):
    """Puts a step into each loop, macro and block, and what must be measured through a filter of the sandbox's own."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        if node.test is not None:  # items that it leaves out never reach the body
            node.iter = _through(node.iter, COUNTED)
        return self._body(node)

    def _body(self, node: Any) -> nodes.Node:
        written = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        written += sum(len(part.value) for part in node.find_all(nodes.Const) if isinstance(part.value, str))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_through(nodes.Const(None), STEPPED, written)))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(nodes.Tuple(node.nodes, "load"), JOINED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        return _through(self.generic_visit(node), COMPARED)

    def _literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        plain = all(isinstance(part, nodes.Const) for part in node.iter_child_nodes())
        stored = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if plain or stored else _through(node, MADE)

    visit_List = visit_Tuple = visit_Dict = _literal


def _through(node: Any, name: str, *args: int) -> nodes.Filter:
    return nodes.Filter(node, name, [nodes.Const(value) for value in args], [], None, None)


def _sandbox(context: Context) -> Sandbox:
    assert isinstance(context.environment, Sandbox)
    return context.environment


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    meter = _sandbox(context).meter
    for item in items:
        meter.step()
        yield item


@pass_context
def _stepped(context: Context, value: Any, written: int = 0) -> Any:
    _sandbox(context).meter.step(written)
    return value


def _expected(meter: Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Refuse what a method or filter would make too much of; returns its arguments, an iterator among them as a list."""
    args = tuple(list(item) if isinstance(item, Iterator) else item for item in args)
    given = [*args, *kwargs.values()]
    number = max((abs(item) for item in given if isinstance(item, int)), default=0)
    text = max((meter.size(item) for item in given), default=0)
    size = meter.size(value)
    if name in {"format", "format_map"}:
        meter.make(_formatted(meter, value, given))
    elif name == "replace":
        pieces = size + 1
        if pieces * text > meter.largest and args and isinstance(value, str) and isinstance(args[0], str):
            pieces = value.count(args[0])
        meter.make(size + pieces * text)
    elif name == "join":  # the method's text stands before the dot, the filter's behind it
        texts, between = (value, text) if not isinstance(value, str) or not args else (args[0], size)
        meter.make(meter.size(texts) + between * (len(texts) if isinstance(texts, Collection) else 1))
    elif name in {"expandtabs", "indent"} and isinstance(value, str):
        meter.make(size + (value.count("\t" if name == "expandtabs" else "\n") + 1) * max(number, text))
    elif name in {"wordwrap", "urlize", "translate", "xmlattr"}:
        meter.make(size * (1 + text))
    elif name == "tojson":
        meter.make(size + size // NODE * (number * _depth(value) + text))
    elif name == "sum" and not all(isinstance(item, int | float) for item in (value if number or given else ())):
        raise TemplateLimitError("it adds up what is not numbers")
    elif number > meter.largest:
        raise TemplateLimitError(f"it calls {name} with the number {number if number < 10**20 else 'of many digits'}")
    return args


def _formatted(meter: Meter, pattern: str | bytes, values: Any) -> float:
    """Characters that a format makes of values at most: its own, its widths, and every value wherever it may stand."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    places = WIDTH.findall(text)
    widths = sum(int(digits[:12]) for place in places for digits in re.findall(r"\d+", place))
    if WIDTH_GIVEN.search(text):
        widths += _largest_number(values) * len(places)
    return len(text) + widths + len(places) * meter.size(values)


def _largest_number(values: Any) -> int:
    if isinstance(values, int):
        return abs(values)
    inner = values.values() if isinstance(values, Mapping) else values
    return max(map(_largest_number, inner), default=0) if isinstance(inner, Collection) and not isinstance(inner, str) else 0


def _depth(value: Any) -> int:
    """Levels of lists within lists."""
    levels, level = 0, [value]
    while level:
        levels += 1
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ())
        ]
    return levels
