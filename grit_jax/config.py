"""The typed configuration: where a field is named, defaulted and documented.

A file in `configs/` has a `get_config()` that builds a `Config`, edits it with
`dataclasses.replace` and returns `config.to_config_dict(...)`. Flags override
it (`--config.optimizer.learning_rate=1e-5`), and `config.resolve` turns the
result once into the frozen dataclasses below, which the rest of the code reads.

Batch sizes are global. A field that is 0 (or an empty string) is off.
"""

import dataclasses
import difflib
import math
import re
import typing
from typing import Annotated, Any, Literal

import ml_collections

from grit_jax.errors import ConfigError

# Of a number that 32 bits hold: of steps, tokens, devices.
MAX_NUMBER = 2**31 - 1
# Each of them is planned: eight bytes or more, on every host.
MAX_STEPS = 10**8


@dataclasses.dataclass(frozen=True)
class Bounds:
  """What a number may be; with `open_`, the bounds themselves are excluded."""

  least: float
  most: float = MAX_NUMBER
  open_: str = ''  # '', 'least', 'most' or both, joined by a blank

  def has(self, value: float) -> bool:
    """Whether a number is within the bounds; one that is not finite is not."""
    above = value > self.least if 'least' in self.open_ else value >= self.least
    below = value < self.most if 'most' in self.open_ else value <= self.most
    return above and below

  def __str__(self) -> str:
    """Gives the interval as mathematicians write it."""
    first = '(' if 'least' in self.open_ else '['
    last = ')' if 'most' in self.open_ else ']'
    return f'{first}{self.least:.10g}, {self.most:.10g}{last}'


# Of fields. A `Count` that is 0 is a mistake, a `Size` that is 0 is off.
Count = Annotated[int, Bounds(1)]
Size = Annotated[int, Bounds(0)]
Devices = Annotated[int, Bounds(-1)]
Positive = Annotated[float, Bounds(0, 1e30, 'least')]
Weight = Annotated[float, Bounds(0, 1e30)]
Share = Annotated[float, Bounds(0, 1)]
# JAX keeps 32 bits of it.
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
ShareBelowOne = Annotated[float, Bounds(0, 1, 'most')]

PROJECTIONS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
Attention = Literal['bbcc', 'cccc', 'bccc', 'cbcc', 'bbbc']
Pooling = Literal['mean', 'weightedmean', 'cls', 'lasttoken']
Dtype = Literal['float32', 'bfloat16']
ATTENTION_MODES: tuple[str, ...] = typing.get_args(Attention)
POOLINGS: tuple[str, ...] = typing.get_args(Pooling)


