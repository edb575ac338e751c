"""What a scheduled program moves between chips, and what hides it."""

import dataclasses
import math
import re
from collections.abc import Iterator

from grit_jax.aot import hlo

# Smaller ones are counters, norms and metrics.
MIN_BYTES = 2**20

_KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
  'collective-permute', 'ragged-all-to-all',
)  # fmt: skip


@dataclasses.dataclass
class Collective:
  """One transfer of the program, as often as the program runs it.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, ...
    result: the arrays that are moved, whole: what an all-gather makes, what a
      reduce-scatter takes.
    bytes: of those.
    group: chips that take part.
    between_slices: whether the group is of several slices.
    phase: forward or backward of the layers, or elsewhere.
    path: the scopes of the source.
    asynchronous: the program goes on while it moves.
    hidden: a product or a kernel runs meanwhile.
    times: in a step.
  """

  kind: str
  result: str
  bytes: int
  group: int
  between_slices: bool
  phase: str
  path: str
  asynchronous: bool
  hidden: bool
  times: int


@dataclasses.dataclass(frozen=True)
class _Site:
  """Where a computation that is not fused runs something of a collective."""

  computation: str
  place: int
  times: int
  found: hlo.Instruction  # the collective itself
  through: str  # the innermost computation that holds it


def find_collectives(
  module: hlo.Module, loops: list[int], chips_per_slice: int, slices: int = 1
) -> list[Collective]:
  """Lists the collectives of a program, large ones first.

  Args:
    module: the scheduled program.
    loops: how often the loops run whose length the program does not know, in
      their order.
    chips_per_slice: to tell which groups go over several.
    slices: of these.
  """
  by_channel: dict[str, list[_Site]] = {}
  for site in _sites(module, loops):
    channel = site.found.attribute(r'channel_id=(\d+)') or site.found.name
    by_channel.setdefault(channel, []).append(site)
  found = [
    _describe(module, sites, chips_per_slice, slices)
    for shared in by_channel.values()
    for sites in _part(shared)
  ]
  found = [each for each in found if each.bytes >= MIN_BYTES]
  return sorted(found, key=lambda each: -each.bytes * each.times)


def _part(sites: list[_Site]) -> list[list[_Site]]:
  """Parts the sites of one channel into those of each collective.

  The pieces of an asynchronous one share its channel. But all those of a
  `shard_map`, and some copies that the compiler makes, have the channel 1.
  """
  kinds = {
    (_kind(site.found), *((x.dtype, x.shape) for x in site.found.result))
    for site in sites
  }
  if len(kinds) == 1:
    return [sites]
  by_name: dict[str, list[_Site]] = {}
  for site in sites:
    by_name.setdefault(site.found.name, []).append(site)
  return list(by_name.values())


def _kind(instruction: hlo.Instruction) -> str:
  """Returns the kind of collective that an instruction is; empty: none."""
  if _is_between_slices(instruction):
    return 'all-reduce'
  kind = instruction.opcode.removesuffix('-start')
  return kind if kind in _KINDS else ''


def _is_between_slices(instruction: hlo.Instruction) -> bool:
  """Whether it sends to the other slices what they add up to."""
  if instruction.opcode != 'send':
    return False
  return '_xla_megascale_reduce_operation' in instruction.attributes


def _sites(module: hlo.Module, loops: list[int]) -> Iterator[_Site]:
  """Walks the computations that run in order: the entry's and loops' bodies."""
  unknown = iter(loops)

  def walk(name: str, times: int) -> Iterator[_Site]:
    for place, instruction in enumerate(module.computations[name]):
      if instruction.opcode == 'while':
        trips = hlo.trip_count(module, instruction)
        # A loop in a loop that runs as often as its data say: at least once.
        trips = trips or (next(unknown, 1) if times == 1 else 1)
        body = instruction.attribute(r'body=%?([\w.\-]+)')
        yield from walk(body, times * trips)
      elif instruction.opcode == 'conditional':
        for branch in re.findall(r'%([\w.\-]+)', instruction.attributes):
          if branch in module.computations:
            yield from walk(branch, times)
      elif _kind(instruction):
        yield _Site(name, place, times, instruction, name)
      else:
        for called in instruction.calls:
          for through, inner in _within(module, called):
            yield _Site(name, place, times, inner, through)

  yield from walk(module.entry, 1)


def _within(
  module: hlo.Module, name: str
) -> Iterator[tuple[str, hlo.Instruction]]:
  for instruction in module.computations.get(name, ()):
    if _kind(instruction):
      yield name, instruction
    for called in instruction.calls:
      yield from _within(module, called)


