"""The two losses of GRIT (arXiv 2402.09906, section 2), and the router's."""

import jax
import jax.numpy as jnp

from grit_jax.batch import GenerativeRows
from grit_jax.models.decoder import Decoder
from grit_jax.models.moe import RouterStatistics

# Positions of a row whose logits exist at one time: [R, 256, V] in float32 is
# 262 MB a chip at 8 rows and 32,000 tokens.
LOGIT_POSITIONS = 256


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

  The logits are never whole: a checkpointed scan holds those of
  `LOGIT_POSITIONS` positions of each row, and the head is gathered once.

  Args:
    model: for its head.
    hidden: [R, T, D].
    batch: the rows; `loss_weights` [R, T] weighs the prediction of a token.

  Returns:
    sum over tokens of weight * -log p(token | what precedes it). Divide by
    the sum of the weights for L_gen.
  """
  length = hidden.shape[1]
  size = min(LOGIT_POSITIONS, length)
  count = -(-length // size)

  def chunked(x: jax.Array) -> jax.Array:
    """[R, T, ...] to [count, R, size, ...], padded at the end with 0."""
    padding = ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, padding)
    x = x.reshape(x.shape[0], count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  # The state at t predicts the token at t + 1; a segment's first token has
  # weight 0, so nothing is predicted across a boundary.
  targets = chunked(jnp.pad(batch.rows.tokens, ((0, 0), (0, 1)))[:, 1:])
  weights = chunked(jnp.pad(batch.loss_weights, ((0, 0), (0, 1)))[:, 1:])
  head = model.gather_head()

  @jax.checkpoint
  def add(total: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
    hidden, targets, weights = chunk
    logits = model.logits(hidden, head)
    # A sum under a mask instead of a lookup: the vocabulary may be split over
    # `tensor`, and a lookup would gather it.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logits = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return total + (weights * losses).sum(), None

  with jax.named_scope('next_token_loss'):
    total, _ = jax.lax.scan(
      add, jnp.zeros((), jnp.float32), (chunked(hidden), targets, weights)
    )
  return total


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
