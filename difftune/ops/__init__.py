"""Tensor functions of differential attention. Nothing below this room; torch and optional kernels only.

Shapes are written with one legend in the whole package:

====  =====================================================================
B     batch (rows)
T     query positions
S     key positions, ``T <= S`` when causal
C     hidden size
V     vocabulary
H     differential heads (pairs of softmax maps)
G     key/value heads of a differential head (GQA groups), H a multiple of G
P     the pair: 0 the positive map, 1 the negative map
D     head dim of queries and keys
E     head dim of values: 2 D in V1, D in V2
====  =====================================================================
"""

from difftune.ops.context_parallel import ContextShard
from difftune.ops.diff_attention import diff_attention, softmax_attention
from difftune.ops.documents import Documents
from difftune.ops.linear_cross_entropy import linear_cross_entropy
from difftune.ops.rms_norm import rms_norm
from difftune.ops.rotary import rotate

__all__ = [
    "ContextShard",
    "Documents",
    "diff_attention",
    "linear_cross_entropy",
    "rms_norm",
    "rotate",
    "softmax_attention",
]
