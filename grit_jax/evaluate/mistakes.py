"""What is wrong with what is asked to be evaluated."""


class UnknownTaskError(ValueError):
  """A task that the runner does not have; the message says what it has."""


class UnsafeTaskError(ValueError):
  """A task that runs the model's code, which was not allowed."""


class UnfitTaskError(ValueError):
  """A task that does not fit the model, or what is asked of it."""
