"""The one table of names: a Hugging Face tensor, and the weight it is.

A matrix is [out, in] there and [in, out] here; a layer's tensor is a slice of
a weight that stacks all layers; the vocabulary is padded here. Everything that
reads or writes Hugging Face names goes through `tensors`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from grit_jax.config import ModelConfig
from grit_jax.sharding import padded_vocab

# Of sentence-transformers' Dense module, in its folder of an export.
PROJECTION_FOLDER = '2_Dense'


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A row of the table.

  Attributes:
    name: The tensor's name in safetensors, `model.layers.3.mlp.up_proj.weight`.
    shape: Its shape there.
    path: The weight here, `blocks/mlp/up`.
    index: Where in the weight the tensor lies, on its first axes: (3,).
    transposed: Whether the last two axes change places.
    padded: Whether the vocabulary's axis is longer here, its end zero.
  """

  name: str
  shape: tuple[int, ...]
  path: str
  index: tuple[int, ...] = ()
  transposed: bool = False
  padded: bool = False


def tensors(model: ModelConfig) -> list[Tensor]:
  """Returns all tensors of the decoder's own files, in the model's order.

  The projection is not among them: see `projection_tensors`.
  """
  dim, mlp = model.embed_dim, model.mlp_dim
  width = model.num_heads * model.head_dim
  kv_width = model.num_kv_heads * model.head_dim
  vocabulary = (model.vocab_size, dim)
  table = [
    Tensor('model.embed_tokens.weight', vocabulary, 'embed', padded=True)
  ]
  for layer in range(model.num_layers):
    rows: list[tuple[str, tuple[int, ...], str, tuple[int, ...]]] = [
      ('input_layernorm', (dim,), 'attention_norm', (layer,)),
      ('self_attn.q_proj', (width, dim), 'attention/q', (layer,)),
      ('self_attn.k_proj', (kv_width, dim), 'attention/k', (layer,)),
      ('self_attn.v_proj', (kv_width, dim), 'attention/v', (layer,)),
      ('self_attn.o_proj', (dim, width), 'attention/o', (layer,)),
      ('post_attention_layernorm', (dim,), 'mlp_norm', (layer,)),
    ]
    if model.num_experts:
      router = 'block_sparse_moe.gate'
      rows.append((router, (model.num_experts, dim), 'moe/router', (layer,)))
    else:
      rows += [
        ('mlp.gate_proj', (mlp, dim), 'mlp/gate', (layer,)),
        ('mlp.up_proj', (mlp, dim), 'mlp/up', (layer,)),
        ('mlp.down_proj', (dim, mlp), 'mlp/down', (layer,)),
      ]
    for expert in range(model.num_experts):
      name, place = f'block_sparse_moe.experts.{expert}', (layer, expert)
      rows += [
        (f'{name}.w1', (mlp, dim), 'moe/gate', place),
        (f'{name}.w2', (dim, mlp), 'moe/down', place),
        (f'{name}.w3', (mlp, dim), 'moe/up', place),
      ]
    for name, shape, path, index in rows:
      table.append(
        Tensor(
          f'model.layers.{layer}.{name}.weight',
          shape,
          f'blocks/{path}',
          index=index,
          transposed=len(shape) == 2,
        )
      )
  table.append(Tensor('model.norm.weight', (dim,), 'final_norm'))
  if not model.tie_embeddings:
    table.append(
      Tensor('lm_head.weight', vocabulary, 'head', transposed=True, padded=True)
    )
  return table


def projection_tensors(model: ModelConfig) -> list[Tensor]:
  """Returns the tensors of `PROJECTION_FOLDER`; none without a projection."""
  if not model.projection_dim:
    return []
  shape = (model.projection_dim, model.embed_dim)
  return [
    Tensor('linear.weight', shape, 'projection', transposed=True),
    Tensor('linear.bias', shape[:1], 'projection_bias'),
  ]


def weight_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every weight that the decoder stores, by path."""
  slices: dict[str, list[Tensor]] = {}
  for tensor in [*tensors(model), *projection_tensors(model)]:
    slices.setdefault(tensor.path, []).append(tensor)
  shapes = {}
  for path, rows in slices.items():
    shape = slice_shape(rows[0], model)
    counts = tuple(
      1 + max(i) for i in zip(*(t.index for t in rows), strict=True)
    )
    if math.prod(counts) != len(rows):
      raise ValueError(f'The table has gaps in {path}.')
    shapes[path] = counts + shape
  return shapes


def slice_shape(tensor: Tensor, model: ModelConfig) -> tuple[int, ...]:
  """Returns the shape of the part of a weight that a tensor is."""
  shape = list(tensor.shape)
  if tensor.padded:
    shape[0] = padded_vocab(model)
  return tuple(reversed(shape)) if tensor.transposed else tuple(shape)


def compare(
  wanted: Iterable[Tensor], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """Returns what is wrong with the names and shapes that a folder has.

  Args:
    wanted: The table.
    found: Shapes by name.

  Returns:
    A line for each tensor that is missing, misshapen or unknown.
  """
  shapes = {tensor.name: tensor.shape for tensor in wanted}
  problems = [f'{name} is missing' for name in shapes if name not in found]
  for name, shape in found.items():
    if name not in shapes:
      problems.append(f'{name} {list(shape)} is not known')
    elif tuple(shape) != shapes[name]:
      problems.append(
        f'{name} is {list(shape)}, but the config makes it {list(shapes[name])}'
      )
  return problems
