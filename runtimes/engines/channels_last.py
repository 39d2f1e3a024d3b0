"""PyTorch, operator by operator, as fast as it gets without a compiler."""

from . import eager


class Engine(eager.Engine):
    """Channels-last, and on the CPU freed memory is kept."""

    layout = "channels_last"
    keeps_freed_memory = True
