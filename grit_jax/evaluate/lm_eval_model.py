"""A `GritLM` as lm-eval calls it.

Imported where lm-eval is installed alone (`pip install 'grit_jax[lm]'`).
"""

import collections
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from grit_jax.data.formats import format_chat_prompt
from grit_jax.errors import UserError
from grit_jax.inference.generation import Prompt
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.sampling import Sampling
from grit_jax.inference.scoring import Candidate, Score


class LanguageModel(TemplateLM):
  """Scores and generates for lm-eval's runner."""

  # Tokens that a task's answer has at most, unless the task says.
  max_gen_toks = 256

  def __init__(self, model: GritLM, max_length: int = 0, batch_size: int = 16):
    """Wraps a model.

    Args:
      model: The model.
      max_length: Tokens of a context with its continuation; longer contexts
        lose their start. 0: the positions of the model.
      batch_size: Contexts that are generated from at one time.

    Raises:
      UserError: The model has fewer positions than `max_length`.
    """
    super().__init__()
    self.model, self.batch_size = model, batch_size
    positions = model.config.model.max_positions
    if max_length > positions:
      raise UserError(
        f'max_length={max_length} is more than the {positions} positions of '
        'the model.'
      )
    self.max_length = max_length or positions

  @property
  def eot_token_id(self) -> int:
    """The token that ends a text."""
    return self.model.tokenizer.eos

  @property
  def prefix_token_id(self) -> int:
    """The token that begins one."""
    return self.model.tokenizer.bos

  @property
  def tokenizer_name(self) -> str:
    """What tells its prompts from another model's."""
    return self.model.tokenizer.fingerprint

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_: object
  ) -> list[int]:
    """Tokenizes a text, with BOS unless it has one or is to have none."""
    tokenizer = self.model.tokenizer
    if add_special_tokens is not False and not string.startswith(
      tokenizer.bos_piece
    ):
      string = tokenizer.bos_piece + string
    return tokenizer.encode(string)

  def apply_chat_template(
    self,
    chat_history: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """Formats a conversation that the model goes on with.

    The format has no system turn: what a task describes itself with goes before
    the user's first text.

    Args:
      chat_history: Messages, of user and assistant in turn.
      add_generation_prompt: Whether the model answers; otherwise it completes
        the last message, which is the assistant's.
    """
    messages = list(chat_history)
    before = ''
    if messages and messages[0]['role'] == 'system':
      before = messages.pop(0)['content']
      if before and not before[-1].isspace():
        before += '\n\n'
    turns = [message['content'] for message in messages]
    roles = [message['role'] for message in messages]
    last = '' if add_generation_prompt else 'assistant'
    expected = [('user', 'assistant')[i % 2] for i in range(len(roles))]
    if roles != expected or not roles or last not in ('', roles[-1]):
      raise ValueError(
        f'A chat of the roles {roles} has no format: user and assistant '
        'alternate, and the user begins.'
      )
    turns[0] = before + turns[0]
    # The start of an answer is stripped, as that of whole ones.
    begun = '' if add_generation_prompt else turns.pop().lstrip()
    return format_chat_prompt(turns, self.model.tokenizer) + begun

  def _loglikelihood_tokens(
    self,
    requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
    disable_tqdm: bool = False,
    **_: object,
  ) -> list[tuple[float, bool]]:
    """Scores tokenized continuations; see `TemplateLM`."""
    candidates, cut = [], 0
    for texts, context, continuation in requests:
      if not 0 < len(continuation) <= self.max_length:
        raise UserError(
          f'The continuation of {texts} has {len(continuation)} tokens, not 1 '
          f'to max_length={self.max_length}.'
        )
      ids = np.array([*context, *continuation], np.int32)
      cut += len(ids) - 1 > self.max_length
      ids = ids[-(self.max_length + 1) :]
      length = len(ids) - len(continuation)
      candidates.append(Candidate(ids, length, np.arange(len(ids)) < length))
    _report_cut(cut, len(requests), self.max_length)

    def keep(number: int, score: Score) -> None:
      texts = requests[number][0]
      if texts is not None:
        self.cache_hook.add_partial('loglikelihood', texts, tuple(score[:2]))

    scores = self.model.score_tokens(candidates, keep)
    return [(score.log_likelihood, score.greedy) for score in scores]

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Scores whole texts, in windows of the model's length."""
    owners, windows = [], []
    for number, request in enumerate(requests):
      (text,) = request.args
      for window in utils.get_rolling_token_windows(
        self.tok_encode(text, add_special_tokens=False),
        self.prefix_token_id,
        self.max_length,
        1,
      ):
        owners.append(number)
        windows.append((None, *utils.make_disjoint_window(window)))
    totals = [0.0] * len(requests)
    for owner, (score, _) in zip(
      owners, self._loglikelihood_tokens(windows), strict=True
    ):
      totals[owner] += score
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Generates from contexts, each as its task says."""
    seen: collections.Counter[str] = collections.Counter()
    prompts, cut = [], 0
    for request in requests:
      context, arguments = request.args
      # The same context again is another draw of it.
      seed = zlib.crc32(f'{seen[context]}\n{context}'.encode())
      seen[context] += 1
      sampling = make_sampling(arguments, self.max_gen_toks, seed)
      room = self.max_length - sampling.max_new_tokens
      if room < 1:
        raise UserError(
          f'max_gen_toks={sampling.max_new_tokens} leaves no room for a '
          f'context in max_length={self.max_length}.'
        )
      ids = np.array(self.tok_encode(context), np.int32)
      cut += len(ids) > room
      ids = ids[-room:]
      prompts.append(Prompt(ids, np.ones(len(ids), bool), sampling))
    _report_cut(cut, len(requests), self.max_length)
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].length)
    texts = [''] * len(prompts)
    with tqdm(
      total=len(prompts), desc='Generating', disable=disable_tqdm
    ) as bar:
      for start in range(0, len(order), self.batch_size):
        members = order[start : start + self.batch_size]
        done = self.model.complete(
          [prompts[i] for i in members], self.batch_size
        )
        for i, completion in zip(members, done, strict=True):
          texts[i] = completion.text
          self.cache_hook.add_partial(
            'generate_until', requests[i].args, completion.text
          )
        bar.update(len(members))
    return texts


def make_sampling(
  arguments: Mapping[str, object], max_new_tokens: int, seed: int
) -> Sampling:
  """Reads a task's `generation_kwargs`.

  Args:
    arguments: What the task says.
    max_new_tokens: Where it does not say.
    seed: Of the draw.

  Raises:
    UserError: It asks for what there is not, such as beams.
  """
  named = dict(normalize_gen_kwargs(dict(arguments), max_new_tokens))
  until = named.pop('until', None) or []
  drawn = named.pop('do_sample')
  temperature = float(named.pop('temperature', 1.0))
  sampling = Sampling(
    max_new_tokens=named.pop('max_gen_toks'),
    temperature=temperature if drawn else 0.0,
    top_k=named.pop('top_k', 0),
    top_p=named.pop('top_p', 1.0),
    seed=seed,
    stop=tuple(
      text for text in ([until] if isinstance(until, str) else until) if text
    ),
  )
  if named:
    raise UserError(
      f'generation_kwargs has {sorted(named)}, which there is not here.'
    )
  sampling.validate()
  return sampling


def _report_cut(cut: int, count: int, max_length: int) -> None:
  if cut:
    logging.warning(
      '%d of %d contexts are longer than max_length=%d tokens leaves room for, '
      'and lost their start.',
      cut, count, max_length,
    )  # fmt: skip
