"""The model that a run starts from: what `init_from` names.

A Hugging Face folder or a checkpoint, of any mesh. Each process reads the
shards of its own devices alone, one weight after the other. A checkpoint of
adapters is read as one of its base with them added.
"""

import abc
import dataclasses
import hashlib
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import AbstractMesh, NamedSharding
from tqdm import tqdm

from grit_jax import config as configuration
from grit_jax import processes
from grit_jax.checkpoint import (
  MODEL,
  STATE,
  Checkpoint,
  absolute,
  find_checkpoint,
  flatten,
)
from grit_jax.config import ARCHITECTURE, Config, ModelConfig
from grit_jax.convert import keys
from grit_jax.convert.hf_folder import HfFolder
from grit_jax.convert.streamed import SOURCE
from grit_jax.data.tokenizer import Tokenizer, make_tokenizer
from grit_jax.errors import ConfigError, UserError
from grit_jax.files import check_checksums, check_keys, check_place
from grit_jax.models.decoder import Decoder
from grit_jax.models.lora import (
  adapter_path,
  adapter_shapes,
  add_adapters,
  base_model,
  join_trained,
  split_trained,
  target_axes,
)
from grit_jax.models.projections import projection_axes
from grit_jax.models.quantization import put_weights, quantize_weight

PROJECTION = ('projection', 'projection_bias')
# Weights of a matrix that a fingerprint is made of, at most.
_SAMPLE = 1 << 18