def _check(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def check_fields(config: Any, group: str = '') -> None:
  """Checks the fields of a group by their types, not those of its groups.

  Raises:
    ConfigError: a value is out of bounds or no choice; the message names it.
  """
  types = typing.get_type_hints(type(config), include_extras=True)
  for name, kind in types.items():
    value, key = getattr(config, name), group + name
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
      _check(
        value in choices, f'{key}={value!r} is not one of {", ".join(choices)}.'
      )
    elif typing.get_origin(kind) is Annotated:
      bounds = choices[1]
      _check(bounds.has(value), f'{key}={value!r} is not in {bounds}.')


def parse_numbers(key: str, text: str) -> dict[str, float]:
  """Parses a number a data set, `NAME=NUMBER,NAME=NUMBER`, as a flag has it.

  Args:
    key: of the setting, for messages.
    text: its value; empty: no data set.

  Raises:
    ConfigError: an entry is malformed or negative, or a name comes twice.
  """
  numbers: dict[str, float] = {}
  for entry in text.split(',') if text else ():
    name, _, number = (part.strip() for part in entry.rpartition('='))
    try:
      value = float(number)
    except ValueError:
      value = math.nan
    _check(
      bool(name) and math.isfinite(value),
      f'{key}={text!r}: {entry!r} is not NAME=NUMBER.',
    )
    _check(value >= 0, f'{key}={text!r}: {entry!r} is negative.')
    _check(name not in numbers, f'{key}={text!r} names {name!r} twice.')
    numbers[name] = value
  return numbers


@dataclasses.dataclass(frozen=True)
class RotaryScalingConfig:
  """How rotary frequencies are scaled to longer texts than pretraining's."""

  # none; linear: all are divided by `factor` (arXiv 2306.15595). llama3: those
  # that turn less than `low_frequency_factor` times in `original_positions`
  # are, those that turn more than `high_frequency_factor` times are not, and
  # those between are blended (Llama 3.1, arXiv 2407.21783).
  kind: Literal['none', 'linear', 'llama3'] = 'none'
  factor: Annotated[float, Bounds(1)] = 1.0
  low_frequency_factor: Positive = 1.0
  high_frequency_factor: Positive = 4.0
  original_positions: Count = 8192

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    group = 'model.rotary_scaling'
    check_fields(self, f'{group}.')
    _check(
      self.high_frequency_factor > self.low_frequency_factor,
      f'{group}.high_frequency_factor={self.high_frequency_factor} must be '
      f'greater than low_frequency_factor={self.low_frequency_factor}.',
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The decoder: Mistral's, Mixtral's with experts, or Llama's."""

  # mistral or llama: the name that exports bear. The decoder is the same, but
  # rotary scaling is Llama's alone, and experts and a window are Mistral's.
  family: Literal['mistral', 'llama'] = 'mistral'

  # Token ids; 0: the tokenizer's.
  vocab_size: Size = 32000
  # 0: this and all the fields of `ARCHITECTURE` are those of `init_from`.
  embed_dim: Size = 4096
  num_layers: Count = 32
  num_heads: Count = 32
  num_kv_heads: Count = 8
  head_dim: Count = 128
  mlp_dim: Count = 14336
  # Mixtral's experts a layer, each an MLP of `mlp_dim`; 0: one MLP for all.
  num_experts: Size = 0
  experts_per_token: Count = 2
  rope_theta: Positive = 10000.0
  rotary_scaling: RotaryScalingConfig = RotaryScalingConfig()
  # Positions that a text can have; exports state it.
  max_positions: Count = 32768
  norm_epsilon: Positive = 1e-5
  # A token sees the tokens less than this far away; 0: the whole segment. The
  # reference trains Mistral without its window, and so do the recipes.
  sliding_window: Size = 0
  tie_embeddings: bool = False
  # The reference's letters, b(idirectional) or c(ausal), for embedding
  # instruction, embedding text, generative instruction, generative text.
  attention: Attention = 'bbcc'
  pooling: Pooling = 'mean'
  # Width of a linear map from the pooled state to the embedding; 0: none.
  projection_dim: Size = 0
  # Dtype of weights as stored, and of activations and gathered weights.
  param_dtype: Dtype = 'float32'
  dtype: Dtype = 'bfloat16'

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    _check(
      self.attention[3:] != 'b',
      f'model.attention={self.attention!r}: the fourth letter is the '
      'generative text; bidirectional attention there would let the loss see '
      'the answer.',
    )
    check_fields(self, 'model.')
    self._validate_architecture()

  def _validate_architecture(self) -> None:
    if not self.embed_dim:
      for name in ARCHITECTURE:
        value, default = getattr(self, name), getattr(ModelConfig, name)
        _check(
          value == default or name in ('vocab_size', 'embed_dim'),
          f'model.{name}={value!r} is set, but model.embed_dim=0 takes it from '
          'init_from. Set all of the architecture, or nothing of it.',
        )
      return
    self.rotary_scaling.validate()
    scaling = self.rotary_scaling.kind
    for key, value, family in (
      ('rotary_scaling.kind', scaling if scaling != 'none' else '', 'llama'),
      ('num_experts', self.num_experts, 'mistral'),
      ('sliding_window', self.sliding_window, 'mistral'),
    ):
      _check(
        not value or self.family == family,
        f'model.{key}={value!r} needs model.family={family!r}.',
      )
    _check(
      self.experts_per_token <= (self.num_experts or 2),
      f'model.experts_per_token={self.experts_per_token} is not in 1 to '
      f'model.num_experts={self.num_experts}.',
    )
    _check(
      self.num_heads % self.num_kv_heads == 0,
      f'model.num_heads={self.num_heads} is not a multiple of '
      f'model.num_kv_heads={self.num_kv_heads}.',
    )
    _check(
      self.head_dim % 2 == 0,
      f'model.head_dim={self.head_dim} must be even: rotary positions turn '
      'pairs of features.',
    )


# What makes the weights of a pretrained model that model.
ARCHITECTURE = (
  'family', 'vocab_size', 'embed_dim', 'num_layers', 'num_heads',
  'num_kv_heads', 'head_dim', 'mlp_dim', 'num_experts', 'experts_per_token',
  'rope_theta', 'rotary_scaling', 'max_positions', 'norm_epsilon',
  'tie_embeddings',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """L = embedding_weight * L_rep + generative_weight * L_gen (paper, eq. 3).

  A model with experts adds the terms of its router.
  """

  mode: Literal['unified', 'embedding', 'generative'] = 'unified'
  embedding_weight: Weight = 1.0
  generative_weight: Weight = 1.0
  temperature: Positive = 0.02
  # token: mean over all tokens. sample: mean over conversations of the mean
  # over their tokens. mixed: mean over groups of the mean over their tokens.
  generative_reduction: Literal['token', 'sample', 'mixed'] = 'mixed'
  # Groups of conversations for `mixed` (the recipe's 256 conversations in 8).
  mixed_groups: Count = 8
  # Of a model with experts: weights of the load-balancing loss on the rows of
  # either stream (the reference has it on generative ones, with Mixtral's
  # 0.02), and of the router's z-loss on all.
  generative_router_weight: Weight = 0.02
  embedding_router_weight: Weight = 0.0
  router_z_weight: Weight = 0.0

  @property
  def has_embedding(self) -> bool:
    """Whether a step has the embedding stream."""
    return self.mode in ('unified', 'embedding')

  @property
  def has_generative(self) -> bool:
    """Whether a step has the generative stream."""
    return self.mode in ('unified', 'generative')

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    check_fields(self, 'objective.')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where records come from, and how a step's texts become rows."""

  # Comma-separated: .jsonl files (also .gz and .zst), folders of them, folders
  # that `grit_jax.data.prepare` wrote, or `tfds:NAME[/CONFIG]`.
  paths: str = ''
  # What a faulty record does: it stops the preparation, with its place, or it
  # is skipped and counted, up to a share of its data set's records. At fault
  # is what is malformed, has fewer negatives than `num_passages` needs, an
  # instruction that leaves no room for its text, or the id of another record.
  on_error: Literal['stop', 'skip'] = 'stop'
  max_skipped_fraction: Share = 0.01
  # A sentencepiece model, or a folder with one or with a tokenizer.json; empty:
  # that of `init_from`; without it, that of the data if it is prepared, or one
  # of `tokenizer_pieces` that is trained on the data and kept in the workdir.
  tokenizer: str = ''
  tokenizer_pieces: Count = 8192
  # Where tokenized data sets are kept, on a disk; empty: `data` in the workdir,
  # which is then not on gs://.
  cache_dir: str = ''
  # A run that goes on refuses data that is not what it began with; True: it
  # goes on from the same step, with batches planned from the data as it is now.
  allow_changed: bool = False
  embedding_batch: Count = 2048  # pairs a step
  generative_batch: Count = 256  # conversations a step
  # Batches of pairs. leftovers: of one data set; what is left of each after
  # whole batches makes batches of several. none: of one data set; what is left
  # sits the epoch out. all: of all data sets. Conversations always mix.
  mixing: Literal['leftovers', 'none', 'all'] = 'leftovers'
  # A number a data set, by its name (a file's, without .jsonl): `a=2,b=0.5`.
  # An epoch takes weight times its records, 1 where none is given: with 2 each
  # twice, with 0.5 a half, and the next epoch the other half; 0 leaves it out.
  weights: str = ''
  # In the same form: the records that an epoch takes at most.
  caps: str = ''
  num_passages: Count = 2  # a query: one positive, the others hard negatives
  # sampled: anew whenever a record comes. fixed: the first ones of the record.
  # The positive is one of the record's at random in both.
  hard_negatives: Literal['sampled', 'fixed'] = 'sampled'
  # What a query's positive is compared with. all: every passage of the batch.
  # hard: the query's own hard negatives. in_batch: the positives of the other
  # queries, without hard negatives (num_passages=1).
  negatives: Literal['all', 'hard', 'in_batch'] = 'all'
  # A passage that has the text of a known positive of the query is no negative
  # of it. Known are the positives of the query's record, and of the batch's
  # records with the same query.
  mask_known_positives: bool = True
  max_query_tokens: Count = 256
  max_passage_tokens: Count = 2048
  max_generative_tokens: Count = 2048
  row_length: Count = 2048  # tokens a packed row
  max_segments: Count = 128  # texts a packed row, at most
  # Shapes that a run's steps are padded to, each compiled once. Not used with
  # `memory.chunk_rows`, where one shape fits every step.
  row_buckets: Count = 4

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    _check(bool(self.paths), 'data.paths is empty: name at least one file.')
    check_fields(self, 'data.')
    for name in (
      'max_query_tokens',
      'max_passage_tokens',
      'max_generative_tokens',
    ):
      _check(
        getattr(self, name) <= self.row_length,
        f'data.{name}={getattr(self, name)} does not fit a row of '
        f'data.row_length={self.row_length} tokens.',
      )
    _check(
      self.negatives != 'hard' or self.num_passages > 1,
      "data.negatives='hard' compares a query with its own hard negatives, but "
      f'data.num_passages={self.num_passages} takes none.',
    )
    _check(
      self.negatives != 'in_batch' or self.num_passages == 1,
      "data.negatives='in_batch' takes no hard negatives: set "
      f'data.num_passages=1, not {self.num_passages}.',
    )
    parse_numbers('data.weights', self.weights)
    for name, cap in parse_numbers('data.caps', self.caps).items():
      _check(
        cap >= 1 and cap == int(cap),
        f'data.caps={self.caps!r}: {name}={cap:g} is no number of records; a '
        'weight of 0 leaves a data set out.',
      )

  @property
  def compared_pairs(self) -> int:
    """Queries times the passages that each is compared with, none masked."""
    if self.negatives == 'hard':
      return self.embedding_batch * self.num_passages
    return self.embedding_batch**2 * self.num_passages


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its schedule, both from optax."""

  learning_rate: Positive = 2e-5
  # The first two go to 0.
  schedule: Literal['linear', 'cosine', 'constant'] = 'linear'
  warmup_fraction: ShareBelowOne = 0.03  # of the steps
  beta1: ShareBelowOne = 0.9
  beta2: ShareBelowOne = 0.999
  epsilon: Positive = 1e-8
  weight_decay: Weight = 0.0  # on matrices alone, not on norm scales
  clip_norm: Weight = 1.0  # global gradient norm; 0: no clipping
  # The second moment stays in float32: at beta2=0.999 an update is smaller
  # than half a bfloat16 step of it, so it would never change.
  first_moment_dtype: Dtype = 'float32'

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    check_fields(self, 'optimizer.')


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Adapters of rank `rank` that are trained in place of the weights.

  What `init_from` names is their base. It stays as it is: a checkpoint has the
  adapters alone, and the base's path.
  """

  rank: Size = 0  # 0: no adapters, all weights are trained
  alpha: Positive = 32.0  # what an adapter adds is times alpha / rank
  # The share of an adapter's inputs that is dropped; not of experts' adapters.
  dropout: ShareBelowOne = 0.0
  # Comma-separated; in a model with experts the last three are theirs.
  targets: str = 'q,k,v,o,gate,up,down'
  # How the base is kept. bfloat16 and float32 are for all of it. int8 and nf4
  # are for the projections of the layers, and the rest is in bfloat16: see
  # `grit_jax/models/quantization.py`.
  base: Literal['float32', 'bfloat16', 'int8', 'nf4'] = 'bfloat16'

  @property
  def target_names(self) -> tuple[str, ...]:
    """The projections that have adapters."""
    return tuple(name.strip() for name in self.targets.split(','))

  @property
  def quantization(self) -> str:
    """What the base's projections are quantised to; empty: nothing."""
    return self.base if self.base in ('int8', 'nf4') else ''

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    check_fields(self, 'lora.')
    names = self.target_names
    for name in names:
      _check(
        name in PROJECTIONS,
        f'lora.targets={name!r} is not one of {", ".join(PROJECTIONS)}.',
      )
    _check(
      len(set(names)) == len(names),
      f'lora.targets={self.targets!r} names a projection twice.',
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices an axis; one axis may be -1, which takes all that are left.

  On several TPU slices these are the devices of one, and each has a copy.
  """

  data: Devices = 1  # copies of the weights, outermost
  fsdp: Devices = -1  # weights and optimizer state are split over it
  tensor: Devices = 1  # heads, feed-forward and vocabulary are split over it
  expert: Devices = (
    1  # as `fsdp`, but experts stay apart, and tokens go to them
  )

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    check_fields(self, 'mesh.')
    sizes = dataclasses.asdict(self)
    for name, size in sizes.items():
      _check(
        size != 0,
        f'mesh.{name}={size} must be a number of devices, or -1 for the rest.',
      )
    _check(
      list(sizes.values()).count(-1) <= 1,
      'mesh: only one axis can be -1 (the devices left over), got '
      + ', '.join(f'{name}={size}' for name, size in sizes.items()),
    )


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """What trades time for memory; the loss and its gradient stay the same."""

  # What a layer keeps for its gradient. none: what its products and its
  # attention computed; the rest costs less to compute again than to keep. full:
  # its input. offload: the inputs of its two parts, in the host's memory.
  remat: Literal['none', 'full', 'offload'] = 'full'
  # Rows a chunk for gradient caching (Gao et al. 2021, arXiv 2101.06983); 0:
  # the whole batch in one pass.
  chunk_rows: Size = 0

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    check_fields(self, 'memory.')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When the state is written, and how many checkpoints are kept."""

  every_steps: Count = 100
  keep: Count = 3

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    check_fields(self, 'checkpoint.')


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """The evaluation on held-out records: before, during and after training."""

  enabled: bool = True
  # Steps from one evaluation to the next, whose figures are then among the
  # metrics, with those of the first and the last step; 0: only before and after
  # training.
  every_steps: Size = 0
  # The share of a .jsonl file's records that is held out of training. A TFDS
  # data set holds out its `test` split instead.
  held_out_fraction: ShareBelowOne = 0.05
  max_queries: Count = 1000  # held-out pairs evaluated, and candidates searched
  max_conversations: Count = 500
  rows: Count = 16  # packed rows in one call
  generated_tokens: Count = 40  # of the example answer

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    check_fields(self, 'evaluation.')
    _check(
      self.enabled or not self.every_steps,
      f'evaluation.every_steps={self.every_steps}, but evaluation.enabled is '
      'False.',
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """Which steps are traced into the folder `profile` of the workdir."""

  # A step, as 10, or a range with both its ends, as 10-15; empty: none. The
  # first steps compile.
  steps: str = ''

  def step_range(self) -> range:
    """Returns the steps, of which the run's first is 1."""
    if not self.steps:
      return range(0)
    first, _, last = self.steps.partition('-')
    return range(int(first), int(last or first) + 1)

  def validate(self) -> None:
    """Raises ConfigError naming the first field that cannot be."""
    if not self.steps:
      return
    _check(
      re.fullmatch('[0-9]+(-[0-9]+)?', self.steps) is not None,
      f'profile.steps={self.steps!r} is neither a step, as 10, nor a range, as '
      '10-15.',
    )
    steps = self.step_range()
    _check(
      len(steps) > 0 and steps[0] > 0,
      f'profile.steps={self.steps!r} has no steps: the first is 1, and a range '
      'goes upwards.',
    )


@dataclasses.dataclass(frozen=True)
class Config:
  """All of a run."""

  model: ModelConfig = ModelConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  lora: LoraConfig = LoraConfig()
  mesh: MeshConfig = MeshConfig()
  memory: MemoryConfig = MemoryConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  profile: ProfileConfig = ProfileConfig()
  # Where the weights, the architecture (see `ModelConfig.embed_dim`) and, with
  # `data.tokenizer` empty, the tokenizer are taken from: a Hugging Face folder,
  # a checkpoint, or a run's workdir. Empty: weights are drawn at random.
  init_from: str = ''
  # What computes attention; the loss and its gradient stay the same. splash: a
  # flash kernel for TPUs. xla: blocks of plain operations, on any device. auto:
  # splash on TPUs, xla elsewhere.
  attention_kernel: Literal['auto', 'splash', 'xla'] = 'auto'
  seed: Seed = 0
  steps: Annotated[int, Bounds(1, MAX_STEPS)] = 1253
  log_every: Count = 10

  def validate(self) -> None:
    """Raises ConfigError naming the first key that cannot be."""
    for field in dataclasses.fields(self):
      if dataclasses.is_dataclass(field.type):
        getattr(self, field.name).validate()
    check_fields(self)
    traced = self.profile.step_range()
    _check(
      not traced or traced[-1] <= self.steps,
      f'profile.steps={self.profile.steps!r} goes beyond steps={self.steps}.',
    )
    _check(
      not (self.lora.rank and self.lora.dropout and self.model.num_experts)
      or not {'gate', 'up', 'down'} & {*self.lora.target_names},
      f'lora.dropout={self.lora.dropout}: the adapters of experts have none. '
      f'Set it to 0, or take gate, up and down out of lora.targets.',
    )
    _check(
      bool(self.init_from or self.model.embed_dim),
      'model.embed_dim=0 takes the architecture from init_from, which is '
      'empty. Set one of the two.',
    )
    for name in (
      'max_query_tokens',
      'max_passage_tokens',
      'max_generative_tokens',
    ):
      tokens = getattr(self.data, name)
      _check(
        not self.model.embed_dim or tokens <= self.model.max_positions,
        f'data.{name}={tokens} is more than model.max_positions='
        f'{self.model.max_positions}.',
      )
    if (
      self.objective.has_generative
      and self.objective.generative_reduction == 'mixed'
    ):
      _check(
        self.data.generative_batch % self.objective.mixed_groups == 0,
        f'data.generative_batch={self.data.generative_batch} does not divide '
        f'into objective.mixed_groups={self.objective.mixed_groups} groups.',
      )


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
  """Returns the ConfigDict that flags override; its keys are `Config`'s."""
  return ml_collections.ConfigDict(dataclasses.asdict(config))


def resolve(config: ml_collections.ConfigDict) -> Config:
  """Turns a ConfigDict into a validated `Config`.

  Args:
    config: nested, with the fields of `Config` or some of them.

  Returns:
    The frozen dataclasses.

  Raises:
    ConfigError: an unknown key, a value of another type, or a value that
      cannot be; the message names the key.
  """
  resolved = _build(Config, config.to_dict(), '')
  resolved.validate()
  return resolved


def from_dict(values: dict[str, Any]) -> Config:
  """Rebuilds a configuration that was saved, such as a checkpoint's.

  Args:
    values: what `dataclasses.asdict` or JSON has of a `Config`.

  Returns:
    The dataclasses. Only the model is validated: a checkpoint that was
    converted is of no run.

  Raises:
    ConfigError: as `resolve`.
  """
  config = _build(Config, values, '')
  config.model.validate()
  return config


def _build(kind: Any, values: dict[str, Any], prefix: str) -> Any:
  types = typing.get_type_hints(kind)
  arguments = {}
  for name, value in values.items():
    key = prefix + name
    if name not in types:
      close = difflib.get_close_matches(name, types, n=1)
      hint = f' Did you mean {prefix}{close[0]}?' if close else ''
      raise ConfigError(f'{key} is not a configuration key.{hint}')
    expected: Any = types[name]
    if typing.get_origin(expected) is Literal:
      expected = str
    if dataclasses.is_dataclass(expected):
      _check(
        isinstance(value, dict), f'{key} is a group of keys, not {value!r}.'
      )
      arguments[name] = _build(expected, value, key + '.')
      continue
    if expected is float and type(value) is int:
      value = float(value)
    _check(
      type(value) is expected,
      f'{key}={value!r} is of type {type(value).__name__}, not '
      f'{expected.__name__}.',
    )
    arguments[name] = value
  return kind(**arguments)
