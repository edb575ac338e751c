"""The two losses of GRIT (arXiv 2402.09906, section 2), and the router's."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grit_jax.batch import GenerativeRows
from grit_jax.models.decoder import Decoder
from grit_jax.models.moe import RouterStatistics
from grit_jax.sharding import platform, spec

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
  rows = spec('rows', 'seq')
  with jax.named_scope('next_token_loss'):
    sums = jax.shard_map(
      partial(
        _sum_rows,
        vocab_size=model.config.vocab_size,
        together=LOGIT_TOKENS[platform()],
      ),
      in_specs=(
        spec('rows', 'seq', 'embed'),
        jax.typeof(head).sharding.spec,
        rows,
        rows,
      ),
      out_specs=spec('rows'),
      check_vma=False,
    )(hidden, head, targets, weights)
    return sums.sum()


def _sum_rows(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  vocab_size: int,
  together: int,
) -> jax.Array:
  """`next_token_loss` of one device's rows, float32 [1]."""
  count = weights.size
  weights = weights.reshape(count)
  order = jnp.argsort(weights == 0, stable=True)
  size = min(together, count)
  # Behind the last token is nothing: places there take zeros, and keep none.
  places = jnp.concatenate([order, count + jnp.arange(-count % size)])
  tokens = _Tokens(
    targets.reshape(count),
    weights,
    places.reshape(-1, size),
    (weights != 0).sum(),
  )
  hidden = hidden.reshape(count, hidden.shape[-1])
  return _sum_losses(vocab_size, hidden, head, tokens)[None]


class _Tokens(NamedTuple):
  """The tokens of one device, n of them."""

  targets: jax.Array  # int32 [n]
  weights: jax.Array  # float32 [n]
  places: jax.Array  # int32 [chunks, size], of those that count, then others
  counted: jax.Array  # int32 [], how many count


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_losses(
  vocab_size: int, hidden: jax.Array, head: jax.Array, tokens: _Tokens
) -> jax.Array:
  """The weighted sum of the losses of hidden states [n, D], float32 []."""
  zero = jnp.zeros((), jnp.float32)
  return _add_up(vocab_size, hidden, head, tokens, (zero, None, None))[0]


def _add_up(
  vocab_size: int,
  hidden: jax.Array,
  head: jax.Array,
  tokens: _Tokens,
  sums: tuple,
) -> tuple:
  """Adds to the loss and to its gradients by `hidden` and `head`, or None."""

  def add(sums: tuple, places: jax.Array) -> tuple:
    total, of_hidden, of_head = sums
    states, targets, weights = (
      x.at[places].get(mode='fill', fill_value=0)
      for x in (hidden, tokens.targets, tokens.weights)
    )
    logits = jnp.einsum(
      'td,dv->tv', states, head, preferred_element_type=jnp.float32
    )
    first = jax.lax.axis_index('tensor') * head.shape[1]
    column = first + jnp.arange(head.shape[1])
    logits = jnp.where(column < vocab_size, logits, jnp.finfo(jnp.float32).min)
    greatest = jax.lax.pmax(logits.max(axis=1, keepdims=True), 'tensor')
    exponentials = jnp.exp(logits - greatest)
    # A sum under a mask instead of a lookup: the vocabulary may be split.
    is_target = column == targets[:, None]
    denominator, target_logits = jax.lax.psum(
      (
        exponentials.sum(axis=1, keepdims=True),
        jnp.where(is_target, logits, 0.0).sum(axis=1),
      ),
      'tensor',
    )
    losses = (jnp.log(denominator) + greatest)[:, 0] - target_logits
    total += (weights * losses).sum()
    # As the product with it, which is in the dtype of the weights.
    of_logits = weights[:, None] * (exponentials / denominator - is_target)
    of_logits = of_logits.astype(head.dtype)
    if of_hidden is not None:
      product = jnp.einsum('tv,dv->td', of_logits, head)
      of_hidden = of_hidden.at[places].set(
        product, mode='drop', unique_indices=True
      )
    if of_head is not None:
      product = jnp.einsum(
        'td,tv->dv', states, of_logits, preferred_element_type=jnp.float32
      )
      of_head = (of_head + product).astype(of_head.dtype)
    return total, of_hidden, of_head

  def add_if_any(sums: tuple, chunk: tuple) -> tuple[tuple, None]:
    number, places = chunk
    any_counts = number * places.size < tokens.counted
    return jax.lax.cond(
      any_counts, add, lambda sums, _: sums, sums, places
    ), None

  numbers = jnp.arange(tokens.places.shape[0])
  return jax.lax.scan(add_if_any, sums, (numbers, tokens.places))[0]


def _forward(
  vocab_size: int, hidden: Any, head: Any, tokens: _Tokens
) -> tuple[jax.Array, tuple]:
  # A frozen head has no gradient.
  gradients = [
    jnp.zeros_like(x.value) if x.perturbed else None for x in (hidden, head)
  ]
  total, *gradients = _add_up(
    vocab_size,
    hidden.value,
    head.value,
    _Tokens(*(x.value for x in tokens)),
    (jnp.zeros((), jnp.float32), *gradients),
  )
  return total, tuple(gradients)


def _backward(_: int, gradients: tuple, cotangent: jax.Array) -> tuple:
  # The devices of `tensor` have the same sum, and each a share of its
  # cotangent.
  cotangent = jax.lax.psum(cotangent, 'tensor')
  return *_scale(gradients, cotangent), None


# A function of its own: what a `shard_map` over one device ends with must be
# one, or jax does not lower a gradient of the type `unreduced`.
@jax.jit
def _scale(gradients: tuple, factor: jax.Array) -> tuple:
  return jax.tree.map(lambda x: (x * factor).astype(x.dtype), gradients)


_sum_losses.defvjp(_forward, _backward, symbolic_zeros=True)


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
