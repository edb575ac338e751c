"""The command; see the package."""

import argparse
import contextlib
import os
import re
import resource
import socket
import sys
import time

import jax
from absl import logging
from etils import epath

from grit_jax import cli
from grit_jax.errors import ConfigError, UserError
from grit_jax.inference import arguments
from grit_jax.inference.encoding import cache_bytes
from grit_jax.inference.generation import Generation, count_places
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.sampling import Sampling
from grit_jax.sharding import device_memory

try:
  import uvicorn

  from grit_jax.serve.app import Limits, Service
  from grit_jax.serve.batching import GENERATIONS, list_rows
  from grit_jax.serve.connection import Connection
except ModuleNotFoundError as error:
  sys.exit(f"grit_jax: error: {error}: pip install 'grit_jax[serve]'")


# Addresses that this machine alone reaches.
_LOOPBACK = ('127.0.0.1', '::1', 'localhost')
KEY_VARIABLE = 'GRIT_JAX_API_KEY'
# A request's head has room for it.
MAX_KEY_LENGTH = 4096
# Connections that the system accepts for a server that is busy.
BACKLOG = 100
# Files that the process has open besides its connections.
OWN_FILES = 64
_LIMITS = {
  'max_batch': 'chats answered side by side',
  'max_queue': 'requests that wait to begin; more get status 429',
  'max_connections': 'open at one time; more get status 503',
  'max_body_bytes': 'of a request; more get status 413',
  'max_input_tokens': 'of a text or a conversation; more get status 400',
  'max_new_tokens': 'of an answer, where a request does not ask for less',
}


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the flags."""
  parser = cli.Parser(
    prog='python -m grit_jax.serve',
    description="Serves a model over HTTP, in OpenAI's protocol.",
  )
  arguments.add_model(parser)
  parser.add_argument(
    '--name', default='', help="what clients call it (default: the folder's)"
  )
  parser.add_argument(
    '--host',
    type=cli.parse_given,
    default='127.0.0.1',
    help='to listen at (default: %(default)s)',
  )
  parser.add_argument(
    '--port',
    type=cli.parse_port,
    default=8000,
    help='to listen at; 0: a free one (default: %(default)s)',
  )
  parser.add_argument(
    '--api_key',
    type=cli.parse_given,
    help=f'that clients must send; every user of the machine sees it in `ps`, '
    f'but not what {KEY_VARIABLE} in the environment or --api_key_file has '
    '(default: none)',
  )
  parser.add_argument(
    '--api_key_file', type=cli.parse_given, help='a file that has the key'
  )
  for name, help_text in _LIMITS.items():
    parser.add_argument(
      f'--{name}',
      type=cli.parse_positive,
      default=getattr(Limits, name),
      help=f'{help_text} (default: %(default)s)',
    )
  parser.add_argument(
    '--stop_seconds',
    type=cli.parse_positive,
    default=30,
    help='that a signal leaves to what runs (default: %(default)s)',
  )
  return parser


def find_key(flags: argparse.Namespace) -> str:
  """Returns the key that clients must send; empty: none.

  Raises:
    ConfigError: It is given twice, or is one that no client can send.
    OSError: Its file cannot be read.
  """
  sources = {
    '--api_key': flags.api_key,
    '--api_key_file': flags.api_key_file,
    KEY_VARIABLE: os.environ.get(KEY_VARIABLE),
  }
  given = {k: value for k, value in sources.items() if value is not None}
  if not given:
    return ''
  if len(given) > 1:
    raise ConfigError(f'{" and ".join(given)} are given: give the key once.')
  [(source, key)] = given.items()
  if source == '--api_key_file':
    source = f'{source}={key}'
    # Any byte is a character of this encoding.
    with open(key, encoding='latin-1') as file:
      key = file.read(MAX_KEY_LENGTH + 2).removesuffix('\n')
  if len(key) > MAX_KEY_LENGTH or not re.fullmatch('[!-~]([ -~]*[!-~])?', key):
    raise ConfigError(
      f'{source}: a key has 1 to {MAX_KEY_LENGTH} characters of printable '
      'ASCII, without blanks at its ends; no client can send another.'
    )
  return key


def bind(host: str, port: int) -> socket.socket:
  """Takes the address; nobody can connect before the server listens.

  Raises:
    OSError: It is taken, or not this machine's.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  with contextlib.ExitStack() as stack:
    taken = stack.enter_context(socket.socket(family))
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind((host, port))
    stack.pop_all()
  return taken


