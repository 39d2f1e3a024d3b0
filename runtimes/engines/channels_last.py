"""PyTorch, operator by operator, as fast as it gets without a compiler."""

from . import eager


class Engine(eager.Engine):
    """Channels-last memory format; on the CPU, freed memory is kept for reuse."""

    layout = "channels_last"
    keeps_freed_memory = True
