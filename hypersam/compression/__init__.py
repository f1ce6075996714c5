"""A checkpoint in, a compressed model and a report out; or a plan, which tells what would come out.

``job``: what the stages share, and how a compression begins. ``meeting``: tensors coded so that the goal is met.
``run``: the stages in their order.
"""

from hypersam.compression.job import Progress, ProgressCallback
from hypersam.compression.run import compress, plan

__all__ = ["Progress", "ProgressCallback", "compress", "plan"]