class InitialModel(abc.ABC):
  """A pretrained model on the disk.

  Attributes:
    where: Its path.
    model: Its architecture, and whether it has a projection.
    tokenizer: Its tokenizer.
    dtype: Of its weights as stored, float32 or bfloat16.
    has_head: Whether it can generate.
  """

  where: str
  has_head = True
  model: ModelConfig
  tokenizer: Tokenizer
  dtype: str

  @abc.abstractmethod
  def read(
    self, path: str, index: tuple[slice, ...], dtype: np.dtype
  ) -> np.ndarray:
    """Reads a part of a weight.

    Args:
      path: The weight, `blocks/mlp/up`.
      index: The part, a slice of step 1 an axis, with its bounds.
      dtype: To return it in.

    Returns:
      The part, in the decoder's own layout.
    """

  @abc.abstractmethod
  def verify(self) -> None:
    """Reads all weights once, if they have checksums, and compares those.

    Raises:
      UserError: A weight is damaged.
    """

  def fingerprint(self) -> str:
    """Returns what tells this model from others, on any disk or mesh.

    A hash of its configuration, its tokenizer and, in float32, the norms and
    some rows of every matrix of the first, the middle and the last layer. What
    lies beside its files is no part of it, nor the dtype that they are stored
    in.
    """
    fields = {
      name: value
      for name, value in dataclasses.asdict(self.model).items()
      if name not in ('param_dtype', 'dtype')
    }
    described = json.dumps([fields, self.tokenizer.fingerprint], sort_keys=True)
    digest = hashlib.sha256(described.encode())
    layers = self.model.num_layers
    for path, shape in sorted(keys.weight_shapes(self.model).items()):
      digest.update(f'{path} {shape}'.encode())
      small = path.endswith(('norm', 'bias'))
      rows = shape[-2:-1] if not small else ()
      leading = [0] * (len(shape) - 2) if not small else []
      starts: list[list[int]] = [[]]
      if leading:
        starts = [
          [layer, *leading[1:]]
          for layer in sorted({0, layers // 2, layers - 1})
        ]
      for start in starts:
        index = [slice(i, i + 1) for i in start]
        for size in rows:
          count = min(max(_SAMPLE // shape[-1], 1), size)
          first = (size - count) // 2
          index.append(slice(first, first + count))
        index += [slice(0, size) for size in shape[len(index) :]]
        digest.update(
          self.read(path, tuple(index), np.dtype('float32')).tobytes()
        )
    return digest.hexdigest()

  def checksums(self) -> dict[str, str]:
    """Returns the SHA-256 of the files of weights, by name.

    They are of a Hugging Face folder, or of the one that a checkpoint was
    converted from; a run's checkpoint has none.

    Raises:
      UserError: An export was changed since it was written.
    """
    return {}


class _CheckpointModel(InitialModel):
  def __init__(self, checkpoint: Checkpoint):
    self.where = str(checkpoint.folder)
    self.model = configuration.from_dict(checkpoint.read_config()).model
    self.tokenizer = make_tokenizer(checkpoint.read_tokenizer(), self.where)
    self._checkpoint = checkpoint
    check_size(checkpoint, self.model)
    found = _find_arrays(checkpoint, keys.weight_shapes(self.model))
    self.dtype = str(found['final_norm'].dtype)

  def verify(self) -> None:
    """See the base class."""
    self._checkpoint.verify()

  def read(
    self, path: str, index: tuple[slice, ...], dtype: np.dtype
  ) -> np.ndarray:
    part = self._checkpoint.read_array(f'{MODEL}/{path}', index)
    return part.astype(dtype)

  def checksums(self) -> dict[str, str]:
    return _of_weights(self._checkpoint.fingerprints.get(SOURCE, {}))


def _of_weights(checksums: dict[str, str]) -> dict[str, str]:
  return {
    name: digest
    for name, digest in checksums.items()
    if name.endswith('.safetensors')
  }


class AdaptedModel(InitialModel):
  """A base with the adapters of a run's checkpoint, read as if merged.

  Attributes:
    config: The run's.
    base: The model that the adapters are for.
    adapters: The checkpoint that has them.
  """

  def __init__(
    self, checkpoint: Checkpoint, above: tuple[epath.Path, ...] = ()
  ):
    """Opens a checkpoint of adapters and, where that says, its base.

    Args:
      checkpoint: Of adapters.
      above: See `open_initial`.

    Raises:
      UserError: One of them is missing or damaged, or the
        base is another model than the one that the adapters were trained on.
    """
    self.where = str(checkpoint.folder)
    self.config = configuration.from_dict(checkpoint.read_config())
    self.model, self.adapters = self.config.model, checkpoint
    self.tokenizer = make_tokenizer(checkpoint.read_tokenizer(), self.where)
    if checkpoint.folder in above:
      raise UserError(f'{self.where}: the adapters are their own base.')
    base = read_base(checkpoint)['init_from']
    self.base = open_initial(base, (*above, checkpoint.folder))
    self.dtype, self.has_head = self.base.dtype, self.base.has_head
    check_base(checkpoint, self.base)
    self._targets = target_axes(self.model, self.config.lora)
    _find_arrays(checkpoint, adapter_shapes(self.model, self.config.lora))

  def verify(self) -> None:
    """See the base class."""
    self.base.verify()
    self.adapters.verify()

  def read(
    self, path: str, index: tuple[slice, ...], dtype: np.dtype
  ) -> np.ndarray:
    """Reads a part of a weight, with what its adapter adds; in float32."""
    if path not in self._targets:
      return self.base.read(path, index, dtype)
    part = np.empty([s.stop - s.start for s in index], dtype)
    leading = index[:-2]
    scale = self.config.lora.alpha / self.config.lora.rank
    # A layer, and an expert, at a time: of no more is there a float32.
    for place in np.ndindex(part.shape[: len(leading)]):
      own = tuple(
        slice(s.start + i, s.start + i + 1)
        for i, s in zip(place, leading, strict=True)
      )
      weight = self.base.read(path, own + index[-2:], np.dtype('float32'))
      a = self.read_factor(path, 'a', own)[..., index[-2], :]
      b = self.read_factor(path, 'b', own)[..., index[-1], :]
      weight += np.float32(scale) * (a @ np.swapaxes(b, -1, -2))
      part[place] = weight[(0,) * len(leading)].astype(dtype)
    return part

  def read_factor(
    self, path: str, factor: str, leading: tuple[slice, ...]
  ) -> np.ndarray:
    """Reads a factor of a projection's adapter; see `lora.Adapter`.

    Args:
      path: The projection, `blocks/attention/q`.
      factor: a or b.
      leading: A slice an axis of layers, and of experts.
    """
    name = f'{MODEL}/{adapter_path(path, factor)}'
    return self.adapters.read_array(name, leading)

  def checksums(self) -> dict[str, str]:
    """Returns those of the base."""
    return self.base.checksums()


def describe_base(base: InitialModel) -> dict[str, Any]:
  """Returns what a checkpoint of adapters says of their base."""
  return {
    'init_from': str(absolute(base.where)),
    'fingerprint': base.fingerprint(),
    'files': base.checksums(),
  }


def find_change(
  initial: InitialModel, fingerprint: str, checksums: dict[str, str]
) -> str:
  """Returns what differs of a model from what it was; empty: nothing.

  Args:
    initial: The model as it is.
    fingerprint: What `fingerprint` returned of it.
    checksums: What `checksums` returned of it. Files of other names, as of
      another conversion, are not compared.
  """
  if initial.fingerprint() != fingerprint:
    return 'other weights, another configuration or another tokenizer'
  for name, digest in initial.checksums().items():
    if checksums.get(name, digest) != digest:
      return f'another content of {name}'
  return ''


def read_base(checkpoint: Checkpoint) -> dict[str, Any]:
  """Returns what `describe_base` gave when a checkpoint was saved.

  Raises:
    UserError: It is damaged.
  """
  where = f'{checkpoint.folder}: the item base'
  return check_keys(
    checkpoint.read_base(), where, init_from=str, fingerprint=str, files=dict
  )


def check_base(checkpoint: Checkpoint, base: InitialModel) -> None:
  """Checks that a checkpoint's adapters are for a base.

  Raises:
    UserError: They are for another one.
  """
  named = read_base(checkpoint)
  change = find_change(base, named['fingerprint'], named['files'])
  if change:
    raise UserError(
      f'{checkpoint.folder} has adapters of {named["init_from"]}, and '
      f'{base.where} has {change} than that had.'
    )


def check_size(checkpoint: Checkpoint, model: ModelConfig) -> None:
  """Refuses a configuration of more layers than the arrays have.

  The shapes of a billion layers would take hours and all of the memory.

  Raises:
    UserError: the arrays contradict the configuration.
  """
  sizes = [
    array.shape
    for path, array in checkpoint.types().items()
    if path.startswith(f'{MODEL}/blocks/')
  ]
  layers = {shape[:1] for shape in sizes}
  largest = max((math.prod(shape) for shape in sizes), default=0)
  if layers != {(model.num_layers,)} or model.num_experts > largest:
    raise UserError(
      f'{checkpoint.folder}: the weights are not those of its configuration, '
      f'which has model.num_layers={model.num_layers}.'
    )


def _find_arrays(
  checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the types of the model's arrays, which are as wanted."""
  prefix = f'{MODEL}/'
  found = {
    path.removeprefix(prefix): array
    for path, array in checkpoint.types().items()
    if path.startswith(prefix)
  }
  if {path: array.shape for path, array in found.items()} != wanted:
    raise UserError(
      f'{checkpoint.folder}: the weights are not those of its configuration.'
    )
  return found


class _FolderModel(InitialModel):
  def __init__(self, folder: HfFolder):
    self.where = str(folder.path)
    self.model, self.tokenizer = folder.model, folder.tokenizer
    self.dtype, self.has_head = folder.dtype, folder.has_head
    self._folder = folder

  def verify(self) -> None:
    """See the base class; our exports have checksums."""
    if processes.is_first():
      check_checksums(self._folder.path)

  def read(
    self, path: str, index: tuple[slice, ...], dtype: np.dtype
  ) -> np.ndarray:
    part = np.empty([s.stop - s.start for s in index], dtype)
    for tensor in self._folder.tensors:
      leading = len(tensor.index)
      if tensor.path != path or not all(
        s.start <= i < s.stop
        for i, s in zip(tensor.index, index[:leading], strict=True)
      ):
        continue
      place = tuple(
        i - s.start for i, s in zip(tensor.index, index[:leading], strict=True)
      )
      part[place] = self._folder.read(tensor, index[leading:])
    return part

  def checksums(self) -> dict[str, str]:
    return _of_weights(self._folder.checksums())


def open_initial(
  path: epath.PathLike, above: tuple[epath.Path, ...] = ()
) -> InitialModel:
  """Opens a model by the path of its folder.

  Args:
    path: A Hugging Face folder, a checkpoint, or a run's workdir, which stands
      for its newest checkpoint.
    above: The checkpoints of adapters that it is the base of.

  Raises:
    UserError: There is no such model, or it is damaged;
      the message names what.
  """
  check_place(path)
  folder = epath.Path(path)
  if (folder / STATE).is_dir() or (folder / 'checkpoints').is_dir():
    checkpoint = find_checkpoint(folder)
    if checkpoint.has_base():
      return AdaptedModel(checkpoint, above)
    return _CheckpointModel(checkpoint)
  if (folder / 'config.json').exists():
    return _FolderModel(HfFolder(folder))
  raise UserError(
    f'{path} is neither a Hugging Face folder (with config.json) nor '
    f'a checkpoint (with {STATE}/) nor a workdir (with checkpoints/).'
  )


def take_architecture(config: Config, initial: InitialModel) -> Config:
  """Returns the config with the architecture of the model it starts from.

  Raises:
    ConfigError: the config has another one, or one that contradicts the data,
      or an objective that needs the head that the model lacks.
  """
  if config.objective.has_generative and not initial.has_head:
    raise ConfigError(
      f'objective.mode={config.objective.mode}: {initial.where} has no head '
      '(lm_head.weight), and can be trained to embed alone.'
    )
  model, source = config.model, initial.model
  differences = [
    f'model.{name}={getattr(model, name)!r}, there {getattr(source, name)!r}'
    for name in ARCHITECTURE
    if model.embed_dim
    and getattr(model, name) != getattr(source, name)
    and not (name == 'vocab_size' and not model.vocab_size)
  ]
  if differences:
    raise ConfigError(
      f'init_from={initial.where} is another model than the configuration: '
      f'{"; ".join(differences)}. model=presets.of_init_from() takes the '
      'architecture from there.'
    )
  if source.projection_dim not in (0, model.projection_dim):
    raise ConfigError(
      f'model.projection_dim={model.projection_dim}, but init_from='
      f'{initial.where} has a projection to {source.projection_dim} dimensions.'
    )
  taken = {name: getattr(source, name) for name in ARCHITECTURE}
  config = dataclasses.replace(
    config, model=dataclasses.replace(model, **taken)
  )
  config.validate()
  return config


def load_model(
  config: Config,
  initial: InitialModel,
  key: jax.Array,
  quantization: str = '',
) -> Decoder:
  """Reads the weights onto the current mesh.

  Args:
    config: After `take_architecture`.
    initial: What to read.
    key: For what the model has not, a projection.
    quantization: Empty, or one of `quantization.KINDS`. The layers' weights are
      quantised as they are read, one after the other: no more than one of them,
      of all layers, is there in `config.model.param_dtype`.

  Returns:
    The decoder, in `config.model.param_dtype` but for what is quantised.

  Raises:
    UserError: What is quantised does not divide over the mesh.
  """
  abstract = jax.eval_shape(lambda: Decoder(config.model, key))
  drawn = {}
  if config.model.projection_dim and not initial.model.projection_dim:
    logging.info('The projection is new: drawn at random.')
    names = set(PROJECTION)
    drawn = jax.jit(
      lambda key: {
        path: value
        for path, value in flatten(Decoder(config.model, key)).items()
        if path in names
      }
    )(key)
  return _read_all(initial, abstract, drawn, quantization)


def load_unstacked(
  config: Config, initial: InitialModel, quantization: str = ''
) -> Decoder:
  """Reads the weights as `Decoder.unstack` gives them, layer by layer.

  Args:
    config: With the architecture of `initial`, and its projection.
    initial: What to read.
    quantization: As of `load_model`.

  Returns:
    The decoder, in `config.model.param_dtype` but for what is quantised.

  Raises:
    UserError: What is quantised does not divide over the mesh.
  """
  key = jax.random.key(0)
  abstract = jax.eval_shape(lambda: Decoder(config.model, key).unstack())
  return _read_all(initial, abstract, {}, quantization)


def _read_all(
  initial: InitialModel,
  abstract: Decoder,
  drawn: Mapping[str, jax.Array],
  quantization: str,
) -> Decoder:
  """Reads the weights of `abstract`, but those that are drawn."""
  initial.verify()
  mesh = jax.sharding.get_mesh()
  weights = flatten(abstract)
  axes = projection_axes(abstract.config) if quantization else {}
  quantized = {}
  progress = tqdm(
    total=sum(x.size * x.dtype.itemsize for x in weights.values()),
    desc=f'Reading {initial.where}',
    unit='B',
    unit_scale=True,
    disable=jax.process_index() != 0,
  )
  with progress:
    for path, x in list(weights.items()):
      weight = drawn[path] if path in drawn else _load(initial, mesh, path, x)
      stacked, layer = _locate(path)
      if stacked in axes:
        if layer:
          weight = weight[None]
        found = quantize_weight(weight, axes[stacked], quantization)
        if layer:
          found = jax.tree.map(operator.itemgetter(0), found)
        # Its own bytes are free before the next one is read.
        quantized[path] = jax.block_until_ready(found)
      else:
        weights[path] = weight
      progress.update(x.size * x.dtype.itemsize)
  structure = jax.tree.structure(abstract)
  return put_weights(jax.tree.unflatten(structure, weights.values()), quantized)


def _locate(path: str) -> tuple[str, tuple[int, ...]]:
  """Returns a weight's path among stacked layers, and its layer if any."""
  first, *rest = path.split('/')
  if rest and rest[0].isdigit():
    return '/'.join([first, *rest[1:]]), (int(rest[0]),)
  return path, ()


def load_base(config: Config, initial: InitialModel, key: jax.Array) -> Decoder:
  """Reads what adapters are for, as `config.lora.base` says, without them.

  Raises:
    ConfigError: The config has a projection, and the base has none: it would
      stay as it is drawn.
  """
  if config.model.projection_dim and not initial.model.projection_dim:
    raise ConfigError(
      f'model.projection_dim={config.model.projection_dim}, but '
      f'{initial.where} has no projection, and with '
      f'lora.rank={config.lora.rank} a new one would not be trained.'
    )
  config = dataclasses.replace(config, model=base_model(config))
  return load_model(config, initial, key, config.lora.quantization)


def load_unmerged(initial: AdaptedModel) -> Decoder:
  """Reads a run's base, as it had it, and its adapters beside the weights."""
  config, key = initial.config, jax.random.key(0)
  base = load_base(config, initial.base, key)
  trained, frozen = split_trained(add_adapters(base, config.lora, key))
  restored = initial.adapters.restore({MODEL: jax.eval_shape(lambda: trained)})
  return join_trained(restored[MODEL], frozen)


def _load(
  initial: InitialModel,
  mesh: jax.sharding.Mesh,
  path: str,
  x: jax.ShapeDtypeStruct,
) -> jax.Array:
  """Reads one weight; devices that hold the same part share one reading."""
  sharding = x.sharding
  if sharding is None or isinstance(sharding.mesh, AbstractMesh):
    spec = jax.P() if sharding is None else sharding.spec
    sharding = NamedSharding(mesh, spec)
  parts: dict[tuple, np.ndarray] = {}

  def read(index: tuple[slice, ...]) -> np.ndarray:
    bounds = tuple(
      slice(*s.indices(size)[:2])
      for s, size in zip(index, x.shape, strict=True)
    )
    key = tuple((s.start, s.stop) for s in bounds)
    if key not in parts:
      stacked, layer = _locate(path)
      bounds = (*(slice(i, i + 1) for i in layer), *bounds)
      part = initial.read(stacked, bounds, np.dtype(x.dtype))
      parts[key] = part[0] if layer else part
    return parts[key]

  # JAX's types allow for an index None, which no shard of an array has.
  return jax.make_array_from_callback(x.shape, sharding, read)  # type: ignore[arg-type]
