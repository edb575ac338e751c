"""Errors of which a person sees the message alone."""


class UserError(ValueError):
  """Something that a user can mend; the message names it."""


class ConfigError(UserError):
  """A value on the command line or in the configuration that cannot be."""
