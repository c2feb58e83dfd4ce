"""Laws are tried on the same examples each time, so that a failure is the change's and not the day's."""

from hypothesis import settings

settings.register_profile("laws", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("laws")