def _describe(
  module: hlo.Module, sites: list[_Site], chips_per_slice: int, slices: int
) -> Collective:
  first, last = sites[0], sites[-1]
  instruction = first.found
  kind = _kind(instruction)
  arrays = instruction.result
  if instruction.opcode.endswith('-start'):
    arrays = arrays[len(arrays) // 2 :][:1]
  elif _is_between_slices(instruction):
    arrays = arrays[:1]
  size = sum(array.bytes for array in arrays)
  shown = ' '.join(map(str, arrays))
  group, between = _group(instruction, chips_per_slice)
  if _is_between_slices(instruction):
    group, between = slices, True
  if kind == 'reduce-scatter':
    size *= group
    shown += f' of {group}'
  elif kind == 'all-reduce' and 'all-reduce-scatter' in first.through:
    # The compiler's fused form of it: the sum, of which each keeps its shard.
    kind = 'reduce-scatter'
  start, end = _span(module, first, last)
  body = module.computations[first.computation]
  return Collective(
    kind=kind,
    result=shown,
    bytes=size,
    group=group,
    between_slices=between,
    phase=_phase(instruction, first, module),
    path=instruction.path,
    asynchronous=end > start,
    hidden=any(_works(module, each) for each in body[start + 1 : end]),
    times=first.times,
  )


def _span(module: hlo.Module, first: _Site, last: _Site) -> tuple[int, int]:
  """Returns the places where a collective begins and where it is done."""
  body = module.computations[first.computation]
  start = body[first.place]
  if first.computation != last.computation:
    return first.place, first.place
  if last.place > first.place:
    return first.place, last.place
  if not start.opcode.endswith(('-start', 'send')):
    return first.place, first.place
  # An update stands between some starts and their done.
  name = start.name
  for place in range(first.place + 1, len(body)):
    if name in body[place].operands:
      if body[place].opcode.endswith('-done'):
        return first.place, place
      name = body[place].name
  return first.place, first.place


def _works(module: hlo.Module, instruction: hlo.Instruction) -> bool:
  """Whether an instruction is a product, or a kernel."""
  if is_kernel(instruction):
    return True
  if instruction.opcode in ('convolution', 'dot'):
    return True
  return instruction.opcode == 'fusion' and any(
    inner.opcode in ('convolution', 'dot')
    for called in instruction.calls
    for inner in module.reach(called)
  )


def is_kernel(instruction: hlo.Instruction) -> bool:
  """Whether it is a kernel that was written for the chip (Mosaic)."""
  return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def _group(
  instruction: hlo.Instruction, chips_per_slice: int
) -> tuple[int, bool]:
  """Returns the chips in a group, and whether they are of several slices."""
  text = instruction.attribute(r'replica_groups=(.*?), \w+=')
  if listed := re.match(r'\{\{([\d,]+)\}', text):
    members = [int(n) for n in listed[1].split(',')]
  else:
    members = _iota_group(text)
  return len(members), len({n // chips_per_slice for n in members}) > 1


def _iota_group(text: str) -> list[int]:
  """Returns the first group of `[2,3]<=[3,2]T(1,0)` or a named mesh's axes.

  A named one is `mesh['a'=2,'b'=32] {'b'}`, its devices in order.
  """
  if text.startswith('mesh'):
    names = re.findall(r"'(\w+)'=(\d+)", text)
    split = re.findall(r"'(\w+)'", text[text.index('{') :])
    members = [0]
    stride = 1
    for name, size in reversed(names):
      if name in split:
        members = [m + stride * n for n in range(int(size)) for m in members]
      stride *= int(size)
    return members
  found = re.match(r'\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if not found:
    return [0]
  dims = [int(n) for n in found[3].split(',')]
  order = [int(n) for n in (found[4] or '').split(',') if n]
  order = order or list(range(len(dims)))
  strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
  members = [0]
  for axis in order:
    members = [
      m + strides[axis] * n for m in members for n in range(dims[axis])
    ]
  return members[: int(found[2])]


def _phase(
  instruction: hlo.Instruction, site: _Site, module: hlo.Module
) -> str:
  """Says in which part of the step a collective is."""
  path = instruction.path
  if site.computation == module.entry:
    return 'elsewhere'
  if 'layers' not in path:
    # What the compiler makes of several has no scope: its neighbours have.
    paths = [each.path for each in module.computations[site.computation]]
    path = max(paths, key=lambda path: 'layers' in path, default='')
  if 'layers' not in path:
    return 'elsewhere'
  return 'backward' if 'transpose(' in path else 'forward'
