"""PTX text into kernels: parameters, registers, shared and local variables, instructions, labels.

Owns the grammar. It refuses (UnsupportedError) every directive, operand and statement that it was not written for,
since a construct skipped in silence would make the interpretation worthless.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class PtxError(Exception):
    """Anything wrong with a kernel, its launch, or what it did."""


class UnsupportedError(PtxError):
    """PTX that this interpreter was not written for."""


WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8}  # bytes of .b8, .u16, .f32, ...


def type_width(kind: str) -> int:
    """Bytes of a fundamental type such as f32."""
    match = re.fullmatch(r"[busf](8|16|32|64)|(bf16)|(f16x2|bf16x2)", kind)
    if not match:
        raise UnsupportedError(f"type .{kind}")
    return WIDTHS[match[1]] if match[1] else 2 if match[2] else 4


# -- operands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    """A read-only register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Literal:
    """An integer, or the bits of a float (then `kind` is f32 or f64)."""

    value: int
    kind: str = ""


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Literal
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """`d|p`: a result and a predicate."""

    first: Register
    second: Register


@dataclass(frozen=True)
class Negated:
    """`!p`"""

    register: Register


Operand = Register | Special | Literal | Symbol | Address | Vector | Pair | Negated

SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid")


def parse_literal(text: str) -> Literal | None:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Literal(int(match[1], 16), "f32")
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Literal(int(match[1], 16), "f64")
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Literal(int(text.rstrip("U"), 0))
    return None


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: str  # predicate register, or empty
    guard_is: bool  # the value of the guard with which it runs
    line: int

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Variable:
    """A .shared or .local array. A size of 0 is `extern`: the launch decides."""

    name: str
    align: int
    size: int


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    n_parameter_bytes: int
    max_threads: int | None
    registers: dict[str, str] = field(default_factory=dict)  # name -> pred, b16, b32 or b64
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of the instruction it stands before

    def where(self, line: int) -> str:
        return f"{self.name}, line {line} of the PTX"


# -- the text -----------------------------------------------------------------------------------------------------

SPACE = re.compile(r"\s*")
TYPES = r"\.(pred|[busf](?:8|16|32|64))"
VARIABLE = re.compile(rf"\.(?:extern\s+)?\.?(shared|local)\s+(?:\.align\s+(\d+)\s+)?{TYPES}\s+([\w$]+)(?:\[(\d*)\])?")
REGISTERS = re.compile(rf"\.reg\s+{TYPES}\s+(.+)", re.DOTALL)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([busf](?:8|16|32|64))\s+([\w$]+)(?:\[(\d+)\])?")
LIMITS = re.compile(r"\.(maxntid|reqntid|minnctapersm|maxnreg)\s+([\d,\s]+)")
TOP = re.compile(
    r"\.(version|target|address_size|file)\b[^\n]*\n|(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.(global|const)\b"
)
TOP_SHARED = re.compile(r"(?:\.extern\s+|\.visible\s+|\.weak\s+)*(\.shared\b[^;]*);")
ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)*\.entry\s+([\w$]+)\s*")
FUNCTION = re.compile(r"(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.func\b")


def parse_variable(text: str) -> Variable:
    match = VARIABLE.fullmatch(text.strip().replace(".extern ", ""))
    if not match:
        raise UnsupportedError(f"variable: {text.strip()}")
    width = type_width(match[3])
    count = 1 if match[5] is None else int(match[5] or 0)
    return Variable(match[4], int(match[2] or width), width * count)


class Module:
    """One .ptx file. Kernels are parsed when asked for: a unit has many instances and a test needs few."""

    def __init__(self, text: str) -> None:
        self._text = re.sub(r"//[^\n]*", "", text)
        self._entries: dict[str, int] = {}  # name -> where its parameters begin
        self._shared: list[Variable] = []
        at = 0
        while (at := self._skip_space(at)) < len(self._text):
            if entry := ENTRY.match(self._text, at):
                self._entries[entry[1]] = entry.end()
                at = self._after_body(at)
            elif FUNCTION.match(self._text, at):  # a call of it is refused where it stands
                body, end = self._text.find("{", at), self._text.find(";", at)
                at = end + 1 if end < body or body < 0 else self._after_body(at)
            elif shared := TOP_SHARED.match(self._text, at):
                self._shared.append(parse_variable(shared[1]))
                at = shared.end()
            elif top := TOP.match(self._text, at):
                at = top.end() if top[1] else self._text.index(";", at) + 1  # tables: naming one is refused
            else:
                raise UnsupportedError(f"directive: {self._text[at : at + 80]!r}")

    def _skip_space(self, at: int) -> int:
        match = SPACE.match(self._text, at)
        return match.end() if match else at

    def _after_body(self, at: int) -> int:
        return self._text.index("\n}", at) + 2

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def find(self, pattern: str) -> Kernel:
        """The one kernel whose mangled name holds the pattern."""
        found = [name for name in self._entries if re.search(pattern, name)]
        if len(found) != 1:
            raise PtxError(f"{pattern!r} names {len(found)} kernels of {self.names}")
        return self.kernel(found[0])

    def kernel(self, name: str) -> Kernel:
        start = self._entries[name]
        header_end = self._text.index("{", start)
        return _Body(self._text, name, start, header_end, self._shared).kernel


