"""TPU topologies that the compiler knows, and the chips they are made of."""

import dataclasses
import difflib
import math
from typing import Any

from jax.experimental import topologies

from grit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU, as its maker publishes it; a JAX device is one of it, or a half.

  Attributes:
    names: of the topologies of this chip.
    hbm_gib: memory that a program can have, a device; what the compiler says
      when it is exceeded.
    petaflops: peak of bfloat16 products, a device.
    links: bytes a second that a device gets over all its links at once.
    options: of `get_topology_desc` besides the name.
    devices: of JAX, a chip.
  """

  names: tuple[str, ...]
  hbm_gib: float
  petaflops: float
  links: float
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  devices: int = 1


# Tori: a compiler that does not know of the links around lowers gathers of v5p
# to all-reduces. An axis of v5e and v6e wraps around at 16 chips alone.
_WRAP = {'wrap': (True, True, True)}

CHIPS = {
  'v4': Chip(
    ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8'),
    30.75, 0.275, 150e9,
    # One device a chip, as on the machines.
    {'chip_config_name': 'megacore', **_WRAP},
  ),
  'v5e': Chip(
    ('1x1', '2x2', '2x4', '2x8', '4x4', '4x8', '8x8', '8x16', '16x16'),
    15.75, 0.197, 100e9,
  ),
  'v5p': Chip(
    ('1x1x1', '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x2', '4x4x4', '4x4x8',
     '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16'),
    95.74, 0.459, 300e9, _WRAP,
  ),
  'v6e': Chip(
    ('1x1', '2x2', '2x4', '2x8', '4x4', '4x8', '8x8', '8x16', '16x16',
     '16x32'),
    31.25, 0.918, 224e9, _WRAP,
  ),
  'tpu7x': Chip(
    ('2x2x1', '2x2x2', '2x2x4', '4x4x2', '4x4x4'),
    94.74, 1.153, 300e9, _WRAP, devices=2,
  ),
}  # fmt: skip


def find_chip(topology: str) -> Chip:
  """Returns the chip of a topology such as `v5e:8x8`.

  Raises:
    UserError: there is none of this name.
  """
  names = [f'{chip}:{n}' for chip in CHIPS for n in CHIPS[chip].names]
  if topology not in names:
    close = difflib.get_close_matches(topology, names, n=1)
    hint = f' Did you mean {close[0]}?' if close else ''
    raise UserError(
      f'{topology!r} is not a topology.{hint} There are: {", ".join(names)}.'
    )
  return CHIPS[topology.split(':')[0]]


def count_devices(topology: str) -> int:
  """Returns the devices of one slice."""
  shape = topology.split(':')[1].split('x')
  return find_chip(topology).devices * math.prod(int(n) for n in shape)


def describe(topology: str, slices: int) -> topologies.TopologyDescription:
  """Returns the topology, with its devices, of `slices` slices."""
  options = find_chip(topology).options
  if slices > 1:
    options = options | {'num_slices': slices}
  return topologies.get_topology_desc(
    platform='tpu', topology_name=topology, **options
  )