def load(flags: argparse.Namespace, limits: Limits) -> GritLM:
  """Loads the model, and compiles what most requests take.

  Raises:
    UserError: what the flags name cannot be.
    ConfigError: the caches do not fit.
  """
  model = arguments.load(flags)
  architecture = model.config.model
  most = min(limits.max_input_tokens, architecture.max_positions)
  places = count_places(architecture, most, limits.max_new_tokens)
  tokens = GENERATIONS * limits.max_batch * places
  size = tokens * cache_bytes(model.config)
  room = device_memory(model.mesh) * model.mesh.size
  caches = (
    f'Caches of {GENERATIONS} batches of {limits.max_batch} chats take '
    f'{size / 1e9:.2f} GB at most'
  )
  if size > room:
    raise ConfigError(
      f'{caches}, and there are {room / 1e9:.2f} GB: choose a smaller '
      '--max_batch, --max_input_tokens or --max_new_tokens.'
    )
  logging.info('%s.', caches)
  start = time.monotonic()
  model.encode('Hello', few_shapes=True)
  prompt = model.encode_prompt(
    [{'role': 'user', 'content': 'Hello'}], Sampling(max_new_tokens=2)
  )
  batches = list_rows(limits.max_batch)
  with jax.set_mesh(model.mesh):
    for rows in batches:
      chats = Generation(model.model, model.tokenizer, [prompt], rows, places)
      chats.step(1)
  logging.info(
    'Programs for batches of %s chats are compiled, in %.0f s; others are when '
    'requests first need them.',
    ', '.join(map(str, batches)), time.monotonic() - start,
  )  # fmt: skip
  return model


def count_connections(wanted: int) -> int:
  """Returns the connections that the process may have files for.

  Raises:
    UserError: It may not have one.
  """
  files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  found = files - BACKLOG - OWN_FILES
  if files == resource.RLIM_INFINITY or wanted <= found:
    return wanted
  if found < 1:
    raise UserError(
      f'This process may open {files} files (`ulimit -n`), too few to serve: '
      f'it needs {BACKLOG + OWN_FILES} and one a connection.'
    )
  logging.warning(
    'At most %d connections, not --max_connections=%d: this process may open '
    '%d files (`ulimit -n`).', found, wanted, files,
  )  # fmt: skip
  return found


class Server(uvicorn.Server):
  """A server that says when it listens, and ends what is kept waiting."""

  async def on_tick(self, counter: int) -> bool:
    """See the base class, which calls it ten times a second."""
    if counter % 10 == 0:
      for connection in list(self.server_state.connections):
        connection.check()
    if counter % 600 == 0:
      Connection.report()
    return await super().on_tick(counter)

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """See the base class."""
    await super().startup(sockets)
    for taken in sockets or []:
      host, port = taken.getsockname()[:2]
      host = f'[{host}]' if ':' in host else host
      logging.info('Serving at http://%s:%d/v1', host, port)


def make_server(
  service: Service, max_connections: int, stop_seconds: int
) -> Server:
  """Returns the server, with one protocol and loop whatever is installed."""
  return Server(
    uvicorn.Config(
      service.app,
      http=Connection,
      backlog=BACKLOG,
      # What has that many is refused, as a connection and as a request.
      limit_concurrency=max_connections + 1,
      # It warns of every connection that is not HTTP; see `Connection.report`.
      log_level='error',
      loop='asyncio',
      ws='none',
      lifespan='on',
      log_config=None,
      access_log=False,
      server_header=False,
      proxy_headers=False,
      timeout_graceful_shutdown=stop_seconds,
    )
  )


def serve(flags: argparse.Namespace) -> None:
  """Serves until a signal comes.

  Raises:
    UserError: what the flags name cannot be.
  """
  key = find_key(flags)
  limits = Limits(**{name: getattr(flags, name) for name in _LIMITS})
  try:
    taken = bind(flags.host, flags.port)
  # Not OSError: a host that cannot be a name at all.
  except (OSError, TypeError, ValueError) as error:
    raise ConfigError(
      f'--host={flags.host} --port={flags.port}: {error}'
    ) from error
  with taken:
    connections = count_connections(limits.max_connections)
    model = load(flags, limits)
    name = flags.name or epath.Path(flags.model).resolve().name
    logging.info('Its name for clients is %s.', name)
    if not key and flags.host not in _LOOPBACK:
      logging.warning(
        'Without a key, anybody who reaches %s may use the model.', flags.host
      )
    service = Service(model, name, limits, key)
    make_server(service, connections, flags.stop_seconds).run([taken])


if __name__ == '__main__':
  cli.main(
    make_parser(), serve, less_memory='--max_batch and --max_input_tokens'
  )
