"""One shell for all commands: flags, logs, errors, exit codes.

Exit codes: 0; 2 for a command line or a configuration that cannot be; 1 for
another mistake, or a disk or a memory that is full; 128 + the signal for a
command that a signal has stopped. Such an end is one line on stderr, of which
`--verbosity=1` shows the traceback too. Any other exception is a fault of the
package and keeps its traceback.
"""

import argparse
import difflib
import math
import os
import runpy
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import ml_collections
from absl import flags as absl_flags
from absl import logging
from ml_collections import config_flags

from grit_jax.config import Bounds, Count
from grit_jax.errors import ConfigError, UserError
from grit_jax.logs import quiet_libraries

_PREFIX = 'grit_jax: error:'


class Parser(argparse.ArgumentParser):
  """Flags, whole words alone; a mistake in them is a ConfigError."""

  def __init__(self, **keywords: Any):
    """Adds the flag that all commands have."""
    super().__init__(allow_abbrev=False, **keywords)
    self.add_argument(
      '--verbosity',
      type=int,
      choices=(-1, 0, 1),
      # A subcommand has the flag too, and would overwrite it by its default.
      default=argparse.SUPPRESS,
      help='-1: warnings; 0: progress; 1: tracebacks too (default: 0)',
    )

  def error(self, message: str) -> NoReturn:
    """Raises instead of printing the usage."""
    raise ConfigError(f'{message} (see {self.prog} --help)')


def run(
  parser: argparse.ArgumentParser,
  command: Callable[[argparse.Namespace], None],
  argv: Sequence[str] | None = None,
  *,
  config: bool = False,
  stopped: str = 'stopped',
  less_memory: str = 'smaller batches',
) -> None:
  """Runs a command.

  Args:
    parser: of its flags.
    command: gets the flags.
    argv: the flags; None: those of the process.
    config: whether there are `--config=FILE` and `--config.KEY=VALUE`, which
      ml_collections reads; `flags.config` is then a ConfigDict.
    stopped: what to say after Ctrl-C; `{NAME}` in it stands for a flag's value.
    less_memory: the settings that take less memory, to be named where it runs
      out.

  Raises:
    SystemExit: with the exit code, unless that is 0.
  """
  argv = sys.argv[1:] if argv is None else list(argv)
  flags = argparse.Namespace(verbosity=0)
  try:
    if config:
      _, rest = parser.parse_known_args(argv, flags)
      _refuse_unknown(parser, rest)
      flags.config = parse_config(rest)
    else:
      parser.parse_args(argv, flags)
    # absl's logs wait for its own flags, of which there are none.
    absl_flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    logging.set_verbosity(flags.verbosity)
    quiet_libraries()
    command(flags)
  except ConfigError as error:
    _fail(str(error), 2, flags)
  except UserError as error:
    _fail(str(error), 1, flags)
  except BrokenPipeError:
    # Who read the output has gone, as `head` does.
    _end('', 128 + signal.SIGPIPE)
  except OSError as error:
    _fail(describe_os_error(error), 1, flags)
  except MemoryError as error:
    _fail(_describe_memory(error, less_memory), 1, flags)
  except RuntimeError as error:
    if type(error).__name__ != 'JaxRuntimeError':
      raise
    if 'RESOURCE_EXHAUSTED' in str(error):
      _fail(_describe_memory(error, less_memory), 1, flags)
    if not _has_peers():
      raise
    _fail(
      'the processes of the run cannot work together any more; another one may '
      'have ended. Start all of them again: the run goes on from its newest '
      f'checkpoint. JAX says: {error}',
      1,
      flags,
    )
  except KeyboardInterrupt:
    _end(f'grit_jax: {stopped.format(**vars(flags))}', 128 + signal.SIGINT)


def main(*arguments: Any, **keywords: Any) -> None:
  """Runs a command as the whole of a process; see `run`.

  After an error nothing that a library still does may print or wait.
  """
  sys.unraisablehook = _show_unraisable
  try:
    run(*arguments, **keywords)
  except SystemExit as error:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.code if isinstance(error.code, int) else 1)


