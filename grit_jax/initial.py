"""The model that a run starts from: what `init_from` names.

A Hugging Face folder or a checkpoint, of any mesh. Each process reads the
shards of its own devices alone, one weight after the other.
"""

import abc
import dataclasses
import operator
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import AbstractMesh, NamedSharding
from tqdm import tqdm

from grit_jax import config as configuration
from grit_jax.checkpoint import (
  MODEL,
  STATE,
  Checkpoint,
  CheckpointError,
  find_checkpoint,
  flatten,
  reason,
)
from grit_jax.config import ARCHITECTURE, Config, ConfigError, ModelConfig
from grit_jax.convert import keys
from grit_jax.convert.hf_folder import HfFolder
from grit_jax.data.tokenizer import Tokenizer, make_tokenizer
from grit_jax.models.decoder import Decoder
from grit_jax.models.projections import projection_axes
from grit_jax.models.quantization import put_weights, quantize_weight

PROJECTION = ('projection', 'projection_bias')


class InitialModel(abc.ABC):
  """A pretrained model on the disk.

  Attributes:
    where: Its path.
    model: Its architecture, and whether it has a projection.
    tokenizer: Its tokenizer.
  """

  where: str
  model: ModelConfig
  tokenizer: Tokenizer

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


class _CheckpointModel(InitialModel):
  def __init__(self, checkpoint: Checkpoint):
    self.where = str(checkpoint.folder)
    self.model = configuration.from_dict(checkpoint.read_config()).model
    self.tokenizer = make_tokenizer(checkpoint.read_tokenizer(), self.where)
    self._checkpoint = checkpoint
    prefix = f'{MODEL}/'
    found = {
      path.removeprefix(prefix): array.shape
      for path, array in checkpoint.types().items()
      if path.startswith(prefix)
    }
    if found != keys.weight_shapes(self.model):
      raise CheckpointError(
        f'{self.where}: the weights are not those of its configuration.'
      )

  def read(self, path, index, dtype):
    array = self._checkpoint.open_array(f'{MODEL}/{path}')
    try:
      return array[index].read().result().astype(dtype)
    except ValueError as error:
      raise CheckpointError(
        f'{self.where}: {path} cannot be read: {reason(error)}'
      ) from error


class _FolderModel(InitialModel):
  def __init__(self, folder: HfFolder):
    self.where = str(folder.path)
    self.model, self.tokenizer = folder.model, folder.tokenizer
    self._folder = folder

  def read(self, path, index, dtype):
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


def open_initial(path: epath.PathLike) -> InitialModel:
  """Opens a model by the path of its folder.

  Args:
    path: A Hugging Face folder, a checkpoint, or a run's workdir, which stands
      for its newest checkpoint.

  Raises:
    CheckpointError, ConvertError: There is no such model, or it is damaged;
      the message names what.
  """
  folder = epath.Path(path)
  if (folder / STATE).is_dir() or (folder / 'checkpoints').is_dir():
    return _CheckpointModel(find_checkpoint(folder))
  if (folder / 'config.json').exists():
    return _FolderModel(HfFolder(folder))
  raise CheckpointError(
    f'init_from={path} is neither a Hugging Face folder (with config.json) nor '
    f'a checkpoint (with {STATE}/) nor a workdir (with checkpoints/).'
  )


def take_architecture(config: Config, initial: InitialModel) -> Config:
  """Returns the config with the architecture of the model it starts from.

  Raises:
    ConfigError: the config has another one, or one that contradicts the data.
  """
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
    MeshError: What is quantised does not divide over the mesh.
  """
  abstract = jax.eval_shape(lambda: Decoder(config.model, key))
  mesh = jax.sharding.get_mesh()
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
  weights = flatten(abstract)
  axes = projection_axes(config.model) if quantization else {}
  quantized = {}
  with _show_reading(initial, weights) as progress:
    for path, x in list(weights.items()):
      weight = drawn[path] if path in drawn else _load(initial, mesh, path, x)
      if path in axes:
        quantized[path] = quantize_weight(weight, axes[path], quantization)
        # Its own bytes are free before the next one is read.
        jax.block_until_ready(quantized[path])
      else:
        weights[path] = weight
      progress.update(x.size * x.dtype.itemsize)
  structure = jax.tree.structure(abstract)
  return put_weights(jax.tree.unflatten(structure, weights.values()), quantized)


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
    MeshError: What is quantised does not divide over the mesh.
  """
  key = jax.random.key(0)
  abstract = jax.eval_shape(lambda: Decoder(config.model, key).unstack())
  mesh = jax.sharding.get_mesh()
  weights = flatten(abstract)
  axes = projection_axes(config.model) if quantization else {}
  quantized = {}
  with _show_reading(initial, weights) as progress:
    for path, x in list(weights.items()):
      weight = _load(initial, mesh, path, x)
      stacked, _ = _locate(path)
      if stacked in axes:
        one = quantize_weight(weight[None], axes[stacked], quantization)
        quantized[path] = jax.tree.map(operator.itemgetter(0), one)
        jax.block_until_ready(quantized[path])
      else:
        weights[path] = weight
      progress.update(x.size * x.dtype.itemsize)
  structure = jax.tree.structure(abstract)
  return put_weights(jax.tree.unflatten(structure, weights.values()), quantized)


def _show_reading(
  initial: InitialModel, weights: Mapping[str, jax.ShapeDtypeStruct]
) -> tqdm:
  return tqdm(
    total=sum(x.size * x.dtype.itemsize for x in weights.values()),
    desc=f'Reading {initial.where}',
    unit='B',
    unit_scale=True,
    disable=jax.process_index() != 0,
  )


def _locate(path: str) -> tuple[str, tuple[int, ...]]:
  """Returns a weight's path among stacked layers, and its layer if any."""
  first, *rest = path.split('/')
  if rest and rest[0].isdigit():
    return '/'.join([first, *rest[1:]]), (int(rest[0]),)
  return path, ()


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

  return jax.make_array_from_callback(x.shape, sharding, read)
