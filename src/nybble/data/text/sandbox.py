"""Renders chat templates within limits: a template comes with a model from anywhere, and could loop or build text endlessly.

The environment is Transformers' own, including its sandbox, so that a template renders as it does there. In addition, each loop,
call, filter and operator is metered before it runs (`nybble.data.text.meter`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.environment import Template
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

from nybble.data.text.meter import ITEM_SIZE, Meter, TemplateLimitError, check_call, formatted_size

MAX_SOURCE = 200_000  # characters of a template; the longest that come with models have 20,000
ESTIMATED = frozenset({"indent", "tojson", "sum"})  # filters that may build much even without arguments
FREE = frozenset({"length", "count", "default", "d", "first", "last"})  # filters that build nothing
TESTS = ("in", "eq", "ne", "lt", "le", "gt", "ge", "==", "!=", "<", "<=", ">", ">=", "equalto", "lessthan",
         "greaterthan")  # fmt: skip
# The sandbox's own filters; their names contain spaces, so that no template can use them.
COUNTED, JOINED, MEASURED = "counted items", "joined text", "measured value"
STEPPED, COMPARED = "one step", "compared values"


class Sandbox(ImmutableSandboxedEnvironment):
    """Transformers' environment for chat templates, metered."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        original = _compile_jinja_template("").environment
        super().__init__(
            trim_blocks=original.trim_blocks,
            lstrip_blocks=original.lstrip_blocks,
            extensions=[type(extension) for extension in original.extensions.values()],
        )
        self.code_generator_class = _Generator
        # lipsum makes any number of random words
        self.globals = {name: value for name, value in original.globals.items() if name != "lipsum"}
        self.filters = {
            name: value if name in FREE else self._metered(name, value) for name, value in original.filters.items()
        }
        self.filters |= {COUNTED: _counted, JOINED: self._joined, MEASURED: self._measured, STEPPED: _stepped}
        self.filters[COMPARED] = self._compared
        self.tests |= {name: self._tested(self.tests[name]) for name in TESTS}
        self.finalize = self._written
        self._local = threading.local()

    @property
    def meter(self) -> Meter:
        """The meter of this thread's current rendering."""
        meter: Meter = self._local.meter
        return meter

    def compiled(self, source: str) -> Template:
        """A template ready to render.

        Raises:
            TemplateLimitError: it is too long.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateLimitError(f"it has {len(source):,} characters, and a template may have {MAX_SOURCE:,}")
        self._local.meter = Meter(0)
        return self.from_string(source)

    def rendered(self, template: Template, message_size: int, variables: Mapping[str, Any]) -> str:
        """The text that a template renders from variables, whose messages have `message_size` characters.

        Raises:
            TemplateLimitError: it takes too long or builds too much.
        """
        self._local.meter = Meter(message_size)
        return template.render(variables)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, method or macro for the template; it may have keyword arguments called `context` and `obj`."""
        meter: Meter = self._local.meter
        meter.step()
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps str.format
        if isinstance(owner, str | bytes | int):
            args = check_call(meter, obj.__name__, owner, args, kwargs)
        return self._measured(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator to two values."""
        meter: Meter = self._local.meter
        if type(left) is type(right) is str and operator == "+":
            meter.make(len(left) + len(right))
            return left + right
        meter.step()
        if isinstance(left, int) and isinstance(right, int):
            bits, other_bits = left.bit_length(), right.bit_length()
            meter.number(bits * max(right, 0) if operator == "**" else bits + other_bits)
        elif operator == "*" and isinstance(left, int) ^ isinstance(right, int):
            times, value = (left, right) if isinstance(left, int) else (right, left)
            meter.make(meter.size(value) * max(times, 0))
        elif operator == "+":
            lists = isinstance(left, list | tuple) and isinstance(right, list | tuple)
            meter.make(meter.size(left) + meter.size(right), ITEM_SIZE * (len(left) + len(right)) if lists else None)
        elif operator == "%" and isinstance(left, str | bytes):
            meter.make(formatted_size(meter, left, right))
        return super().call_binop(context, operator, left, right)

    def _written(self, value: Any) -> Any:
        """Measure a value that the template writes, before it is converted to text."""
        meter: Meter = self._local.meter
        meter.make(len(value) if type(value) is str else meter.size(value))
        return value

    def _joined(self, parts: Sequence[Any]) -> str:
        meter: Meter = self._local.meter
        meter.make(sum(map(meter.size, parts)))
        return "".join(map(str, parts))

    def _compared(self, value: Any) -> Any:
        """Count the step of a comparison, which may have iterated over large values."""
        self._local.meter.step()
        return value

    def _measured(self, result: Any) -> Any:
        meter: Meter = self._local.meter
        if isinstance(result, int):
            meter.number(result.bit_length())
        elif isinstance(result, str | bytes):
            meter.make(len(result))
        elif isinstance(result, Collection | Namespace):
            meter.make(meter.size(result), ITEM_SIZE * len(result) if isinstance(result, Collection) else None)
        return result

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = int(hasattr(function, "jinja_pass_arg"))  # its first argument comes from Jinja, not the template

        @functools.wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            meter: Meter = self._local.meter
            meter.step()
            value, rest = args[skipped], args[skipped + 1 :]
            if type(value) is str and not rest and not kwargs and name not in ESTIMATED:
                return self._measured(function(*args))
            if name in {"join", "sum"} and isinstance(value, Iterator):
                value = list(value)
            rest = check_call(meter, name, value, rest, kwargs)
            return self._measured(function(*args[:skipped], value, *rest, **kwargs))

        return filtered

    def _tested(self, function: Any) -> Callable[..., Any]:
        @functools.wraps(function)
        def tested(*args: Any, **kwargs: Any) -> Any:
            self._local.meter.step()
            return function(*args, **kwargs)

        return tested


class _Generator(CodeGenerator):
    """Jinja's code generator, which adds the steps to a template first."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:  # noqa: N802 - Jinja's name
        stepped = _Stepped().visit(node)
        stepped.set_environment(self.environment)
        super().visit_Template(stepped, frame)


class _Stepped(NodeTransformer):
    """Adds a step to each loop, macro and block, and passes what must be measured through one of the sandbox's own filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        if node.test is not None:  # items that the test leaves out never reach the body
            node.iter = _through(node.iter, COUNTED)
        return self._body(node)

    def _body(self, node: Any) -> nodes.Node:
        written = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        written += sum(len(part.value) for part in node.find_all(nodes.Const) if isinstance(part.value, str))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_through(nodes.Const(None), STEPPED, written)))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _body  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(nodes.Tuple(node.nodes, "load"), JOINED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        return _through(self.generic_visit(node), COMPARED)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(node, MEASURED) if isinstance(node.arg, nodes.Slice) and node.ctx == "load" else node

    def _literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        plain = all(isinstance(part, nodes.Const) for part in node.iter_child_nodes())
        stored = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if plain or stored else _through(node, MEASURED)

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815


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