def _show_unraisable(what: Any) -> None:
  # Of a write whose event loop has gone with the error of another write.
  if str(what.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(what)


def number(kind: Any) -> Callable[[str], float]:
  """Returns what parses a flag as a field of the configuration is bounded.

  Args:
    kind: `config.Count` or another of its bounded numbers.
  """
  of, bounds = typing.get_args(kind)

  def parse(text: str) -> float:
    try:
      value = of(text)
    except ValueError:
      value = math.nan
    if not bounds.has(value):
      what = 'a whole number' if of is int else 'a number'
      raise argparse.ArgumentTypeError(f'{text!r} is not {what} in {bounds}')
    return value

  # For who asks a parser for the range of a flag.
  parse.bounds = bounds  # type: ignore[attr-defined]
  return parse


parse_positive = number(Count)
parse_port = number(Annotated[int, Bounds(0, 65535)])


def split_names(text: str) -> list[str]:
  """Returns the names of a list such as `mmlu, gsm8k`."""
  return [name.strip() for name in text.split(',') if name.strip()]


def parse_given(text: str) -> str:
  """Returns a text that is not empty.

  An empty one is a shell's variable that was never set: as a path it would be
  the current folder, as a host all of the machine's addresses.
  """
  if not text.strip():
    raise argparse.ArgumentTypeError('it is empty')
  return text


def _fail(message: str, status: int, flags: argparse.Namespace) -> NoReturn:
  if flags.verbosity > 0:
    traceback.print_exc()
  _end(f'{_PREFIX} {message}', status)


def _end(message: str, status: int) -> NoReturn:
  """Ends this process, and so the others of a run.

  At a usual exit JAX would wait for the others, which wait for this one.
  """
  logging.flush()
  if message:
    print(message, file=sys.stderr, flush=True)
  if _has_peers():
    os._exit(status)
  sys.exit(status)


def _has_peers() -> bool:
  """Whether this is one of several processes, by a JAX that is in use."""
  jax = sys.modules.get('jax')
  return bool(
    jax and jax.distributed.is_initialized() and jax.process_count() > 1
  )


def describe_os_error(error: OSError) -> str:
  """Returns what the system says, with the file if it names one."""
  if error.strerror is None:
    return str(error) or type(error).__name__
  if error.filename is None:
    return error.strerror
  return f'{error.filename}: {error.strerror}'


def _describe_memory(error: Exception, less_memory: str) -> str:
  # The first line has what was needed; the rest is the allocator's.
  [needed, *_] = str(error).splitlines() or ['']
  return f'memory ran out. Less is taken by {less_memory}. {needed}'.rstrip()


def _refuse_unknown(parser: argparse.ArgumentParser, rest: list[str]) -> None:
  """Refuses flags that are neither the parser's nor the configuration's."""
  for argument in rest:
    name = argument.partition('=')[0]
    if name.startswith('-') and not name.startswith(
      ('--config', '--noconfig.')
    ):
      close = difflib.get_close_matches(
        name, parser._option_string_actions, n=1
      )
      hint = f' Did you mean {close[0]}?' if close else ''
      raise ConfigError(f'{name}: there is no such flag.{hint}')


def parse_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
  """Reads `--config=FILE` and the `--config.KEY=VALUE` that change it.

  Raises:
    ConfigError: there is no such file, it is no configuration, or a key is
      unknown or has a value of another type.
  """
  parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
  parser.add_argument('--config')
  file = parser.parse_known_args(arguments)[0].config
  if file is None:
    raise ConfigError('--config=FILE is missing.')
  known = _list_keys(_run_config(file))
  for argument in arguments:
    name, is_key, key = argument.partition('=')[0].partition('config.')
    if is_key and name in ('--', '--no') and key not in known:
      close = difflib.get_close_matches(key, known, n=3)
      hint = f' Did you mean {" or ".join(close)}?' if close else ''
      raise ConfigError(f'--config.{key}: there is no such key.{hint}')
  values = absl_flags.FlagValues()
  argv = ['grit_jax', *arguments]
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  try:
    _, *rest = values(argv)
  except absl_flags.Error as error:
    raise ConfigError(str(error).removeprefix('flag ')) from error
  if rest:
    raise ConfigError(f'unknown arguments: {" ".join(rest)}')
  return values.config


def _run_config(file: str) -> ml_collections.ConfigDict:
  """Returns what `FILE` or `FILE:VARIANT` has without flags."""
  path, *variant = file.split(':', maxsplit=1)
  try:
    names = runpy.run_path(path)
    config = names['get_config'](*variant) if 'get_config' in names else None
  # The file is a user's program, and may raise anything.
  except Exception as error:
    raise ConfigError(
      f'--config={file}: {type(error).__name__}: {error}'
    ) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      f'--config={file}: it has no get_config() that returns a ConfigDict.'
    )
  return config


def _list_keys(config: ml_collections.ConfigDict, prefix: str = '') -> set[str]:
  """Returns the names of all groups and keys, such as `data.paths`."""
  found = set()
  for name, value in config.items():
    found.add(prefix + name)
    if isinstance(value, ml_collections.ConfigDict):
      found |= _list_keys(value, f'{prefix}{name}.')
  return found
