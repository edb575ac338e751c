"""What a chip's memory holds at the moment when most of it is used."""

import dataclasses
import pathlib
import re

from grit_jax.aot import hlo

# The memory spaces of the compiler, by its number for them.
HBM, HOST = 0, 5

# `allocation 3: size 8192000, ..., parameter 12, ...`, and below it its values,
# `value: <5110 fusion.263{1} @0> (size=734,offset=109): f32[...]...`, of which
# those of colour 0 are in HBM.
_ALLOCATION = re.compile(
  r'^allocation (\d+): size (\d+),(?: color (\d+),)?(.*)$', re.MULTILINE
)
_VALUE = re.compile(
  r'^ value: <\d+ (\S+?)(\{[\d,]*\})?(?: \(phi\))? @0> '
  r'\(size=(\d+),offset=(\d+)\)'
)
_RANGE = re.compile(r'^    (\S+?)\{([\d,]*)\}:(\d+)-(\d+)$', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class _Value:
  """An array in memory, from the place of one instruction to another's."""

  name: str
  index: str
  size: int
  where: tuple[int, int]  # allocation and offset
  start: int
  end: int


def read_totals(assignment: str) -> dict[int, int]:
  """Returns the bytes of each memory space in a buffer assignment.

  What is local to a thread, such as the arguments of a part that runs on
  another core, is another name for a buffer that counts already.
  """
  totals = {HBM: 0, HOST: 0}
  for _, size, color, kind in _ALLOCATION.findall(assignment):
    space = int(color or HBM)
    if 'thread-local' not in kind:
      totals[space] = totals.get(space, 0) + int(size)
  return totals


def read_buffers(
  assignment: str, live_ranges: str, module: hlo.Module, program: dict
) -> tuple[list[dict], float]:
  """Lists what is in HBM when most of it is used, the largest first.

  Args:
    assignment: the compiler's dump of which array is where.
    live_ranges: its dump of when.
    module: the scheduled program.
    program: what `worker` wrote of it.

  Returns:
    A dict a buffer: `name`, `array`, `gib`, `holds`, `path`; and the GiB of the
    largest logits there are at any time.
  """
  instructions = {
    instruction.name: instruction
    for computation in module.computations.values()
    for instruction in computation
  }

  def describe(value: _Value) -> dict:
    instruction = instructions.get(value.name)
    place = int(value.index.split(',')[0] or 0)
    array = None
    if instruction and place < len(instruction.result):
      array = instruction.result[place]
    path = instruction.path if instruction else ''
    return {
      'name': value.name,
      'array': str(array) if array else '',
      'gib': value.size / 2**30,
      'holds': _holds(array, path, program),
      'path': path,
    }

  values = _values(assignment, live_ranges)
  logits = [
    buffer['gib']
    for buffer in map(describe, values)
    if buffer['holds'] == 'logits'
  ]
  peak = [describe(value) for value in _peak(values)]
  peak.sort(key=lambda buffer: -buffer['gib'])
  return peak, max(logits, default=0.0)


def _values(assignment: str, live_ranges: str) -> list[_Value]:
  ranges = {
    (name, index): (int(start), int(end))
    for name, index, start, end in _RANGE.findall(live_ranges)
  }
  last = max(end for _, end in ranges.values())
  values, number, argument = [], 0, False
  for line in assignment.splitlines():
    if found := _ALLOCATION.match(line):
      number, argument = int(found[1]), ', parameter ' in found[4]
    elif found := _VALUE.match(line):
      index = (found[2] or '{}')[1:-1]
      # Arguments are there all the time, as is what replaces them. What has no
      # range is another name for something, within a part of the program.
      if argument:
        start, end = 0, last
      elif (found[1], index) in ranges:
        start, end = ranges[found[1], index]
      else:
        continue
      where = (number, int(found[4]))
      values.append(_Value(found[1], index, int(found[3]), where, start, end))
  return values


def _peak(values: list[_Value]) -> list[_Value]:
  """Returns the values that are live at the fullest moment, one a place."""
  best, most = [], 0
  live: dict[tuple, _Value] = {}
  by_start = sorted(values, key=lambda value: value.start)
  moments = sorted({value.start for value in values})
  place = 0
  for moment in moments:
    live = {w: v for w, v in live.items() if v.end >= moment}
    while place < len(by_start) and by_start[place].start == moment:
      value = by_start[place]
      held = live.get(value.where)
      # Of what shares a place, the first is what wrote it.
      if held is None or value.size > held.size:
        live[value.where] = value
      elif value.end > held.end:
        live[value.where] = dataclasses.replace(held, end=value.end)
      place += 1
    total = sum(value.size for value in live.values())
    if total > most:
      best, most = list(live.values()), total
  return best


def _holds(array: hlo.Array | None, path: str, program: dict) -> str:
  """Says what a buffer is, by where it comes from and by its shape."""
  if path.startswith('state.'):
    return 'state'
  if path.startswith('frozen.'):
    return 'frozen weights'
  if path.startswith('batch.') or array is None:
    return 'other'
  shape = _bare(array.shape)
  if shape == _bare(program['layer_inputs']):
    return 'layer inputs'
  if shape in [_bare(stored) for stored in program['stored']]:
    return 'gradients' if array.dtype == 'f32' else 'stored weights, cast'
  if shape in [_bare(whole) for whole in program['gathered']]:
    return 'gathered weights and their gradients'
  if program['vocabulary'] in shape:
    return 'logits'
  return 'activations of a layer' if 'layers' in path else 'other'


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(n for n in shape if n != 1)


def find_dump(folder: pathlib.Path, suffix: str) -> pathlib.Path | None:
  """Returns the dumped file whose name ends so, if it is there."""
  return next(iter(sorted(folder.glob(f'*{suffix}'))), None)
