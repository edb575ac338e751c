"""Reads a scheduled program that the compiler dumped as text."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {
  'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4,
  's64': 8, 'u64': 8, 'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8,
}  # fmt: skip
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = ')
_COMMENT = re.compile(r'/\*.*?\*/')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's result."""

  dtype: str
  shape: tuple[int, ...]
  space: str  # '' is HBM; S(1) is fast memory, S(5) the host's

  @property
  def bytes(self) -> int:
    """Its size, without what a layout pads."""
    return _BYTES.get(self.dtype, 4) * math.prod(self.shape)

  def __str__(self) -> str:
    """As the compiler writes it."""
    return f'{self.dtype}[{",".join(map(str, self.shape))}]'


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation."""

  name: str
  opcode: str
  result: tuple[Array, ...]
  arguments: str  # operands, or the value of a constant, as it stands
  attributes: str  # what follows the operands, as it stands

  def attribute(self, pattern: str) -> str:
    """Returns what the group of a pattern matches; empty: nothing."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else ''

  @property
  def operands(self) -> list[str]:
    """The names of the instructions that it reads."""
    return re.findall(r'%([\w.\-]+)', self.arguments)

  @property
  def path(self) -> str:
    """The scopes of the source that it comes from."""
    return self.attribute(r'op_name="([^"]*)"')

  @property
  def calls(self) -> list[str]:
    """The computations that it runs, but for a reduction's."""
    one = r'(?:calls|body|condition|to_apply)=%?([\w.\-]+)'
    several = self.attribute(r'called_computations=\{([^}]*)\}')
    return re.findall(one, self.attributes) + re.findall(
      r'%([\w.\-]+)', several
    )


Computation = list[Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: its computations by name, and which is the first."""

  computations: dict[str, Computation]
  entry: str

  def reach(self, name: str) -> Iterator[Instruction]:
    """Yields the instructions of a computation and of all that it calls."""
    seen, todo = set(), [name]
    while todo:
      name = todo.pop()
      if name in seen or name not in self.computations:
        continue
      seen.add(name)
      for instruction in self.computations[name]:
        yield instruction
        todo += instruction.calls


def parse(text: str) -> Module:
  """Reads a module."""
  computations: dict[str, list[Instruction]] = {}
  entry, current = '', None
  for line in _lines(text):
    header = None if line.startswith(' ') else _HEADER.match(line)
    if header:
      current = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current.append(_instruction(found[1], line[found.end() :]))
  return Module(computations, entry)


def _lines(text: str) -> Iterator[str]:
  """Yields lines, those that a kernel's metadata breaks made whole."""
  whole = ''
  for line in text.splitlines():
    if whole and (line.startswith(('"', '}}'))):
      whole += line
      continue
    yield whole
    whole = line
  yield whole


def _instruction(name: str, text: str) -> Instruction:
  text = _COMMENT.sub('', text)
  end = _closing(text, 0) if text.startswith('(') else text.index(' ')
  opening = text.index('(', end)
  closing = _closing(text, opening)
  arrays = tuple(
    Array(
      dtype,
      tuple(int(n) for n in shape.split(',') if n),
      (re.findall(r'S\(\d+\)', layout) or [''])[0],
    )
    for dtype, shape, layout in _ARRAY.findall(text[:end])
  )
  return Instruction(
    name,
    text[end:opening].strip(),
    arrays,
    text[opening + 1 : closing - 1],
    text[closing:],
  )


def _closing(text: str, start: int) -> int:
  """Returns the place after the bracket that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[place], 0)
    if not depth:
      return place + 1
  return len(text)


def trip_count(module: Module, loop: Instruction) -> int | None:
  """Returns how often a while loop runs; None: the program alone knows.

  A loop of fixed length compares its counter with its only constant.
  """
  condition = loop.attribute(r'condition=%?([\w.\-]+)')
  constants = [
    int(instruction.arguments)
    for instruction in module.reach(condition)
    if instruction.opcode == 'constant'
    and instruction.result[0].dtype in ('s32', 'u32')
  ]
  return constants[0] if len(constants) == 1 else None