class _Body:
    """Reads one kernel. Nested scopes (inline assembly) rename their registers."""

    def __init__(self, text: str, name: str, start: int, body: int, module_shared: list[Variable]) -> None:
        header = text[start:body].strip()
        arguments, rest = "", header
        if header.startswith("("):
            arguments, _, rest = header[1:].partition(")")
        parameters, size = self._parameters(arguments)
        limits = {}
        while rest := rest.strip():
            match = LIMITS.match(rest)
            if not match:
                raise UnsupportedError(f"directive of {name}: {rest[:60]!r}")
            limits[match[1]] = [int(number) for number in match[2].split(",")]
            rest = rest[match.end() :]
        threads = limits.get("reqntid") or limits.get("maxntid")
        max_threads = None
        if threads:
            max_threads = 1
            for extent in threads:
                max_threads *= extent
        self.kernel = Kernel(name, parameters, size, max_threads, shared=list(module_shared))
        self._scopes: list[dict[str, str]] = []
        self._n_scopes = 0
        for line, statement in self._statements(text, body):
            try:
                self._statement(statement, line)
            except UnsupportedError as error:
                raise UnsupportedError(f"{error} ({self.kernel.where(line)})") from None

    @staticmethod
    def _parameters(text: str) -> tuple[list[Parameter], int]:
        parameters, end = [], 0
        for item in filter(None, (item.strip() for item in text.split(","))):
            match = PARAMETER.fullmatch(item)
            if not match:
                raise UnsupportedError(f"parameter: {item}")
            width = type_width(match[2])
            size, align = width * int(match[4] or 1), int(match[1] or width)
            offset = -(-end // align) * align
            parameters.append(Parameter(match[3], offset, size, f"b{8 * width}" if match[4] else match[2]))
            end = offset + size
        return parameters, end

    @staticmethod
    def _statements(text: str, body: int) -> Iterator[tuple[int, str]]:
        """Each statement with its line: "{", "}", "label:", or what a semicolon ends."""
        pattern = re.compile(r"\s*(?:([{}])|([\w$]+:)(?!:)|(\.loc\b[^\n]*)\n|([^;]*);)")
        at, depth, line, counted = body, 0, text.count("\n", 0, body) + 1, body
        while match := pattern.match(text, at):
            begin = next(match.start(group) for group in (1, 2, 3, 4) if match[group] is not None)
            line, counted = line + text.count("\n", counted, begin), begin
            at = match.end()
            if match[1]:
                depth += 1 if match[1] == "{" else -1
            if not match[3]:
                yield line, match[1] or match[2] or match[4].strip()
            if depth == 0:
                return
        raise PtxError("a kernel's body does not end")

    def _statement(self, text: str, line: int) -> None:
        if text == "{":
            self._scopes.append({})
            self._n_scopes += 1
        elif text == "}":
            self._scopes.pop()
        elif text.endswith(":"):
            self.kernel.labels[text[:-1]] = len(self.kernel.instructions)
        elif match := REGISTERS.fullmatch(text):
            self._declare(match[1], match[2])
        elif text.startswith(".shared"):
            self.kernel.shared.append(parse_variable(text))
        elif text.startswith(".local"):
            self.kernel.local.append(parse_variable(text))
        elif re.fullmatch(r'\.pragma\s+"(nounroll|used_bytes_mask [x\da-fA-F]+)"', text):
            pass  # advice to ptxas
        elif text.startswith("."):
            raise UnsupportedError(f"directive: {text}")
        else:
            self.kernel.instructions.append(self._instruction(text, line))

    def _declare(self, kind: str, names: str) -> None:
        kind = kind if kind == "pred" else f"b{kind[1:]}"
        for name in (name.strip() for name in names.split(",")):
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            for written in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                unique = written if len(self._scopes) <= 1 else f"{written}@{self._n_scopes}"
                self._scopes[-1][written] = unique
                self.kernel.registers[unique] = kind

    def _register(self, text: str) -> Register | None:
        for scope in reversed(self._scopes):
            if text in scope:
                return Register(scope[text])
        return None

    def _instruction(self, text: str, line: int) -> Instruction:
        guard, guard_is = "", True
        if match := re.match(r"@(!?)(%?[\w$]+)\s+", text):
            register = self._register(match[2])
            if not register:
                raise UnsupportedError(f"guard: {text}")
            guard, guard_is, text = register.name, not match[1], text[match.end() :]
        opcode, *tail = re.split(r"\s+", text, maxsplit=1)
        rest = tail[0] if tail else ""
        items = re.findall(r"\s*((?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+)(?:,|$)", rest)
        return Instruction(opcode, tuple(self._operand(item.strip()) for item in items), guard, guard_is, line)

    def _operand(self, text: str) -> Operand:
        if register := self._register(text):
            return register
        if text.startswith("{") and text.endswith("}"):
            return Vector(tuple(self._operand(item.strip()) for item in text[1:-1].split(",")))
        if text.startswith("[") and text.endswith("]"):
            base, _, offset = text[1:-1].partition("+")
            inner, shift = self._operand(base.strip()), parse_literal(offset.strip() or "0")
            if not isinstance(inner, Register | Symbol | Literal) or shift is None:
                raise UnsupportedError(f"address: {text}")
            return Address(inner, shift.value)
        if SPECIAL.fullmatch(text):
            return Special(text)
        if literal := parse_literal(text):
            return literal
        if "|" in text:
            first, second = (self._register(part.strip()) for part in text.split("|", 1))
            if first and second:
                return Pair(first, second)
        if text.startswith("!") and (register := self._register(text[1:])):
            return Negated(register)
        if text == "WARP_SZ":
            return Literal(32)
        if re.fullmatch(r"[A-Za-z_$][\w$]*", text):
            return Symbol(text)
        raise UnsupportedError(f"operand: {text}")
