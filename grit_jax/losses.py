"""The two losses of GRIT (arXiv 2402.09906, section 2), and the router's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from grit_jax.batch import GenerativeRows
from grit_jax.models.decoder import Decoder
from grit_jax.models.moe import RouterStatistics
from grit_jax.sharding import ROWS, platform, spec

# Tokens of a device whose logits exist at a time, by platform. Those of 1024
# tokens and a vocabulary of 32,000 are 131 MB in float32. On a CPU, in whose
# cache they should stay, 256 make a step of the quickstart a third faster.
LOGIT_TOKENS = {'tpu': 1024, 'gpu': 1024, 'cpu': 256}


def contrastive_loss(
  queries: jax.Array,
  passages: jax.Array,
  scored: jax.Array,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of each query's positive against passages (eq. 1).

  L_rep = -1/Q sum_q log(exp(s(q, p_q) / t) / sum_p exp(s(q, p) / t)), with
  the cosine s and p over the passages that q is compared with. All in float32
  and full precision: a temperature of 0.02 multiplies an error of a score by
  50.

  Args:
    queries: float32 [Q, D], of length 1.
    passages: float32 [Q, G, D], of length 1; the positive first.
    scored: bool [Q, Q * G], which passages each query is compared with; its
      own positive is one of them.
    temperature: t.

  Returns:
    The loss, and the share of queries whose positive scores highest of these.
  """
  scores = jnp.einsum(
    'qd,ngd->qng', queries, passages, precision=jax.lax.Precision.HIGHEST
  )
  scores = scores.reshape(scores.shape[0], -1) / temperature
  # A row has its positive, so its largest score is finite, and its gradient.
  scores = jnp.where(scored, scores, -jnp.inf)
  positive = jnp.arange(scores.shape[0]) * passages.shape[1]
  positive_scores = jnp.take_along_axis(scores, positive[:, None], axis=1)
  loss = jax.nn.logsumexp(scores, axis=1) - positive_scores[:, 0]
  first = jnp.argmax(scores, axis=1) == positive
  return loss.mean(), first.mean()


def next_token_loss(
  model: Decoder, hidden: jax.Array, batch: GenerativeRows
) -> jax.Array:
  """The weighted sum of next-token losses (eq. 2), float32.

  Each device scores the tokens of its rows that count, and no others,
  `LOGIT_TOKENS` at a time. A gradient is computed together with the loss: no
  logits are computed twice, and the head is gathered once.

  Args:
    model: for its head.
    hidden: [R, T, D].
    batch: the rows; `loss_weights` [R, T] weighs the prediction of a token.

  Returns:
    sum over tokens of weight * -log p(token | what precedes it). Divide by
    the sum of the weights for L_gen.
  """
  head = model.gather_head()
  # The state at t predicts the token at t + 1; a segment's first token has
  # weight 0, so nothing is predicted across a boundary.
  targets, weights = (
    jnp.pad(x, ((0, 0), (0, 1)))[:, 1:]
    for x in (batch.rows.tokens, batch.loss_weights)
  )
  with jax.named_scope('next_token_loss'):
    return _sum_losses(model.config.vocab_size, hidden, head, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_losses(
  vocab_size: int,
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
) -> jax.Array:
  """The weighted sum of the losses of all rows, float32 []."""
  return _add_up(vocab_size, (), hidden, head, targets, weights)[0]


def _forward(
  vocab_size: int, hidden: Any, head: Any, targets: Any, weights: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
  # A frozen head has no gradient.
  trained = {'hidden': hidden.perturbed, 'head': head.perturbed}
  return _add_up(
    vocab_size,
    tuple(name for name, perturbed in trained.items() if perturbed),
    *(x.value for x in (hidden, head, targets, weights)),
  )


def _backward(
  _: int, gradients: dict[str, jax.Array], cotangent: jax.Array
) -> tuple:
  scaled = {
    name: (x * cotangent).astype(x.dtype) for name, x in gradients.items()
  }
  if 'head' in scaled:
    # Each device's sum as it is, of the type that `sharding.gather` scatters.
    scaled['head'] = jax.lax.reduce_sum(
      scaled['head'],
      axes=(0,),
      out_sharding=P(*spec('embed', 'vocab'), unreduced=set(ROWS)),
    )
  return scaled.get('hidden'), scaled.get('head'), None, None


_sum_losses.defvjp(_forward, _backward, symbolic_zeros=True)


def _add_up(
  vocab_size: int,
  wanted: tuple[str, ...],
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the loss, and the gradients that are wanted.

  That by `hidden` is [R, T, D]; that by `head`, [devices, D, V], is each
  device's own, of its rows.
  """
  rows, states = spec('rows', 'seq'), spec('rows', 'seq', 'embed')
  shardings = {'hidden': states, 'head': spec('rows', 'embed', 'vocab')}
  losses, gradients = jax.shard_map(
    partial(
      _add_up_rows,
      vocab_size=vocab_size,
      wanted=wanted,
      together=LOGIT_TOKENS[platform()],
    ),
    in_specs=(states, jax.typeof(head).sharding.spec, rows, rows),
    out_specs=(spec('rows'), {name: shardings[name] for name in wanted}),
    check_vma=False,
  )(hidden, head, targets, weights)
  return losses.sum(), gradients


def _add_up_rows(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  vocab_size: int,
  wanted: tuple[str, ...],
  together: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`_add_up` on one device: tokens that count first, chunk by chunk."""
  shape, count = hidden.shape, weights.size
  hidden = hidden.reshape(count, shape[-1])
  targets, weights = targets.reshape(count), weights.reshape(count)
  size = min(together, count)
  # Behind the last token is nothing: places there take zeros, and keep none.
  places = jnp.concatenate(
    [jnp.argsort(weights == 0, stable=True), count + jnp.arange(-count % size)]
  ).reshape(-1, size)
  counted = (weights != 0).sum()

  def add(sums: tuple, places: jax.Array) -> tuple:
    total, gradients = sums
    x, target, weight = (
      array.at[places].get(mode='fill', fill_value=0)
      for array in (hidden, targets, weights)
    )
    loss, of_logits = _score(x, head, target, weight, vocab_size)
    added = {}
    if 'hidden' in wanted:
      product = jnp.einsum('tv,dv->td', of_logits, head)
      added['hidden'] = (
        gradients['hidden']
        .at[places]
        .set(product, mode='drop', unique_indices=True)
      )
    if 'head' in wanted:
      product = jnp.einsum(
        'td,tv->dv', x, of_logits, preferred_element_type=jnp.float32
      )
      added['head'] = gradients['head'] + product
    return total + loss, added

  def add_if_any_counts(sums: tuple, chunk: tuple) -> tuple[tuple, None]:
    number, places = chunk
    any_counts = number * size < counted
    return jax.lax.cond(
      any_counts, add, lambda sums, _: sums, sums, places
    ), None

  # The sum over chunks is in float32: bfloat16 would round it in every one.
  zeros = {
    name: jnp.zeros_like(hidden)
    if name == 'hidden'
    else jnp.zeros_like(head, jnp.float32)
    for name in wanted
  }
  (total, gradients), _ = jax.lax.scan(
    add_if_any_counts,
    (jnp.zeros((), jnp.float32), zeros),
    (jnp.arange(len(places)), places),
  )
  if 'hidden' in wanted:
    by_hidden = jax.lax.psum(gradients['hidden'], 'tensor')
    gradients['hidden'] = by_hidden.reshape(shape)
  if 'head' in wanted:
    gradients['head'] = gradients['head'].astype(head.dtype)[None]
  return total[None], gradients


def _score(
  x: jax.Array,
  head: jax.Array,
  target: jax.Array,
  weight: jax.Array,
  vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Scores tokens by a device's part of the vocabulary.

  Args:
    x: [t, D], the states that predict them.
    head: [D, V].
    target: int32 [t].
    weight: float32 [t].
    vocab_size: of all devices, without padding.

  Returns:
    The weighted sum of the losses, float32 [], and its gradient by the logits,
    [t, V].
  """
  logits = jnp.einsum('td,dv->tv', x, head, preferred_element_type=jnp.float32)
  first = jax.lax.axis_index('tensor') * head.shape[1]
  column = first + jnp.arange(head.shape[1])
  logits = jnp.where(column < vocab_size, logits, jnp.finfo(jnp.float32).min)
  greatest = jax.lax.pmax(logits.max(axis=1, keepdims=True), 'tensor')
  exponentials = jnp.exp(logits - greatest)
  # A sum under a mask instead of a lookup: the vocabulary may be split.
  is_target = column == target[:, None]
  denominator, target_logits = jax.lax.psum(
    (
      exponentials.sum(axis=1, keepdims=True),
      jnp.where(is_target, logits, 0.0).sum(axis=1),
    ),
    'tensor',
  )
  losses = (jnp.log(denominator) + greatest)[:, 0] - target_logits
  # Its products are in the dtype of the weights, as all others.
  of_logits = weight[:, None] * (exponentials / denominator - is_target)
  return (weight * losses).sum(), of_logits.astype(head.dtype)


def load_balancing_loss(statistics: RouterStatistics) -> jax.Array:
  """How unevenly tokens go to experts (arXiv 2101.03961, eq. 4 to 6).

  E * sum_e f_e * p_e over the tokens of all layers together, as Mixtral has it
  in transformers: f_e is how often a token chooses expert e, p_e the router's
  mean probability of it. An even spread gives the experts a token.

  Args:
    statistics: With axes [L, S].

  Returns:
    float32 [S], a stream.
  """
  total = jnp.maximum(statistics.tokens.sum(axis=0), 1.0)[:, None]
  chosen = statistics.chosen.sum(axis=0) / total
  probability = statistics.probability.sum(axis=0) / total
  return chosen.shape[-1] * (chosen * probability).sum(axis=-1)


def router_z_loss(statistics: RouterStatistics) -> jax.Array:
  """The mean squared log-normaliser of the router (arXiv 2202.08906, eq. 5).

  Args:
    statistics: With axes [L, S].

  Returns:
    float32 [S], a stream.
  """
  total = jnp.maximum(statistics.tokens.sum(axis=0), 1.0)
  return statistics.squared_normaliser.sum(axis=0) / total
